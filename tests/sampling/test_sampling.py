"""Sampling: noise, guidance, and the rules of a request's state."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qcgraph.errors import BundleError, UsageError
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Request, Sampler, sample
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Call, step_call, step_inputs


@pytest.fixture(scope="module")
def cached(captured: Program) -> Program:
    return Pipeline.parse("plan-cache{interval=3},insert-cache").run(captured)


def parts(program: Program) -> tuple[TorchRunner, StepPlan, ModelSpec]:
    return TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec]


def test_a_samples_noise_does_not_depend_on_its_batch() -> None:
    together = Noise(3, range(4), (2, 2))
    alone = Noise(3, [2], (2, 2))
    for _ in range(3):
        assert np.array_equal(together.next()[2:3], alone.next())


def test_seeds_and_indices_give_different_noise() -> None:
    draws = [Noise(seed, [index], (8,)).initial() for seed in (0, 1) for index in (0, 1)]
    assert len({draw.tobytes() for draw in draws}) == 4


def test_the_batch_size_does_not_change_the_samples(captured: Program) -> None:
    runner, plan, spec = parts(captured)
    whole = sample(runner, plan, spec, [0, 1, 2, 3, 4], seed=1)
    split = sample(runner, plan, spec, [0, 1, 2, 3, 4], seed=1, batch=2)
    np.testing.assert_allclose(split, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.5])
def test_guidance_is_its_formula(captured: Program, weight: float) -> None:
    runner, plan, spec = parts(captured)
    plan = StepPlan(replace(plan.fingerprint, guidance=weight), plan.steps[:1])
    latent = Noise(0, range(2), spec.latent_shape).initial()

    def denoise(labels: list[int]) -> np.ndarray:
        return runner.run(step_call(plan, 0, step_inputs(plan, spec, 0, latent, told(labels)), {}))[:, :2]

    conditional, null = denoise([1, 4]), denoise([5, 5])
    update = plan.steps[0].update
    expected = update.latent * latent + update.noise_prediction * (null + weight * (conditional - null))
    np.testing.assert_allclose(sample(runner, plan, spec, [1, 4], seed=0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("labels", "message"), [([], "nothing to sample"), ([5], "class 5"), ([-1], "class -1")])
def test_bad_labels(captured: Program, labels: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        sample(*parts(captured), labels, seed=0)
    assert caught.value.hint


def test_nothing_to_sample(captured: Program) -> None:
    with pytest.raises(UsageError, match="nothing to sample"):
        sample(*parts(captured), Conditions(0, {}), seed=0)


@pytest.mark.parametrize(
    "seed", [-1, 2**64, 10**5000, -(10**5000), 1.0, True, "1", None], ids=lambda seed: str(type(seed))
)
def test_a_seed_that_is_none_is_refused(captured: Program, seed: Any) -> None:
    with pytest.raises(UsageError, match="seed") as caught:
        sample(*parts(captured), [0], seed=seed)
    assert "smaller than 2^64" in str(caught.value.hint)


def told(labels: Any) -> Conditions:
    return Conditions(len(labels), {"class_label": np.asarray(labels)})


def walk(request: Request, plan: StepPlan, latent: np.ndarray, steps: int | None = None) -> list[np.ndarray]:
    conditions = told(np.arange(len(latent)))
    return [request.denoise(index, latent, conditions) for index in range(len(plan))[:steps]]


def latents(seed: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 2, 8, 8), dtype=np.float32)


def test_interleaved_requests_equal_separate_ones(cached: Program) -> None:
    runner, plan, spec = parts(cached)
    apart = [walk(Request(runner, plan, spec), plan, latents(seed)) for seed in (0, 1)]
    requests = [Request(runner, plan, spec), Request(runner, plan, spec)]
    for index in range(len(plan)):
        for seed in (0, 1):
            result = requests[seed].denoise(index, latents(seed), told(range(2)))
            assert np.array_equal(result, apart[seed][index])


def test_the_first_timestep_starts_anew_after_an_aborted_trajectory(cached: Program) -> None:
    runner, plan, spec = parts(cached)
    request = Request(runner, plan, spec)
    walk(request, plan, latents(0), steps=5)
    again = walk(request, plan, latents(1, batch=3))
    for one, other in zip(again, walk(Request(runner, plan, spec), plan, latents(1, batch=3)), strict=True):
        assert np.array_equal(one, other)


def test_steps_come_in_order_and_once(cached: Program) -> None:
    runner, plan, spec = parts(cached)
    request = Request(runner, plan, spec)
    with pytest.raises(BundleError, match="out of order; timestep 888 comes next"):
        request.denoise(1, latents(0), told(range(2)))
    walk(request, plan, latents(0), steps=2)
    with pytest.raises(BundleError, match="out of order"):
        request.denoise(1, latents(0), told(range(2)))
    with pytest.raises(BundleError, match="is not in the plan"):
        plan.index_of(999.0)


def test_the_shape_stays_the_same_within_a_trajectory(cached: Program) -> None:
    runner, plan, spec = parts(cached)
    request = Request(runner, plan, spec)
    walk(request, plan, latents(0), steps=1)
    with pytest.raises(BundleError, match="this trajectory began with"):
        request.denoise(1, latents(0, batch=4), told(range(4)))


@pytest.mark.parametrize("classes", [[7, 1], [1, 0], [0, 0]])
def test_the_classes_stay_the_same_within_a_trajectory(cached: Program, classes: list[int]) -> None:
    runner, plan, spec = parts(cached)
    expected = walk(Request(runner, plan, spec), plan, latents(0))
    request = Request(runner, plan, spec)
    found = walk(request, plan, latents(0), steps=1)
    with pytest.raises(
        BundleError, match=r"sample \d has class_label \d, this trajectory began with class_label \d there"
    ) as caught:
        request.denoise(1, latents(0), told(classes))
    assert "the order of a batch" in str(caught.value.hint)
    found += [request.denoise(index, latents(0), told(range(2))) for index in range(1, len(plan))]
    assert all(map(np.array_equal, found, expected))


class Breaking(TorchRunner):
    """A backend that breaks off once, after it has remembered what it computed."""

    breaks: BaseException | None = None

    def run(self, call: Call) -> np.ndarray:
        result = super().run(call)
        if self.breaks is not None:
            error, self.breaks = self.breaks, None
            raise error
        return result


def test_an_interrupted_trajectory_is_started_anew(cached: Program) -> None:
    runner, plan, spec = Breaking(cached), cached.facts[StepPlan], cached.facts[ModelSpec]
    expected = walk(Request(runner, plan, spec), plan, latents(0))
    request = Request(runner, plan, spec)
    walk(request, plan, latents(0), steps=3)
    runner.breaks = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        request.denoise(3, latents(0), told(range(2)))
    assert request.taken == 0
    for index in (3, 4):
        with pytest.raises(BundleError, match="the trajectory was interrupted in a step") as caught:
            request.denoise(index, latents(0), told(range(2)))
        assert "anew with the first timestep of the plan, 888" in str(caught.value.hint)
    assert all(map(np.array_equal, walk(request, plan, latents(0)), expected))


def test_a_step_that_failed_is_retried_to_the_last_bit(captured: Program) -> None:
    """Also where its modulation was prepared together with that of the steps after it."""
    program = Pipeline.parse("plan-cache{interval=3},insert-cache,hoist-adaln").run(captured)
    _, plan, spec = parts(program)
    assert plan.preparing
    expected = walk(Request(TorchRunner(program), plan, spec), plan, latents(0))
    runner, found = Failing(program), []
    request = Request(runner, plan, spec)
    for index, step in enumerate(plan.steps):
        runner.fails = step.variant
        with pytest.raises(MemoryError):
            request.denoise(index, latents(0), told(range(2)))
        found.append(request.denoise(index, latents(0), told(range(2))))
    assert all(map(np.array_equal, found, expected))


class Failing(TorchRunner):
    """A backend that fails at the next run of a variant."""

    fails = ""

    def run(self, call: Call) -> np.ndarray:
        if call.variant == self.fails:
            self.fails = ""
            raise MemoryError
        return super().run(call)


def test_reuse_before_compute_is_an_error(cached: Program) -> None:
    runner, plan, spec = parts(cached)
    inputs = step_inputs(plan, spec, 1, latents(0), told(range(2)))
    with pytest.raises(BundleError, match="reuses 'cache_0' before any step computed it"):
        runner.run(step_call(plan, 1, inputs, {}))


def test_a_runner_gets_what_the_plan_says(captured: Program) -> None:
    seen: list[tuple[str, int, int, int]] = []

    class Recorder:
        def run(self, call: Call) -> np.ndarray:
            seen.append((call.variant, call.index, int(call.inputs["group"]), int(call.inputs["row"])))
            return np.zeros_like(call.inputs["latent"])

    plan = captured.facts[StepPlan].with_groups([0, 0, 0, 1, 1, 1, 2, 2, 2])
    sample(Recorder(), plan, captured.facts[ModelSpec], [0], seed=0)
    assert seen == [("main", index, index // 3, index) for index in range(9)]


def plan_of(*updates: Update) -> StepPlan:
    steps = tuple(Step(float(len(updates) - index), update) for index, update in enumerate(updates))
    return StepPlan(Fingerprint("m", "made up", len(steps), 1.0), steps)


def test_an_update_takes_what_it_looks_back_to() -> None:
    """In order, the latest first; a step that does not look back changes nothing for the ones after it."""
    two_back = Update(1.0, 0.5, 0.25, (Earlier(2.0, -1.0), Earlier(-3.0, 4.0)))
    plan = plan_of(Update(1.0, 2.0), Update(1.0, -0.5, 0.0, (Earlier(0.5, 0.25),)), Update(1.0, 1.0), two_back)
    noise, same = Noise(0, [0], (2,)), Noise(0, [0], (2,))
    sampler = Sampler(plan, noise)
    x = [np.array([value], dtype=np.float32) for value in ([1, 2], [3, 5], [7, 11], [13, 17])]
    eps = [np.array([value], dtype=np.float32) for value in ([19, 23], [29, 31], [37, 41], [43, 47])]
    found = [sampler.update(index, *inputs) for index, inputs in enumerate(zip(x, eps, strict=True))]
    assert all(result.dtype == np.float32 for result in found)
    assert np.array_equal(found[0], x[0] + 2 * eps[0])
    assert np.array_equal(found[1], x[1] - 0.5 * eps[1] + 0.5 * x[0] + 0.25 * eps[0])
    assert np.array_equal(found[2], x[2] + eps[2])
    expected = x[3] + 0.5 * eps[3] + 2 * x[2] - eps[2] - 3 * x[1] + 4 * eps[1] + np.float32(0.25) * same.next()
    np.testing.assert_allclose(found[3], expected, rtol=1e-6)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_no_more_is_kept_than_the_plan_looks_back_to(depth: int) -> None:
    deepest = Update(1.0, 1.0, 0.0, (Earlier(1.0, 1.0),) * depth)
    plan = plan_of(Update(1.0, 1.0), Update(1.0, 1.0), deepest, Update(1.0, 1.0), Update(1.0, 1.0))
    sampler = Sampler(plan, Noise(0, [0], (2,)))
    kept: list[weakref.ref[np.ndarray]] = []
    for index in range(len(plan)):
        latent, prediction = np.zeros((1, 2), dtype=np.float32), np.zeros((1, 2), dtype=np.float32)
        kept.append(weakref.ref(latent))
        sampler.update(index, latent, prediction)
        del latent, prediction
        assert sum(reference() is not None for reference in kept) <= depth


def test_an_update_whose_history_is_not_known_is_refused() -> None:
    plan = plan_of(Update(1.0, 1.0), Update(1.0, 1.0, 0.0, (Earlier(1.0, 1.0),)))
    sampler, zeros = Sampler(plan, Noise(0, [0], (2,))), np.zeros((1, 2), dtype=np.float32)
    with pytest.raises(BundleError, match="at timestep 1 looks back 1 steps, 0 are known") as caught:
        sampler.update(1, zeros, zeros)
    assert "first timestep" in str(caught.value.hint)
    sampler.update(0, zeros, zeros)
    sampler.update(1, zeros, zeros)
