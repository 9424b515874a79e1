"""The settings of `qcgraph.schedulers.FittedScheduler`: the updates of a step plan as plain JSON. No torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qcgraph.plan.spec import NoiseSchedule
from qcgraph.plan.steps import StepPlan

SCHEDULER_CLASS = "FittedScheduler"


def fitted_settings(plan: StepPlan, schedule: NoiseSchedule) -> dict[str, Any]:
    """Return the settings of the scheduler that runs the updates of a step plan, as its class takes them.

    Args:
        plan: the step plan; its fingerprint holds the number of steps of the run that the plan stands for.
        schedule: the noise schedule that the model was trained on.
    """
    updates = [asdict(step.update) for step in plan.steps]
    return {
        "steps": [
            {"timestep": step.timestep, "update": {**update, "history": list(update["history"])}}
            for step, update in zip(plan.steps, updates, strict=True)
        ],
        "run_steps": plan.fingerprint.steps,
        "num_train_timesteps": schedule.train_steps,
        "prediction_type": schedule.prediction,
    }
