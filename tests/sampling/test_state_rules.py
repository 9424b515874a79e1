"""The state of a request, where caches break: on a compiled program that looks back to three computing steps.

Everything goes through the denoiser that `qcgraph.load` gives, on each backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import qcgraph
from qcgraph.bundle import Bundle
from qcgraph.compiler.compilation import compile_model
from qcgraph.errors import BundleError, UsageError
from qcgraph.export.run.open import runner_of
from qcgraph.models import LoadedModel
from qcgraph.recipe import Recipe
from qcgraph.sampling.denoiser import Denoiser
from qcgraph.sampling.runner import Array, Call, Runner

SCHEDULE = "FFRFRFFRR"  # values of three computing steps are there from step 3 on, and grow older

pytestmark = [
    pytest.mark.slow,  # they compile
    pytest.mark.filterwarnings("ignore::qcgraph.sampling.denoiser.UncheckedLatentsWarning"),  # batches are of one half
]


@pytest.fixture(scope="module")
def bundle(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    recipe = Recipe().override(bits="off", steps=9, cache=f"plan=888-111:{SCHEDULE}", target="onnxruntime-cpu")
    return qcgraph.compile(tiny_model, recipe, output=tmp_path_factory.mktemp("state") / "tiny")


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def denoiser(request: pytest.FixtureRequest, bundle: Bundle) -> Denoiser:
    return qcgraph.load(bundle.path, backend=request.param, threads=1)


class Trajectory:
    """A host's trajectory: a latent that moves on, and its classes."""

    def __init__(self, denoiser: Denoiser, seed: int, labels: Sequence[int]) -> None:
        self.denoiser, self.labels = denoiser.request(), np.array(labels)
        generator = np.random.default_rng(seed)
        self.latent = generator.standard_normal((len(labels), 2, 8, 8), dtype=np.float32)
        self.predictions: list[Array] = []

    def step(self, index: int) -> None:
        timestep = self.denoiser.plan.timesteps[index]
        prediction = self.denoiser(self.latent, timestep, self.labels).sample[:, :2]
        self.latent = self.latent - np.float32(0.2) * prediction
        self.predictions.append(prediction)

    def run(self, steps: range) -> list[Array]:
        for index in steps:
            self.step(index)
        return self.predictions


def same(one: Sequence[Array], other: Sequence[Array]) -> bool:
    return len(one) == len(other) and all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def refusal(denoiser: Denoiser, trajectory: Trajectory, timestep: float) -> str:
    with pytest.raises(BundleError) as caught:
        denoiser(trajectory.latent, timestep, trajectory.labels)
    assert caught.value.hint
    return caught.value.message


def test_the_program_is_one_whose_cached_values_age(bundle: Bundle) -> None:
    assert bundle.plan.schedule().startswith(SCHEDULE)
    assert {"cache_0", "cache_0_age1", "cache_0_age2"} <= set(bundle.interfaces["reuse"].input_names)


def test_interleaved_trajectories_equal_separate_ones(denoiser: Denoiser) -> None:
    """Three of them, of different batches, each a step ahead of the next one and in changing order."""
    steps = len(denoiser.plan)
    batches = [(0, [0, 1]), (1, [3, 3, 4]), (2, [2])]
    apart = [Trajectory(denoiser, *batch).run(range(steps)) for batch in batches]
    together = [Trajectory(denoiser, *batch) for batch in batches]
    for tick in range(steps + len(batches)):
        for which in np.random.default_rng(tick).permutation(len(batches)):
            if 0 <= tick - which < steps:
                together[which].step(tick - int(which))
    assert all(same(trajectory.predictions, alone) for trajectory, alone in zip(together, apart, strict=True))


@pytest.mark.parametrize("aborted_after", range(1, 9))
def test_an_aborted_trajectory_is_forgotten(denoiser: Denoiser, aborted_after: int) -> None:
    expected = Trajectory(denoiser, 1, [3, 4, 0]).run(range(9))
    aborted = Trajectory(denoiser, 0, [0, 1])
    aborted.run(range(aborted_after))
    again = Trajectory(denoiser, 1, [3, 4, 0])
    again.denoiser = aborted.denoiser
    assert same(again.run(range(9)), expected)


def test_one_denoiser_draws_one_batch_after_the_other(denoiser: Denoiser) -> None:
    first = Trajectory(denoiser, 0, [0, 1])
    expected = list(first.run(range(9)))
    second = Trajectory(denoiser, 0, [0, 1])
    second.denoiser = first.denoiser
    assert same(second.run(range(9)), expected)


@pytest.mark.parametrize("taken", range(1, 9))
def test_a_step_is_taken_once_and_in_order(denoiser: Denoiser, taken: int) -> None:
    """What is refused changes nothing: the trajectory goes on as if it had not been asked for."""
    expected = Trajectory(denoiser, 0, [0, 1]).run(range(9))
    trajectory = Trajectory(denoiser, 0, [0, 1])
    trajectory.run(range(taken))
    for index, timestep in enumerate(denoiser.plan.timesteps):
        if index not in (0, taken):
            assert "is out of order" in refusal(trajectory.denoiser, trajectory, timestep)
    assert "is not in the plan" in refusal(trajectory.denoiser, trajectory, 500.0)
    assert same(trajectory.run(range(taken, 9)), expected)
    assert "the trajectory is complete" in refusal(trajectory.denoiser, trajectory, denoiser.plan.timesteps[-1])


