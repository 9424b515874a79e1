"""calibrate with a selection: the latents that computing steps were given, and what goes with each."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.facts import CalibrationSet, Ranges, Reference
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.calibration._selection import METHODS
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import calibration_conditions, calibration_noise, sample_calibration
from qcgraph.sampling.loop import TakenStep
from qcgraph.sampling.runner import Array

Run = Callable[[str, Program], Program]
COUNT, COMPUTING = 5, (0, 3, 6)  # trajectories; steps of the cached program that compute

every_method = pytest.mark.parametrize("method", METHODS)


def selected(program: Program, run: Run, options: str) -> CalibrationSet:
    return run(f"calibrate{{trajectories={COUNT} {options}}}", program).facts[CalibrationSet]


def latents_of(found: CalibrationSet, program: Program) -> Array:
    raw = np.frombuffer(base64.b64decode(found.latents), dtype="<f4")
    return raw.reshape(-1, *program.facts[ModelSpec].latent_shape)


def given(program: Program, steps: Sequence[int], seed: int = 0) -> dict[tuple[int, int], Array]:
    """What steps were given on the trajectories of a calibration, by step and trajectory."""
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    seen = [calibration_noise(COUNT, seed, spec).initial()]

    def keep(taken: TakenStep) -> None:
        seen.append(taken.after)

    sample_calibration(TorchRunner(program), plan, spec, COUNT, seed, observe=keep)
    return {(step, index): seen[step][index] for step in steps for index in range(COUNT)}


def check_items(found: CalibrationSet, program: Program, steps: Sequence[int], seed: int = 0) -> None:
    """Every item is the latent of another trajectory or step, with the class of that trajectory."""
    pool = given(program, steps, seed)
    spec = program.facts[ModelSpec]
    labels = calibration_conditions(COUNT, seed, spec).labels(spec)
    latents, taken = latents_of(found, program), set()
    assert len(latents) == len(found.steps) == len(found.conditions["class_label"])
    for latent, step, label in zip(latents, found.steps, found.conditions["class_label"], strict=True):
        distances = {index: np.abs(pool[step, index] - latent).max() for index in range(COUNT)}
        trajectory = min(distances, key=distances.__getitem__)
        np.testing.assert_allclose(latent, pool[step, trajectory], rtol=1e-5, atol=1e-5)
        assert label == labels[trajectory]
        taken.add((step, trajectory))
    assert len(taken) == len(latents)


def test_there_is_no_set_unless_it_is_asked_for(cached: Program, run: Run) -> None:
    for options in ("", "selection=none", "selection=none latents=7"):
        assert CalibrationSet not in run(f"calibrate{{trajectories={COUNT} {options}}}", cached).facts


def test_ranges_and_reference_are_those_without_a_set(cached: Program, run: Run) -> None:
    plain, chosen = (
        run(f"calibrate{{trajectories={COUNT} selection={name}}}", cached).facts for name in ("none", "tap")
    )
    assert chosen[Ranges] == plain[Ranges]
    assert chosen[Reference] == plain[Reference]


def test_calibrate_selection_golden(cached: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("calibrate-selection", cached, run("calibrate{trajectories=3 selection=uniform latents=7}", cached))


@every_method
def test_items_are_latents_of_computing_steps(cached: Program, run: Run, method: str) -> None:
    found = selected(cached, run, f"selection={method} latents=11")
    assert found.method == method
    assert found.pool == COUNT * len(COMPUTING)
    assert set(found.steps) <= set(COMPUTING)
    check_items(found, cached, COMPUTING)


@every_method
def test_without_a_cache_they_are_of_all_steps(captured: Program, run: Run, method: str) -> None:
    found = selected(captured, run, f"selection={method} latents=20")
    assert found.pool == COUNT * 9
    assert set(found.steps) > set(COMPUTING)
    check_items(found, captured, range(9))


def test_latents_are_those_of_the_cached_trajectory(captured: Program, cached: Program, run: Run) -> None:
    """Not those of full precision: from the second computing step on the two differ."""
    options = f"selection=uniform latents={COUNT * len(COMPUTING)}"
    pools = [given(program, COMPUTING) for program in (cached, captured)]
    assert np.array_equal(pools[0][0, 0], pools[1][0, 0])
    assert np.abs(pools[0][6, 0] - pools[1][6, 0]).max() > 1e-2
    check_items(selected(cached, run, options), cached, COMPUTING)


def test_a_variant_that_computes_a_part_does_not_count(captured: Program, run: Run) -> None:
    """Also where its blocks have ranges of their own at every step."""
    program = run("plan-cache{interval=3 blocks=1..1},insert-cache", captured)
    found = selected(program, run, "selection=random latents=10")
    assert set(found.steps) <= set(COMPUTING)


def test_uniform_is_of_all_computing_steps_alike(cached: Program, run: Run) -> None:
    found = selected(cached, run, "selection=uniform latents=9")
    assert found.steps == (0, 0, 0, 3, 3, 3, 6, 6, 6)


@every_method
@pytest.mark.parametrize(("samples", "expected"), [(1, 1), (7, 7), (15, 15), (1000, 15)])
def test_as_many_as_asked_for_and_there_are(
    cached: Program, run: Run, method: str, samples: int, expected: int
) -> None:
    found = selected(cached, run, f"selection={method} latents={samples}")
    assert len(found.steps) == len(found.conditions["class_label"]) == len(latents_of(found, cached)) == expected


def test_by_default_a_small_model_affords_many(captured: Program, run: Run) -> None:
    found = run("calibrate{trajectories=12 selection=random}", captured).facts[CalibrationSet]
    assert len(found.steps) == found.pool == 12 * 9


def test_the_same_twice(cached: Program, run: Run) -> None:
    options = "selection=tap latents=8"
    assert selected(cached, run, options) == selected(cached, run, options)


def test_the_seed_decides(cached: Program, run: Run) -> None:
    first, other = (selected(cached, run, f"selection=random latents=8 seed={seed}") for seed in (0, 3))
    assert first.latents != other.latents
    check_items(other, cached, COMPUTING, seed=3)


def test_batches_of_trajectories_change_nothing(cached: Program, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = selected(cached, run, "selection=uniform latents=15")
    monkeypatch.setattr("qcgraph.passes.calibration.calibrate.trajectories_together", lambda program: 2)
    parts = selected(cached, run, "selection=uniform latents=15")
    assert (parts.steps, parts.conditions) == (whole.steps, whole.conditions)
    np.testing.assert_allclose(latents_of(parts, cached), latents_of(whole, cached), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"), [("selection=best", "selection"), ("selection=tap latents=-1", "latents -1")]
)
def test_bad_options(cached: Program, run: Run, options: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        selected(cached, run, options)
