"""Sampling: noise, guidance, and the rules of a request's state."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import pytest

from qcgraph.errors import BundleError, UsageError
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update
from qcgraph.sampling.loop import Request, Sampler, sample
from qcgraph.sampling.noise import Noise


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
    from dataclasses import replace

    runner, plan, spec = parts(captured)
    plan = StepPlan(replace(plan.fingerprint, guidance=weight), plan.steps[:1])
    latent = Noise(0, range(2), spec.latent_shape).initial()
    timestep = np.full(2, plan.steps[0].timestep, dtype=np.float32)

    def denoise(labels: list[int]) -> np.ndarray:
        inputs = {"latent": latent, "timestep": timestep, "class_label": np.array(labels)}
        return runner.run("main", inputs, {})[:, :2]

    conditional, null = denoise([1, 4]), denoise([5, 5])
    update = plan.steps[0].update
    expected = update.latent * latent + update.noise_prediction * (null + weight * (conditional - null))
    np.testing.assert_allclose(sample(runner, plan, spec, [1, 4], seed=0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("labels", "message"), [([], "nothing to sample"), ([5], "class 5"), ([-1], "class -1")])
def test_bad_labels(captured: Program, labels: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        sample(*parts(captured), labels, seed=0)
    assert caught.value.hint


@pytest.mark.parametrize(
    "seed", [-1, 2**64, 10**5000, -(10**5000), 1.0, True, "1", None], ids=lambda seed: str(type(seed))
)
def test_a_seed_that_is_none_is_refused(captured: Program, seed: Any) -> None:
    with pytest.raises(UsageError, match="seed") as caught:
        sample(*parts(captured), [0], seed=seed)
    assert "smaller than 2^64" in str(caught.value.hint)


def walk(request: Request, plan: StepPlan, latent: np.ndarray, steps: int | None = None) -> list[np.ndarray]:
    labels = np.arange(len(latent))
    return [request.denoise(latent, step.timestep, labels) for step in plan.steps[:steps]]


def latents(seed: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 2, 8, 8), dtype=np.float32)


def test_interleaved_requests_equal_separate_ones(cached: Program) -> None:
    runner, plan, _ = parts(cached)
    apart = [walk(Request(runner, plan), plan, latents(seed)) for seed in (0, 1)]
    requests = [Request(runner, plan), Request(runner, plan)]
    for index, step in enumerate(plan.steps):
        for seed in (0, 1):
            result = requests[seed].denoise(latents(seed), step.timestep, np.arange(2))
            assert np.array_equal(result, apart[seed][index])


def test_the_first_timestep_starts_anew_after_an_aborted_trajectory(cached: Program) -> None:
    runner, plan, _ = parts(cached)
    request = Request(runner, plan)
    walk(request, plan, latents(0), steps=5)
    again = walk(request, plan, latents(1, batch=3))
    for one, other in zip(again, walk(Request(runner, plan), plan, latents(1, batch=3)), strict=True):
        assert np.array_equal(one, other)


def test_steps_come_in_order_and_once(cached: Program) -> None:
    runner, plan, _ = parts(cached)
    request = Request(runner, plan)
    with pytest.raises(BundleError, match="out of order; timestep 888 comes next"):
        request.denoise(latents(0), plan.timesteps[1], np.arange(2))
    walk(request, plan, latents(0), steps=2)
    with pytest.raises(BundleError, match="out of order"):
        request.denoise(latents(0), plan.timesteps[1], np.arange(2))
    with pytest.raises(BundleError, match="is not in the plan"):
        request.denoise(latents(0), 999.0, np.arange(2))


def test_the_shape_stays_the_same_within_a_trajectory(cached: Program) -> None:
    runner, plan, _ = parts(cached)
    request = Request(runner, plan)
    walk(request, plan, latents(0), steps=1)
    with pytest.raises(BundleError, match="this trajectory began with"):
        request.denoise(latents(0, batch=4), plan.timesteps[1], np.arange(4))


@pytest.mark.parametrize("classes", [[7, 1], [1, 0], [0, 0]])
def test_the_classes_stay_the_same_within_a_trajectory(cached: Program, classes: list[int]) -> None:
    runner, plan, _ = parts(cached)
    expected = walk(Request(runner, plan), plan, latents(0))
    request = Request(runner, plan)
    found = walk(request, plan, latents(0), steps=1)
    with pytest.raises(
        BundleError, match=r"sample \d has class \d, this trajectory began with class \d there"
    ) as caught:
        request.denoise(latents(0), plan.timesteps[1], np.array(classes))
    assert "the order of a batch" in str(caught.value.hint)
    found += [request.denoise(latents(0), step.timestep, np.arange(2)) for step in plan.steps[1:]]
    assert all(map(np.array_equal, found, expected))


class Breaking(TorchRunner):
    """A backend that breaks off once, after it has remembered what it computed."""

    breaks: BaseException | None = None

    def run(self, variant: str, inputs: Mapping[str, np.ndarray], state: MutableMapping[str, object]) -> np.ndarray:
        result = super().run(variant, inputs, state)
        if self.breaks is not None:
            error, self.breaks = self.breaks, None
            raise error
        return result


def test_an_interrupted_trajectory_is_started_anew(cached: Program) -> None:
    runner, plan = Breaking(cached), cached.facts[StepPlan]
    expected = walk(Request(runner, plan), plan, latents(0))
    request = Request(runner, plan)
    walk(request, plan, latents(0), steps=3)
    runner.breaks = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        request.denoise(latents(0), plan.timesteps[3], np.arange(2))
    assert request.taken == 0
    for index in (3, 4):
        with pytest.raises(BundleError, match="the trajectory was interrupted in a step") as caught:
            request.denoise(latents(0), plan.timesteps[index], np.arange(2))
        assert "anew with the first timestep of the plan, 888" in str(caught.value.hint)
    assert all(map(np.array_equal, walk(request, plan, latents(0)), expected))


def test_a_step_that_failed_is_retried_to_the_last_bit(captured: Program) -> None:
    """Also where its modulation was prepared together with that of the steps after it."""
    program = Pipeline.parse("plan-cache{interval=3},insert-cache,hoist-adaln").run(captured)
    plan = program.facts[StepPlan]
    assert plan.prepared
    expected = walk(Request(TorchRunner(program), plan), plan, latents(0))
    runner, found = Failing(program), []
    request = Request(runner, plan)
    for step in plan.steps:
        runner.fails = step.variant
        with pytest.raises(MemoryError):
            request.denoise(latents(0), step.timestep, np.arange(2))
        found.append(request.denoise(latents(0), step.timestep, np.arange(2)))
    assert all(map(np.array_equal, found, expected))


class Failing(TorchRunner):
    """A backend that fails at the next run of a variant."""

    fails = ""

    def run(self, variant: str, inputs: Mapping[str, np.ndarray], state: MutableMapping[str, object]) -> np.ndarray:
        if variant == self.fails:
            self.fails = ""
            raise MemoryError
        return super().run(variant, inputs, state)


def test_reuse_before_compute_is_an_error(cached: Program) -> None:
    inputs = {"latent": latents(0), "timestep": np.zeros(2, dtype=np.float32), "class_label": np.arange(2)}
    with pytest.raises(BundleError, match="reuses 'cache_0' before any step computed it"):
        TorchRunner(cached).run("reuse", inputs, {})


def test_a_runner_gets_what_the_plan_says(captured: Program) -> None:
    seen: list[tuple[str, int, int]] = []

    class Recorder:
        def run(self, variant: str, inputs: Mapping[str, np.ndarray], state: object) -> np.ndarray:
            seen.append((variant, int(inputs["group"]), int(inputs["row"])))
            return np.zeros_like(inputs["latent"])

    plan = captured.facts[StepPlan].with_groups([0, 0, 0, 1, 1, 1, 2, 2, 2])
    sample(Recorder(), plan, captured.facts[ModelSpec], [0], seed=0)
    assert seen == [("main", index // 3, index) for index in range(9)]


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
    found = [sampler.update(*inputs) for inputs in zip(x, eps, plan.steps, strict=True)]
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
    for step in plan.steps:
        latent, prediction = np.zeros((1, 2), dtype=np.float32), np.zeros((1, 2), dtype=np.float32)
        kept.append(weakref.ref(latent))
        sampler.update(latent, prediction, step)
        del latent, prediction
        assert sum(reference() is not None for reference in kept) <= depth


def test_an_update_whose_history_is_not_known_is_refused() -> None:
    plan = plan_of(Update(1.0, 1.0), Update(1.0, 1.0, 0.0, (Earlier(1.0, 1.0),)))
    sampler, zeros = Sampler(plan, Noise(0, [0], (2,))), np.zeros((1, 2), dtype=np.float32)
    with pytest.raises(BundleError, match="at timestep 1 looks back 1 steps, 0 are known") as caught:
        sampler.update(zeros, zeros, plan.steps[1])
    assert "first timestep" in str(caught.value.hint)
    sampler.update(zeros, zeros, plan.steps[0])
    sampler.update(zeros, zeros, plan.steps[1])
