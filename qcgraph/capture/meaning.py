"""A check of captured programs: a program and its module, called with the same random inputs, must agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcgraph.capture.obstacles import call_error, first_line
from qcgraph.capture.wrappers import unwrapped
from qcgraph.errors import CaptureError
from qcgraph.ir.graph import DTYPES
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites, total_macs
from qcgraph.plan.spec import PREDICTION_NAME, TIMESTEP, ModelSpec
from qcgraph.plan.steps import StepPlan

# None of these is the batch of the trace. Mistakes about sizes of one show at a batch of one; a cache between calls
# would confuse the two equal batches in a row.
BATCHES = (1, 1, 2, 5)
COUNTS = (12, 4, 3)  # calls: of a small model, of a large one, and of one whose single forward takes seconds
MACS = 2e11  # multiply-accumulates that the calls of one side may take: seconds on two cores
FLOOR = 1e-5  # relative L2 distance of float32 sums of a few thousand terms in different orders
NUDGE = 1e-6  # relative change of the latent: some units in the last place of float32
TIMES = 10.0  # allowed distance, as a multiple of the effect of this change
CEILING = 1e-2  # largest limit of the distance, however sensitive the model is
REPEATS = 3  # further calls with the same input, before a model is said to repeat its result
SEED = 0


@dataclass(frozen=True)
class _Example:
    """Inputs of one call.

    Attributes:
        inputs: latent, timestep and conditions by their names in a program.
        where: timestep, batch and conditions in words, for error messages.
    """

    inputs: Mapping[str, Tensor]
    where: str


def check_meaning(program: Program, module: nn.Module, input_names: tuple[str, ...], plan: StepPlan) -> None:
    """Compare a captured program with its module on random latents, at timesteps of the plan.

    Several batch sizes and all kinds of conditions are tried, with null values where the plan has guidance. The limit
    of the relative L2 distance, sample by sample, is ten times the module's own change when the latent moves by its
    rounding, and at least 1e-5.

    Args:
        program: the program as captured, with a single variant.
        module: the module that it was captured from; it is called about ten times.
        input_names: the names of its ``forward``'s parameters, in the order of the inputs of the spec.
        plan: the step plan that gives the timesteps.

    Raises:
        CaptureError: program and module differ, with the distance and the limit; or the module's result is not finite,
            differs from call to call, depends on whether gradients are recorded, or depends on the rest of the batch.
    """
    spec = program.facts[ModelSpec]
    comparison = _Comparison(program, unwrapped(module), input_names, spec)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False):
        calls = list(_calls(program, spec, plan))
        first = comparison.check(calls[0])
        second = comparison.check(calls[1])
        comparison.check_repeatable(calls[0], first)
        comparison.check_apart(calls[:2], (first, second))
        for call in calls[2:]:
            comparison.check(call)
        comparison.check_repeatable(calls[0], first, inference=True)


def _calls(program: Program, spec: ModelSpec, plan: StepPlan) -> Iterator[_Example]:
    """Yield the inputs to compare at: fewer calls, with smaller batches, for models that take long."""
    macs = max(1, total_macs(find_sites(program.variants[program.computing])))
    count = next((count for count in COUNTS if macs * _samples(count) <= MACS), COUNTS[-1])
    generator = torch.Generator().manual_seed(SEED)
    used = 0
    places = [0, count - 1, *range(1, count - 1)]  # the first two are far apart, since `check_apart` joins them
    for index, place in enumerate(places):
        batch = BATCHES[index % len(BATCHES)]
        timestep = plan.timesteps[round(place * (len(plan) - 1) / max(1, count - 1))]
        told = _conditions(spec, batch, used, generator, is_guided=plan.halves > 1)
        used += batch
        latent = torch.randn(batch, *spec.latent_shape, generator=generator)
        inputs = {spec.latent.name: latent, TIMESTEP.name: torch.full((batch,), timestep), **told}
        shown = "".join(f", {name} {value.tolist()}" for name, value in told.items() if value.dim() == 1)
        yield _Example(inputs, f"timestep {timestep:g}, batch {batch}{shown}")


def _conditions(
    spec: ModelSpec, batch: int, used: int, generator: torch.Generator, *, is_guided: bool
) -> dict[str, Tensor]:
    """Return conditions of a batch: first, last and middle value of countable ones, normal numbers for all else."""
    found = {}
    for condition in spec.conditions:
        if condition.count is None:
            found[condition.name] = torch.randn(batch, *condition.shape, generator=generator)
            continue
        values: list[int | float] = [0, condition.count - 1, condition.count // 2]
        if is_guided and condition.null is not None:
            values.insert(0, condition.null)
        chosen = torch.tensor([values[(used + offset) % len(values)] for offset in range(batch)])
        whole = chosen.reshape(batch, *[1] * len(condition.shape)).expand(batch, *condition.shape)
        found[condition.name] = whole.to(DTYPES[condition.dtype]).contiguous()
    return found


def _samples(count: int) -> int:
    return sum(BATCHES[index % len(BATCHES)] for index in range(count))


class _Comparison:
    """Calls a module and its program with the same inputs."""

    def __init__(self, program: Program, module: nn.Module, input_names: tuple[str, ...], spec: ModelSpec) -> None:
        self._program = program
        self._module = module
        self._names = dict(zip((tensor.name for tensor in spec.inputs), input_names, strict=True))
        self._latent = self._names[spec.latent.name]
        self._name = spec.name

    def expected(
        self, call: _Example, *, gradients: bool = False, inference: bool = False, nudged: bool = False
    ) -> Tensor:
        """Return the module's result. The module gets inputs of its own, since it may write to them."""
        inputs = {self._names[name]: value.clone() for name, value in call.inputs.items()}
        if nudged:
            latent = inputs[self._latent]
            latent += NUDGE * latent * torch.randn(latent.shape, generator=torch.Generator().manual_seed(SEED))
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):  # inference mode sets both
                result = self._module(**inputs)
        except Exception as error:  # a model's code may raise anything; the error is passed on
            hint = (
                "the spec says which latents and conditions there are, and which value of a condition is its null value"
            )
            raise call_error(self._module, f"at {call.where}", self._name, error, hint) from error
        assert isinstance(result, Tensor)
        return result.detach()

    def check(self, call: _Example) -> Tensor:
        """Compare program and module on one input, and return the module's result.

        Raises:
            CaptureError: see `check_meaning`.
        """
        expected = self.expected(call)
        if not bool(torch.isfinite(expected).all()):
            raise CaptureError(
                f"the model's result is not finite at {call.where}, on a latent of normal numbers",
                where=self._name,
                hint="its weights are damaged, or a formula divides by zero or overflows there",
            )
        try:
            found = self._program.run(self._program.computing, call.inputs)[PREDICTION_NAME]
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CaptureError(
                f"the captured program fails at {call.where}, and the model does not: {first_line(error)}",
                where=self._name,
                hint="the model treats this batch otherwise; write it so that any batch takes the same way",
            ) from error
        if found.shape != expected.shape:
            raise CaptureError(
                f"the captured program gives {list(found.shape)} and the model {list(expected.shape)} at {call.where}",
                where=self._name,
                hint="the model treats this batch otherwise; write it so that any batch takes the same way",
            )
        apart = distance(found, expected)
        if apart > FLOOR and apart > (limit := self._limit(call, expected)):
            self._check_repeats(call, expected)
            self.check_repeatable(call, expected)
            raise CaptureError(
                f"the captured program computes something else than the model: relative L2 distance {apart:.3g}, "
                f"limit {limit:.3g}, at {call.where}",
                where=self._name,
                hint="torch.export saw the model take another way than it takes when it is called: look for branches "
                "on sizes or modes, for values computed by NumPy or Python, and for state that is kept between calls",
            )
        return expected

    def _limit(self, call: _Example, expected: Tensor) -> float:
        """Return the largest distance that rounding may cause in the result of a call."""
        moved = distance(self.expected(call, nudged=True), expected)
        return min(CEILING, max(FLOOR, TIMES * moved))

    def check_repeatable(self, call: _Example, expected: Tensor, *, inference: bool = False) -> None:
        """Call the module again, with gradients recorded or in inference mode.

        Raises:
            CaptureError: the result differs from the expected one.
        """
        error = self._moved(call, expected, gradients=not inference, inference=inference)
        if error <= FLOOR or error <= self._limit(call, expected):
            return
        self._check_repeats(call, expected)
        raise CaptureError(
            f"the model's result depends on whether gradients are recorded: relative L2 distance {error:.3g}",
            where=self._name,
            hint="a denoiser gives the same result either way: remove what asks torch.is_grad_enabled() or "
            "torch.is_inference_mode_enabled()",
        )

    def _check_repeats(self, call: _Example, expected: Tensor) -> None:
        """Call the module again as before, several times: two draws may agree by chance.

        Raises:
            CaptureError: a result differs from the expected one.
        """
        again = max(self._moved(call, expected) for _ in range(REPEATS))
        if again > FLOOR:
            raise CaptureError(
                f"the model gives another result each time: relative L2 distance {again:.3g} between two calls with "
                f"the same input, at {call.where}",
                where=self._name,
                hint="it draws random numbers (dropout that is left active?) or keeps state between calls (a counter, "
                "a cache): a denoiser is a function of latent, timestep and conditions",
            )

    def check_apart(self, calls: Sequence[_Example], alone: Sequence[Tensor]) -> None:
        """Join calls of one sample each, at different timesteps and conditions, to one batch; compare the results.

        Calibration observes such batches, `hoist-adaln` prepares many timesteps in one batch, and a cache of guidance
        computes half of a batch.

        Args:
            calls: the calls, of one sample each.
            alone: the module's result for each call.

        Raises:
            CaptureError: a sample's result is different in a batch with other samples.
        """
        joined = {name: torch.cat([call.inputs[name] for call in calls]) for name in self._names}
        together = _Example(joined, "in one batch: " + "; ".join(call.where for call in calls))
        found, expected = self.check(together), torch.cat(list(alone))
        apart = distance(found, expected)
        if apart > FLOOR and apart > self._limit(together, found):
            raise CaptureError(
                f"what the model gives for a sample depends on the others in its batch: relative L2 distance "
                f"{apart:.3g} from the same sample alone, {together.where}",
                where=self._name,
                hint="compute each sample from its own latent, timestep and conditions: look for t[0], and for means "
                "and norms along the batch",
            )

    def _moved(self, call: _Example, expected: Tensor, *, gradients: bool = False, inference: bool = False) -> float:
        again = self.expected(call, gradients=gradients, inference=inference)
        return distance(again, expected) if again.shape == expected.shape else math.inf


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest relative L2 distance of a sample; infinite where only one of both is zero or finite."""
    if torch.equal(found, expected):
        return 0.0
    difference = (found.double() - expected.double()).flatten(1).norm(dim=1)
    size = expected.double().flatten(1).norm(dim=1)
    relative = torch.where(difference == 0, 0.0, difference / size)
    return float(torch.nan_to_num(relative, nan=math.inf, posinf=math.inf).max())
