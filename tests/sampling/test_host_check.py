"""A host that samples as the plan does is told from one that does not, by the latents it comes back with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcgraph.errors import BundleError
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.host_check import HALF_TOLERANCES, TOLERANCE, Form, HostCheck, form_of
from qcgraph.sampling.loop import Sampler, Updates
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Array

SPEC = ModelSpec.class_conditional("made-up", (2, 4, 4), 5, 5, output_channels=4)
PLAIN = [Update(0.9, 0.3), Update(0.95, 0.2), Update(0.98, 0.1)]
WITH_HISTORY = [Update(0.9, 0.3), Update(0.95, 0.2, 0.0, (Earlier(0.1, -0.05),)), Update(0.98, 0.1)]


def plan_of(updates: list[Update], guidance: float = 1.5) -> StepPlan:
    steps = tuple(Step(float(len(updates) - index), update) for index, update in enumerate(updates))
    return StepPlan(Fingerprint("m", "ddim", len(steps), guidance), steps)


def told(*labels: int) -> Conditions:
    return Conditions(len(labels), {"class_label": np.array(labels)})


def drawn(seed: int, count: int, channels: int = 2) -> Array:
    return np.random.default_rng(seed).standard_normal((count, channels, 4, 4), dtype=np.float32)


ORDERS = {"conditional first": [0, 1, 2, 3], "unconditional first": [2, 3, 0, 1], "sample by sample": [2, 0, 3, 1]}


def host(
    plan: StepPlan,
    updates: StepPlan,
    guidance: float | None,
    change: float = 0.0,
    dtype: str = "f4",
    order: str = "conditional first",
) -> HostCheck:
    """Two samples through a plan; guided with a weight, or a batch of one half where it is None.

    Args:
        plan: what is checked.
        updates: the plan of the sampler.
        guidance: its weight.
        change: what it adds to the latents after an update.
        dtype: what it computes in.
        order: of a batch of both halves.
    """
    following, sampler, latent = HostCheck(plan, SPEC), Sampler(updates, Noise(3, range(2), (2, 4, 4))), drawn(0, 2)
    places = np.arange(2) if guidance is None else np.array(ORDERS[order])
    labels = told(1, 2, 5, 5)[places]
    for index in range(len(updates)):
        batch = np.concatenate([latent, latent])[places]
        following.check(index, batch, labels, TOLERANCE if dtype == "f4" else HALF_TOLERANCES["float16"])
        prediction = drawn(index + 1, len(batch), channels=4)
        following.note(index, batch, labels, prediction)
        eps = prediction[np.argsort(places), :2].copy()
        prediction.fill(np.nan)  # what the host does with its own does not matter
        if guidance is not None:
            conditional, null = np.split(eps, 2)
            eps = null + np.float32(guidance) * (conditional - null)
        latent = sampler.update(index, latent, eps).astype(dtype).astype(np.float32)
        latent = latent + np.float32(change) * drawn(9, 2)
    return following


@pytest.mark.parametrize("updates", [PLAIN, WITH_HISTORY])
@pytest.mark.parametrize("guidance", [0.0, 1.5, 4.0])
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_the_plans_own_sampler_passes(updates: list[Update], guidance: float, dtype: str) -> None:
    plan = plan_of(updates, guidance)
    host(plan, plan, guidance, dtype=dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("updates", [PLAIN, WITH_HISTORY])
def test_halves_in_whatever_order(order: str, updates: list[Update]) -> None:
    plan = plan_of(updates)
    assert not host(plan, plan, 1.5, order=order).unchecked
    with pytest.raises(BundleError, match="were sampled with guidance 4"):
        host(plan, plan, 4.0, order=order)
    with pytest.raises(BundleError, match=r"the latent that came after timestep 3 is \S+ off"):
        host(plan, plan, 1.5, change=5.0, order=order)


def test_halves_that_come_apart_are_refused() -> None:
    following, latent = HostCheck(plan_of(PLAIN), SPEC), np.concatenate([drawn(0, 1)] * 2)
    following.note(0, latent, told(5, 1), drawn(1, 2, channels=4))
    with pytest.raises(BundleError, match="the latents of the two halves of guidance differ after timestep 3"):
        following.check(1, drawn(2, 2), told(5, 1), TOLERANCE)


def test_unconditional_samples_are_checked_where_there_is_no_guidance() -> None:
    """All that is sampled is checked then, whatever its class."""
    plan, labels = plan_of(PLAIN, 1.0), told(5, 5)
    following, latent, prediction = HostCheck(plan, SPEC), drawn(0, 2), drawn(1, 2, channels=4)
    following.note(0, latent, labels, prediction)
    following.check(1, Updates(plan).update(0, latent, prediction[:, :2]), labels, TOLERANCE)
    with pytest.raises(BundleError, match="off"):
        following.check(1, drawn(2, 2), labels, TOLERANCE)


@pytest.mark.parametrize("noise", [0.0, 0.9])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_trajectory_is_not_taken_for_another(guidance: float, noise: float) -> None:
    """Also where so much noise is added that a latent of the other one could be of this one."""
    plan = plan_of([replace(update, noise=noise, latent=0.3) for update in PLAIN], guidance)
    for labels in ([1, 2], [5, 5]):  # where guidance is planned, batches without both halves are not known
        following = HostCheck(plan, SPEC)
        samplers = [Sampler(plan, Noise(seed, range(2), (2, 4, 4))) for seed in (1, 2)]
        latents, classes, came = [drawn(seed, 2) for seed in (1, 2)], told(*labels), []
        for sampler, latent in zip(samplers, latents, strict=True):
            following.check(0, latent, classes, TOLERANCE)
            prediction = drawn(3, 2, channels=4)
            following.note(0, latent, classes, prediction)
            eps = prediction[:, :2] * np.float32(0.3 if guidance > 1 else 1.0)  # of a half that is not here
            came.append(sampler.update(0, latent, eps))
        with pytest.raises(BundleError, match=r"does not go on from the trajectory that was begun last") as caught:
            following.check(1, came[0], classes, TOLERANCE)
        assert "denoiser.request()" in str(caught.value.hint)


@pytest.mark.parametrize("updates", [PLAIN, WITH_HISTORY])
def test_without_guidance_too(updates: list[Update]) -> None:
    plan = plan_of(updates, 1.0)
    host(plan, plan, None)


@pytest.mark.parametrize(("came", "said"), [(4.0, "4"), (1.4, "1.4"), (-1.0, "-1"), (1.0, "1")])
def test_another_guidance_weight_is_refused(came: float, said: str) -> None:
    plan = plan_of(PLAIN)
    with pytest.raises(BundleError) as caught:
        host(plan, plan, came)
    assert caught.value.message == (
        "the bundle was compiled for ddim, 3 steps, guidance 1.5; the latents that came were sampled with guidance "
        + said
    )
    assert "guidance_scale=1.5" in str(caught.value.hint)


def test_no_guidance_where_there_should_be_is_refused() -> None:
    plan = plan_of(PLAIN)
    with pytest.raises(BundleError, match=r"guidance 1\.5; the latents that came were sampled without guidance"):
        host(plan, plan, None)


def test_guidance_where_there_should_be_none_is_refused_at_once() -> None:
    latent = np.concatenate([drawn(0, 1)] * 2)
    with pytest.raises(BundleError, match="which is no guidance; this batch of 2 holds both halves of guidance"):
        HostCheck(plan_of(PLAIN, 1.0), SPEC).check(0, latent, told(1, 5), TOLERANCE)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize(("updates", "change"), [([replace(PLAIN[0], noise_prediction=0.35)], 0.0), (PLAIN, 0.01)])
def test_other_updates_are_refused(guidance: float, updates: list[Update], change: float) -> None:
    plan = plan_of(PLAIN, guidance)
    if len(updates) == 1:
        updates = updates + PLAIN[1:]
    with pytest.raises(BundleError, match=r"the latent that came after timestep 3 is 0\.\d+ off") as caught:
        host(plan, plan_of(updates, guidance), None if guidance == 1.0 else guidance, change)
    assert "own_updates=True" in str(caught.value.hint)


def test_what_cannot_be_told_passes() -> None:
    """The halves apart and combined out of sight, and latents that stay where they are."""
    for labels in (told(1, 2), told(5, 5)):
        following, latent = HostCheck(plan_of(PLAIN), SPEC), drawn(0, 2)
        for index in range(3):
            following.check(index, latent, labels, TOLERANCE)
            following.note(index, latent, labels, drawn(index, 2, channels=4))
        assert not following.unchecked
    other = plan_of([replace(update, noise_prediction=0.7) for update in PLAIN])
    following = host(plan_of(PLAIN), other, None)
    assert "whether their latents are updated as planned is not checked" in following.unchecked


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_noise_is_known_by_its_amount(guidance: float) -> None:
    noisy, quiet = (plan_of([replace(update, noise=noise) for update in PLAIN], guidance) for noise in (0.3, 0.0))
    given = None if guidance == 1.0 else guidance
    host(noisy, noisy, given)
    for plan, sampler in ((noisy, quiet), (quiet, noisy)):
        with pytest.raises(BundleError, match="off"):
            host(plan, sampler, given)


def test_another_weight_is_found_beneath_noise() -> None:
    noisy = plan_of([replace(update, noise=0.1) for update in PLAIN])
    with pytest.raises(BundleError, match=r"were sampled with guidance (3\.9|4)"):
        host(noisy, noisy, 4.0)


def test_a_new_trajectory_begins_anew() -> None:
    plan = plan_of(WITH_HISTORY, 1.0)
    following = HostCheck(plan, SPEC)
    for seed in (0, 1):
        sampler, latent = Updates(plan), drawn(seed, 1 + seed)
        for index in range(2):  # aborted
            following.check(index, latent, told(*range(1 + seed)), TOLERANCE)
            prediction = drawn(index, 1 + seed, channels=4)
            following.note(index, latent, told(*range(1 + seed)), prediction)
            latent = sampler.update(index, latent, prediction[:, :2])


def test_forms() -> None:
    latent = drawn(0, 2)
    same = latent[[0, 0]]
    assert form_of(latent, told(1, 2), SPEC) is Form.CONDITIONAL
    assert form_of(same, told(1, 5), SPEC) is Form.PAIRED
    assert form_of(latent, told(1, 5), SPEC) is Form.OTHER  # not the same latents
    assert form_of(same, told(5, 1), SPEC) is Form.PAIRED  # in the other order
    assert form_of(latent[[0, 0, 1, 1]], told(1, 5, 2, 5), SPEC) is Form.PAIRED  # sample by sample
    assert form_of(latent[[0, 0, 1, 1]], told(1, 5, 5, 2), SPEC) is Form.PAIRED
    assert form_of(latent[[0, 1, 0, 1]], told(1, 5, 5, 2), SPEC) is Form.OTHER
    assert form_of(same, told(5, 5), SPEC) is Form.OTHER
    assert form_of(drawn(0, 3), told(1, 2, 5), SPEC) is Form.OTHER