@pytest.mark.parametrize("index", range(1, 9))
def test_a_trajectory_starts_with_the_first_step(denoiser: Denoiser, index: int) -> None:
    trajectory = Trajectory(denoiser, 0, [0, 1])
    message = refusal(trajectory.denoiser, trajectory, denoiser.plan.timesteps[index])
    assert "timestep 888 comes next" in message


@pytest.mark.parametrize("taken", [1, 3, 8])
@pytest.mark.parametrize("labels", [[0, 1, 2], [0]])
def test_another_shape_midway_is_refused(denoiser: Denoiser, taken: int, labels: list[int]) -> None:
    expected = Trajectory(denoiser, 0, [0, 1]).run(range(9))
    trajectory, other = Trajectory(denoiser, 0, [0, 1]), Trajectory(denoiser, 1, labels)
    trajectory.run(range(taken))
    message = refusal(trajectory.denoiser, other, denoiser.plan.timesteps[taken])
    assert "this trajectory began with" in message
    assert same(trajectory.run(range(taken, 9)), expected)


def test_guidance_halves_that_take_turns_need_a_request_each(denoiser: Denoiser) -> None:
    """In one, the second half starts the trajectory anew, and is refused as soon as the first one goes on."""
    conditional, null = Trajectory(denoiser, 0, [0, 1]), Trajectory(denoiser, 0, [5, 5])
    apart = [Trajectory(denoiser, 0, labels).run(range(9)) for labels in ([0, 1], [5, 5])]
    for index in range(9):
        conditional.step(index)
        null.step(index)
    assert same(conditional.predictions, apart[0])
    assert same(null.predictions, apart[1])
    null.denoiser = conditional.denoiser
    conditional.step(0)
    null.step(0)
    null.step(1)
    assert "777 is out of order" in refusal(conditional.denoiser, conditional, denoiser.plan.timesteps[1])


def test_a_host_that_calls_twice_a_step_is_refused(denoiser: Denoiser) -> None:
    """As Heun's method does at every step but the last, and PNDM while it warms up."""
    trajectory = Trajectory(denoiser, 0, [0, 1])
    trajectory.run(range(2))
    assert "777 is out of order; timestep 666 comes next" in refusal(trajectory.denoiser, trajectory, 777.0)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize("schedule", ["RFRFRFFRR", "RRRRRRRRR"])
def test_a_plan_that_reuses_before_it_computes_is_an_error(bundle: Bundle, backend: str, schedule: str) -> None:
    plan = bundle.plan.with_variants(["full" if letter == "F" else "reuse" for letter in schedule])
    trajectory = Trajectory(Denoiser(runner_of(bundle, backend, 1), plan, bundle.spec), 0, [0, 1])
    message = refusal(trajectory.denoiser, trajectory, 888.0)
    assert "variant 'reuse' reuses 'cache_0" in message
    assert "before any step computed it" in message
    assert "timestep 888 comes next" in refusal(trajectory.denoiser, trajectory, 777.0)


class Failing:
    """A backend that fails at some calls, before it does anything."""

    def __init__(self, runner: Runner, calls: set[int]) -> None:
        self._runner, self._failing, self._calls = runner, calls, 0

    def run(self, call: Call) -> Array:
        self._calls += 1
        if self._calls - 1 in self._failing:
            raise MemoryError
        return self._runner.run(call)


@pytest.mark.parametrize("failing", [0, 1, 5])
def test_a_step_that_failed_was_not_taken(bundle: Bundle, failing: int) -> None:
    """It can be tried again; going on without it would reuse what it should have computed."""
    runner = runner_of(bundle, "torch")
    expected = Trajectory(Denoiser(runner, bundle.plan, bundle.spec), 0, [0, 1]).run(range(9))
    trajectory = Trajectory(Denoiser(runner, bundle.plan, bundle.spec), 0, [0, 1])
    trajectory.denoiser = Denoiser(Failing(runner, {failing}), bundle.plan, bundle.spec)
    trajectory.run(range(failing))
    with pytest.raises(MemoryError):
        trajectory.step(failing)
    assert "is out of order" in refusal(trajectory.denoiser, trajectory, bundle.plan.timesteps[failing + 1])
    assert same(trajectory.run(range(failing, 9)), expected)


@pytest.mark.parametrize("scheduler", ["heun", "pndm"])
def test_schedulers_with_extra_calls_are_refused_before_anything_is_sampled(
    tiny_model: LoadedModel, tmp_path: Path, scheduler: str
) -> None:
    with pytest.raises(UsageError, match="calls the denoiser twice at one timestep") as caught:
        compile_model(tiny_model, Recipe().override(scheduler=scheduler, steps=6, cache="interval=3"), tmp_path / "out")
    assert "ddim" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())
