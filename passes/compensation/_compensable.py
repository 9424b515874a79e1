"""Check whether variance compensation fits the updates of the steps."""

from __future__ import annotations

from qcgraph.errors import UsageError
from qcgraph.plan.steps import StepPlan


def check_compensable(plan: StepPlan) -> None:
    """Refuse variance compensation for updates that use earlier steps.

    Compensation corrects the result of an update, K * x' + (1 - K) * mu, by another noise prediction at the denoiser's
    output, which is an affine function of the prediction and the latent of that step. With history, x' also depends on
    latents and predictions of earlier steps: the correction would need inputs that no graph of a single step has. And a
    prediction that was corrected for its own step would enter later updates, as a correction that was not fitted.

    Raises:
        UsageError: an update of the plan has history.
    """
    looking_back = [index for index, step in enumerate(plan.steps) if step.update.history]
    if looking_back:
        raise UsageError(
            f"variance compensation does not fit {plan.fingerprint.scheduler}: the update of step {looking_back[0]} "
            "also takes earlier latents and predictions, which the graph of a single step does not have",
            hint="--compensate off, or a scheduler without memory, ddim for example",
        )
