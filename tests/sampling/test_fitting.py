"""The fit of updates: known coefficients are found, and what is exact already stays as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.fitting import (
    RIDGES,
    FittingUpdater,
    corrected,
    fit_updates,
    judged_rows,
    regressed,
    row_products,
    with_updates,
)
from qcgraph.sampling.loop import Updates
from qcgraph.sampling.runner import Array, Call

SHAPE = (2, 4, 4)
PLAIN = Update(0.9, -0.2)
TRUE = (
    Update(1.1, -0.3),
    Update(0.8, -0.1, history=(Earlier(0.0, 0.05),)),
    Update(1.05, 0.2, history=(Earlier(0.0, -0.4), Earlier(0.0, 0.3))),
    Update(0.7, 0.1, history=(Earlier(0.0, 0.2), Earlier(0.0, -0.1), Earlier(0.0, 0.15))),
)


def plan_of(*updates: Update) -> StepPlan:
    steps = tuple(Step(float(9 - index), update) for index, update in enumerate(updates))
    return StepPlan(Fingerprint("model", "ddim", len(steps), 1.0), steps)


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((*shape, *SHAPE)).astype(np.float32)


def rolled(fitting: FittingUpdater | Updates, initial: Array, predictions: Array) -> list[Array]:
    """The latents after each step, with given predictions."""
    latents = [initial]
    for index, prediction in enumerate(predictions):
        latents.append(fitting.update(index, latents[-1], prediction))
    return latents[1:]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_known_coefficients_are_found(count: int) -> None:
    """Of updates that look back up to three predictions, whatever they start from."""
    initial, predictions = values(count), values(4, count, seed=1)
    targets = rolled(Updates(plan_of(*TRUE)), initial, predictions)
    fitting = FittingUpdater(plan_of(*[PLAIN] * 4), targets, 3)
    found = rolled(fitting, initial, predictions)
    for step, true, latent, target in zip(fitting.fitted, TRUE, found, targets, strict=True):
        update = step.update
        ours = (update.latent, update.noise_prediction, *(term.noise_prediction for term in update.history))
        theirs = (true.latent, true.noise_prediction, *(term.noise_prediction for term in true.history))
        np.testing.assert_allclose(ours[: len(theirs)], theirs, rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours[len(theirs) :], 0, rtol=0, atol=1e-6)
        assert not any(term.latent for term in update.history)
        np.testing.assert_allclose(latent, target, rtol=0, atol=1e-5)
        assert step.ridge <= 1e-6
        assert step.error < 1e-5 < step.plain_error


@pytest.mark.parametrize("history", [0, 1, 2])
def test_no_update_looks_back_further_than_it_may(history: int) -> None:
    initial, predictions = values(4), values(4, 4, seed=1)
    targets = rolled(Updates(plan_of(*TRUE)), initial, predictions)
    fitting = FittingUpdater(plan_of(*[PLAIN] * 4), targets, history)
    rolled(fitting, initial, predictions)
    lengths = [len(step.update.history) for step in fitting.fitted]
    assert lengths == [min(index, history) for index in range(4)]


@pytest.mark.parametrize("history", [0, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_updates_that_meet_their_targets_stay_to_the_bit(count: int, history: int) -> None:
    """Those with contributions of earlier latents, too, and those that look back further than a fit may."""
    plain = (TRUE[0], TRUE[1], Update(1.05, 0.2, history=(Earlier(0.1, -0.4), Earlier(0.3, 0.3))), TRUE[3])
    initial, predictions = values(count), values(4, count, seed=1)
    targets = rolled(Updates(plan_of(*plain)), initial, predictions)
    fitting = FittingUpdater(plan_of(*plain), targets, history)
    found = rolled(fitting, initial, predictions)
    assert tuple(step.update for step in fitting.fitted) == plain
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, targets, strict=True))
    assert {(step.ridge, step.error, step.plain_error) for step in fitting.fitted} == {(math.inf, 0.0, 0.0)}


def test_every_step_starts_where_the_fitted_ones_before_it_led() -> None:
    """A target that cannot be met leaves an error, which the next step makes up for as far as it can."""
    initial, predictions = values(8), values(2, 8, seed=1)
    first, second = 0.5 * initial + values(8, seed=2), initial
    fitting = FittingUpdater(plan_of(PLAIN, PLAIN), [first, second], 1)
    after = fitting.update(0, initial, predictions[0])
    np.testing.assert_allclose(
        after,
        fitting.fitted[0].update.latent * initial + fitting.fitted[0].update.noise_prediction * predictions[0],
        rtol=1e-6,
        atol=1e-6,
    )
    fitting.update(1, after, predictions[1])
    terms = np.stack([part.ravel() for part in (after, predictions[1], predictions[0])]).astype(np.float64)
    expected = np.linalg.lstsq(terms.T, second.ravel().astype(np.float64), rcond=None)[0]
    update = fitting.fitted[1].update
    ours = (update.latent, update.noise_prediction, update.history[0].noise_prediction)
    assert fitting.fitted[1].ridge < math.inf
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3 * fitting.fitted[1].ridge)


def test_trajectories_that_are_left_out_follow_and_teach_nothing() -> None:
    initial, predictions = values(6), values(3, 6, seed=1)
    targets = rolled(Updates(plan_of(*TRUE[:3])), initial, predictions)
    learned = np.arange(6) < 4
    misled = [np.where(learned[:, None, None, None], target, -target) for target in targets]
    fits = [FittingUpdater(plan_of(*[PLAIN] * 3), aims, 3, learned) for aims in (targets, misled)]
    results = [rolled(fitting, initial, predictions)[-1] for fitting in fits]
    assert fits[0].fitted == fits[1].fitted
    assert np.array_equal(*results)
    np.testing.assert_allclose(results[0], targets[-1], rtol=0, atol=1e-5)


def test_a_fit_that_misleads_is_not_taken() -> None:
    """The trajectory that is left out has the opposite error: the plain update is the best for it."""
    terms, residual = values(2, 4), np.zeros((4, *SHAPE), np.float32)
    residual[:3], residual[3] = 0.1 * terms[0, :3], -0.1 * terms[0, 3]
    coefficients, ridge, (error, plain) = regressed(list(terms), residual)
    assert ridge == math.inf
    assert not coefficients.any()
    assert error == plain == pytest.approx(float(np.sqrt(np.square(residual[3], dtype=np.float64).mean())))
    update = corrected(PLAIN, coefficients)
    assert update == PLAIN


def test_a_ridge_in_between_is_chosen_where_terms_are_nearly_equal() -> None:
    """Two terms that differ by noise alone have large coefficients without a ridge, which fit no other trajectory."""
    draw = np.random.default_rng(3)
    base = draw.standard_normal((4, *SHAPE))
    terms = [(base + 1e-3 * draw.standard_normal(base.shape)).astype(np.float32) for _ in range(2)]
    residual = (0.2 * base + 0.3 * draw.standard_normal(base.shape)).astype(np.float32)
    coefficients, ridge, (error, plain) = regressed(terms, residual)
    assert min(RIDGES) < ridge < math.inf
    assert np.abs(coefficients).max() < 0.5
    assert error < plain


def test_coefficients_are_fitted_to_all_trajectories() -> None:
    """Those that were left out to choose the ridge take part at last."""
    terms, noise = values(2, 4), 0.01 * values(4, seed=4)
    residual = (0.3 * terms[0] - 0.2 * terms[1] + noise).astype(np.float32)
    coefficients, ridge, _ = regressed(list(terms), residual)
    flat = terms.reshape(2, -1).astype(np.float64)
    expected = np.linalg.lstsq(flat.T, residual.ravel().astype(np.float64), rcond=None)[0]
    assert ridge < math.inf
    np.testing.assert_allclose(coefficients, expected, atol=2 * ridge)


@pytest.mark.parametrize(
    ("count", "judged"), [(1, [0]), (2, [1]), (3, [2]), (4, [3]), (5, [3]), (8, [3, 7]), (9, [3, 7])]
)
def test_one_of_four_trajectories_is_left_out(count: int, judged: list[int]) -> None:
    """At least one; of one alone, that one."""
    assert np.flatnonzero(judged_rows(count)).tolist() == judged


def test_a_single_trajectory_is_fitted_to_and_judged() -> None:
    terms = list(values(2, 1))
    coefficients, ridge, (error, plain) = regressed(terms, (0.25 * terms[0] - 0.5 * terms[1]).astype(np.float32))
    np.testing.assert_allclose(coefficients, [0.25, -0.5], atol=1e-6)
    assert ridge == min(RIDGES)
    assert error < 1e-6 < plain


def test_products_are_those_of_the_chosen_rows() -> None:
    terms, rows = values(3, 4), np.array([True, False, True, False])
    expected = np.einsum("anchw,bnchw->ab", *[terms[:, rows].astype(np.float64)] * 2)
    np.testing.assert_allclose(row_products(list(terms), rows), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("plain", "correction", "expected"),
    [
        (PLAIN, [0.5, 0.25], Update(1.4, 0.05)),
        (PLAIN, [0.0, 0.0, 0.5], Update(0.9, -0.2, 0.0, (Earlier(0.0, 0.5),))),
        (PLAIN, [0.0, 0.0, 0.5, 0.0], Update(0.9, -0.2, 0.0, (Earlier(0.0, 0.5),))),
        (
            Update(1, 1, 0.0, (Earlier(0.5, 0.25), Earlier(0.125, 1))),
            [0, 0, 1],
            Update(1, 1, 0.0, (Earlier(0.5, 1.25), Earlier(0.125, 1))),
        ),
    ],
)
def test_a_correction_is_added(plain: Update, correction: list[float], expected: Update) -> None:
    found = corrected(plain, np.array(correction))
    assert (found.latent, found.noise_prediction) == pytest.approx((expected.latent, expected.noise_prediction))
    assert found.history == expected.history


def test_only_updates_are_replaced() -> None:
    plan = plan_of(PLAIN, PLAIN)
    found = with_updates(plan, TRUE[:2])
    assert tuple(step.update for step in found.steps) == TRUE[:2]
    assert with_updates(found, [PLAIN, PLAIN]) == plan


@dataclass(frozen=True)
class LinearRunner:
    """A backend that predicts a multiple of the latent for each step."""

    gains: tuple[float, ...]

    def run(self, call: Call) -> Array:
        return np.float32(self.gains[call.index]) * np.asarray(call.inputs["latent"], np.float32)


def test_a_fit_walks_the_plan_on_a_backend() -> None:
    """The latents are multiples of the noise: the final ones are the target, and the plan with the fit leads there."""
    spec = ModelSpec("linear", SHAPE, SHAPE[0], ())
    plan, initial = plan_of(PLAIN, PLAIN, PLAIN), values(5)
    targets = [np.float32(factor) * initial for factor in (0.8, 0.5, 0.3)]
    runner, conditions = LinearRunner((1.0, 0.5, 0.25)), Conditions(5, {})
    fitted, run = fit_updates(runner, plan, spec, conditions, initial, targets, 2, Progress())
    assert (len(run.latents), len(run.predictions)) == (4, 3)
    assert np.array_equal(run.latents[0], initial)
    np.testing.assert_allclose(run.latents[-1], targets[-1], rtol=1e-5)
    assert len(fitted) == 3
    updates = Updates(with_updates(plan, [step.update for step in fitted]))
    latent = initial
    for index, gain in enumerate(runner.gains):
        latent = updates.update(index, latent, np.float32(gain) * latent)
        assert np.array_equal(latent, run.latents[index + 1])
    assert replace(plan, steps=plan.steps) == plan
