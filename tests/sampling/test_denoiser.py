"""The denoiser in the place of a diffusers transformer: its call, its attributes, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch

from qcgraph.errors import BundleError, UsageError
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.plan.schedulers import make_scheduler, make_step_plan
from qcgraph.plan.spec import FLOW, ModelSpec, NoiseSchedule
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.denoiser import Denoiser, DenoiserConfig, UncheckedLatentsWarning
from qcgraph.sampling.loop import Request
from qcgraph.sampling.runner import Array, Call


def parts(program: Program) -> tuple[TorchRunner, StepPlan, ModelSpec]:
    return TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec]


@pytest.fixture
def denoiser(cached: Program) -> Denoiser:
    return Denoiser(*parts(cached))


def latents(seed: int = 0, batch: int = 2) -> Array:
    return np.random.default_rng(seed).standard_normal((batch, 2, 8, 8), dtype=np.float32)


def first(denoiser: Denoiser, labels: Any = (0, 1), timestep: Any = 888) -> Array:
    prediction: Array = denoiser(latents(), timestep, labels).sample
    return prediction


def test_it_has_the_call_of_a_diffusers_transformer(cached: Program) -> None:
    runner, plan, spec = parts(cached)
    request, conditions = Request(runner, plan, spec), Conditions(2, {"class_label": np.arange(2)})
    denoiser = Denoiser(runner, plan, spec)
    for index, timestep in enumerate(plan.timesteps):
        result = denoiser(torch.from_numpy(latents()), timestep=torch.tensor(timestep), class_labels=torch.arange(2))
        expected = torch.from_numpy(request.denoise(index, latents(), conditions))
        assert torch.equal(result.sample, expected)
        assert result[0] is result["sample"] is result.sample
    half = denoiser(torch.from_numpy(latents()).half(), plan.timesteps[0], torch.arange(2), return_dict=False)
    assert isinstance(half, tuple)
    assert half[0].dtype == torch.float16
    assert isinstance(denoiser.request()(latents(), plan.timesteps[0], np.arange(2)).sample, np.ndarray)


@pytest.mark.parametrize(
    "timestep",
    [
        888,
        888.0,
        np.float64(888),
        np.full(2, 888, dtype=np.int32),
        np.full((2, 1), 888, dtype=np.float16),
        *(torch.tensor(888, dtype=dtype) for dtype in (torch.int16, torch.int64, torch.float32, torch.float64)),
        *(torch.full((2,), 888, dtype=dtype) for dtype in (torch.int32, torch.float16, torch.bfloat16)),
    ],
    ids=str,
)
def test_timesteps_of_every_kind(denoiser: Denoiser, timestep: Any) -> None:
    assert np.array_equal(first(denoiser, timestep=timestep), first(denoiser.request()))


def test_a_timestep_of_few_digits_stands_for_the_one_that_rounds_to_it(cached: Program) -> None:
    runner, plan, spec = parts(cached)
    steps = [replace(step, timestep=step.timestep + 0.3) for step in plan.steps]  # as those of a flow
    denoiser = Denoiser(runner, replace(plan, steps=tuple(steps)), spec)
    exact = first(denoiser, timestep=888.3)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert np.array_equal(first(denoiser, timestep=torch.tensor(888.3, dtype=dtype)), exact)
    with pytest.raises(BundleError, match="timestep 888 is not in the plan"):
        first(denoiser, timestep=888)
    near = [replace(plan.steps[0], timestep=889.0), replace(plan.steps[1], timestep=888.5)]
    close = Denoiser(runner, replace(plan, steps=tuple(near)), spec)
    with pytest.raises(UsageError, match=r"888 may be 889 or 888\.5, which torch\.bfloat16 does not tell apart"):
        first(close, timestep=torch.tensor(889.0, dtype=torch.bfloat16))


def test_a_timestep_beside_one_of_the_plan_is_shown_in_full(denoiser: Denoiser) -> None:
    with pytest.raises(BundleError, match=r"timestep 888\.0001 is not in the plan"):
        first(denoiser, timestep=888.0001)


def test_tensors_that_numpy_cannot_hold_as_they_are(denoiser: Denoiser) -> None:
    """Floating point of 8 bits, and the imaginary part of a conjugate, whose sign is held apart."""
    exact = torch.from_numpy(latents())
    labels = torch.tensor([0, 1]).to(torch.float8_e5m2)
    negative = torch.complex(torch.zeros_like(exact), -exact).conj().imag
    expected = first(denoiser)
    assert np.array_equal(denoiser.request()(negative, 888, labels).sample.numpy(), expected)
    coarse = exact.to(torch.float8_e4m3fn)
    found = denoiser.request()(coarse.float(), 888, labels).sample.to(coarse.dtype)
    assert torch.equal(denoiser.request()(coarse, 888, labels).sample.view(torch.uint8), found.view(torch.uint8))


def test_what_pytorch_was_told_elsewhere_changes_nothing(denoiser: Denoiser) -> None:
    expected = first(denoiser)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(first(denoiser.request()), expected)
    with torch.device("meta"):
        assert np.array_equal(first(denoiser.request()), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert np.array_equal(first(denoiser.request()), expected)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_labels_of_every_kind(denoiser: Denoiser) -> None:
    expected = first(denoiser, [3, 3])
    for labels in (3, [3], np.array([3, 3]), np.array([3.0, 3.0]), torch.tensor([3, 3], dtype=torch.int32)):
        assert np.array_equal(first(denoiser, labels), expected)


@pytest.mark.parametrize(
    ("labels", "message", "hint"),
    [
        ([0, 6], "class_labels: 6 is out of range", "0 to 4, and 5 for the unconditional half"),
        ([-1, 0], "class_labels: -1 is out of range", "0 to 4"),
        ([0, 1000], "class_labels: 1000 is out of range", "DiTPipeline gives 1000 for that half"),
        ([0, 1, 2], r"class_labels int64\[3\] for a batch of 2", "one integer a sample"),
        ([0.5, 1.0], "class_labels are not integers", "one integer a sample"),
        ([float("nan"), 1], "class_labels are not integers", "one integer a sample"),
        ([1e300, 1], "class_labels are not integers", "one integer a sample"),
        ([], r"class_labels float64\[0\] for a batch of 2", "one integer a sample"),
        ("abc", "class_labels is 'abc'", "one integer a sample"),
        ([True, False], "class_labels has dtype bool", "one integer a sample"),
        ([1j, 0], "class_labels has dtype complex128", "one integer a sample"),
        ([[0], [0, 1]], "class_labels is not an array", "one integer a sample"),
        ([None, 0], "class_labels has dtype object", "one integer a sample"),
        (2**64, "class_labels is an integer that 64 bits do not hold", "one integer a sample"),
        (torch.tensor([True, False]), r"class_labels has dtype torch\.bool", "one integer a sample"),
        (torch.zeros(2, device="meta"), "class_labels is on the device meta", "a dense tensor"),
        (None, "no class_labels were given", "tiny takes one integer a sample"),
    ],
)
def test_labels_that_are_refused(denoiser: Denoiser, labels: Any, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        first(denoiser, labels)
    assert hint in str(caught.value.hint)


def test_what_it_was_not_made_for(denoiser: Denoiser) -> None:
    for wrong in (np.zeros((1, 3, 8, 8)), np.zeros((2, 8, 8)), np.zeros((0, 2, 8, 8))):
        with pytest.raises(UsageError, match="the latent has shape") as caught:
            denoiser(wrong, 888.0, np.array([0]))
        assert caught.value.hint == "tiny takes (batch, 2, 8, 8)"
    with pytest.raises(UsageError, match="timesteps of a batch differ"):
        first(denoiser, timestep=np.array([888.0, 777.0]))
    with pytest.raises(UsageError, match="no timestep was given"):
        first(denoiser, timestep=None)
    with pytest.raises(UsageError, match="cross_attention_kwargs scale have no effect"):
        denoiser(latents(), 888, [0, 1], {"scale": 0.5})
    with pytest.raises(UsageError, match="cross_attention_kwargs given have no effect"):
        denoiser(latents(), 888, [0, 1], 0.5)  # type: ignore[arg-type]
    assert denoiser(latents(), 888, [0, 1], {}).sample.shape == (2, 4, 8, 8)


@pytest.mark.filterwarnings("error:::qcgraph")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda latent: latent * np.nan, "the latent holds NaN or infinity"),
        (lambda latent: np.where(latent > 1, np.inf, latent), "the latent holds NaN or infinity"),
        (lambda latent: np.float64(latent) * 1e300, "the latent holds NaN or infinity"),
        (lambda latent: torch.from_numpy(latent) * float("nan"), "the latent holds NaN or infinity"),
        (lambda latent: "abc", "the latent is 'abc'"),
        (lambda latent: None, "the latent is of type NoneType"),
        (lambda latent: [[1.0], [1.0, 2.0]], "the latent is not an array"),
        (lambda latent: latent > 0, "the latent has dtype bool"),
        (lambda latent: latent.astype(int), "the latent has dtype int64"),
        (lambda latent: latent.astype(complex), "the latent has dtype complex128"),
        (lambda latent: latent.astype(object), "the latent has dtype object"),
        (lambda latent: np.ma.masked_greater(latent, 1.0), "the latent is a masked array"),
        (lambda latent: torch.from_numpy(latent).int(), r"the latent has dtype torch\.int32"),
        (lambda latent: torch.from_numpy(latent).to_sparse(), r"the latent is a tensor of layout torch\.sparse_coo"),
        (lambda latent: torch.from_numpy(latent).to("meta"), "the latent is on the device meta"),
        (lambda latent: np.zeros((0, 2, 8, 8), dtype=np.float32), "the latent has shape"),
    ],
)
def test_latents_that_are_refused(denoiser: Denoiser, change: Callable[[Array], Any], said: str) -> None:
    expected = walk(denoiser.request())
    for index, timestep in enumerate(denoiser.plan.timesteps):
        wrong = change(latents())
        with pytest.raises(UsageError, match=said) as caught:
            denoiser(wrong, timestep, [0, 1])
        assert caught.value.hint
        assert np.array_equal(denoiser(latents(), timestep, [0, 1]).sample, expected[index])  # it was not taken


@pytest.mark.parametrize(
    ("timestep", "said"),
    [
        ("888", "the timestep is '888'"),
        (True, "the timestep is True"),
        (888j, "the timestep is 888j"),
        (10**400, "the timestep is an integer that 64 bits do not hold"),
        (-(10**5000), "the timestep is an integer that 64 bits do not hold"),
        ([], "no timestep was given"),
        ([[888], [888, 888]], "the timestep is not an array"),
        ([None], "the timestep has dtype object"),
        (float("nan"), "the timestep is NaN or infinite"),
        (torch.tensor(float("inf")), "the timestep is NaN or infinite"),
        (torch.tensor(888, device="meta"), "the timestep is on the device meta"),
        (-888, "timestep -888 is not in the plan"),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, int) else str(type(value)),
)
def test_timesteps_that_are_refused(denoiser: Denoiser, timestep: Any, said: str) -> None:
    with pytest.raises((UsageError, BundleError), match=said) as caught:
        first(denoiser, timestep=timestep)
    assert caught.value.hint


def walk(denoiser: Denoiser, labels: Any = (0, 1)) -> list[Array]:
    """A host that leaves latents as they are."""
    return [denoiser(latents(), timestep, labels).sample for timestep in denoiser.plan.timesteps]


@pytest.mark.parametrize("own_updates", [False, True])
def test_what_a_trajectory_began_with_stays(cached: Program, own_updates: bool) -> None:
    denoiser = Denoiser(*parts(cached), own_updates=own_updates)
    expected, (begin, second, *_) = walk(denoiser), denoiser.plan.timesteps
    denoiser(latents(), begin, [0, 1])
    for labels in ([0, 4], [1, 0], [5, 1], 1):
        with pytest.raises(BundleError, match=r"has class_label \d, this trajectory began with class_label \d there"):
            denoiser(latents(), second, labels)
    with pytest.raises(BundleError, match="this trajectory began with"):
        denoiser(latents(batch=3), second, [0, 1, 1])
    with pytest.raises(BundleError, match="the latent is float16, this trajectory began with float32"):
        denoiser(latents().astype(np.float16), second, [0, 1])
    assert np.array_equal(denoiser(latents().astype(np.float64), second, [0, 1]).sample, expected[1])


def test_a_host_that_cannot_be_checked_is_told_once(cached: Program) -> None:
    """A batch of one half is combined with the other one out of sight."""
    denoiser = Denoiser(*parts(cached))
    changed = [latents(seed) for seed in range(3)]
    denoiser(changed[0], denoiser.plan.timesteps[0], [0, 1])
    with pytest.warns(UncheckedLatentsWarning, match="batches come without both halves of guidance") as caught:
        denoiser(changed[1], denoiser.plan.timesteps[1], [0, 1])
    assert [warning.filename for warning in caught] == [__file__]
    free = Denoiser(*parts(cached), own_updates=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoiser(changed[2], denoiser.plan.timesteps[2], [0, 1])
        for latent, timestep in zip(changed, free.plan.timesteps, strict=False):
            free(latent, timestep, [0, 1])


@pytest.mark.parametrize("labels", [[1, 5], [5, 1]], ids=["conditional first", "unconditional first"])
def test_other_latents_are_refused_in_either_order(denoiser: Denoiser, labels: list[int]) -> None:
    denoiser(np.concatenate([latents(batch=1)] * 2), 888, labels)
    with pytest.raises(BundleError, match="off \\(relative\\) from what this scheduler makes"):
        denoiser(np.concatenate([latents(1, batch=1)] * 2), denoiser.plan.timesteps[1], labels)


def test_trajectories_in_turns_are_told_apart(denoiser: Denoiser) -> None:
    """On one denoiser, by their latents: that which was begun last goes on, the other one is refused."""
    plan, labels = denoiser.plan, [1, 5]
    hosts = [stepping(denoiser, seed, labels) for seed in (0, 1)]
    alone = list(stepping(denoiser.request(), 1, labels))
    next(hosts[0])
    found = [next(hosts[1])]
    with pytest.raises(BundleError, match="does not go on from the trajectory that was begun last") as caught:
        next(hosts[0])
    assert "denoiser.request()" in str(caught.value.hint)
    found += hosts[1]
    assert len(found) == len(plan)
    assert all(map(np.array_equal, found, alone))


def stepping(denoiser: Denoiser, seed: int, labels: list[int]) -> Iterator[Array]:
    """The plan's sampler, a step at a time."""
    latent, weight = latents(seed, batch=1), np.float32(denoiser.plan.fingerprint.guidance)
    for step in denoiser.plan.steps:
        prediction = denoiser(np.concatenate([latent, latent]), step.timestep, labels).sample
        yield prediction
        conditional, null = np.split(prediction[:, :2], 2)
        eps = null + weight * (conditional - null)
        latent = np.float32(step.update.latent) * latent + np.float32(step.update.noise_prediction) * eps


def test_where_latents_may_be_any_trajectories_end_before_others_begin(cached: Program) -> None:
    denoiser = Denoiser(*parts(cached), own_updates=True)
    expected, timesteps = walk(denoiser), denoiser.plan.timesteps
    denoiser(latents(), timesteps[0], [0, 1])
    found = [denoiser(latents(), timesteps[0], [0, 1]).sample]  # the same step again
    for latent, labels in ((latents(1), [0, 1]), (latents(), [1, 0])):
        with pytest.raises(BundleError, match="a trajectory is under way, of which timestep 777 comes next") as caught:
            denoiser(latent, timesteps[0], labels)
        assert "denoiser.request()" in str(caught.value.hint)
    found += [denoiser(latents(), timestep, [0, 1]).sample for timestep in timesteps[1:]]
    assert all(map(np.array_equal, found, expected))
    denoiser(latents(1), timesteps[0], [0, 1])
    denoiser.restart()
    assert all(map(np.array_equal, walk(denoiser), expected))


def test_requests_in_threads_are_right(cached: Program) -> None:
    denoiser, count = Denoiser(*parts(cached)), 4
    alone = [list(stepping(denoiser.request(), seed, [seed, 5])) for seed in range(count)]
    start = threading.Barrier(count)

    def run(seed: int) -> list[Array]:
        request = denoiser.request()
        start.wait()
        return list(stepping(request, seed, [seed, 5]))

    with ThreadPoolExecutor(count) as pool:
        for found, expected in zip(pool.map(run, range(count)), alone, strict=True):
            assert all(map(np.array_equal, found, expected))


@pytest.mark.parametrize("own_updates", [False, True])
def test_a_trajectory_may_move_between_threads(cached: Program, own_updates: bool) -> None:
    denoiser = Denoiser(*parts(cached), own_updates=own_updates)
    expected = list(stepping(denoiser.request(), 0, [1, 5]))
    for _ in range(2):
        steps, found = stepping(denoiser, 0, [1, 5]), []
        for _ in denoiser.plan.steps:
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(next, steps).result())
        assert all(map(np.array_equal, found, expected))


def test_a_copy_is_a_request_and_nothing_is_pickled(denoiser: Denoiser) -> None:
    expected = walk(denoiser)
    first(denoiser)
    for another in (copy.copy(denoiser), copy.deepcopy(denoiser)):
        assert all(map(np.array_equal, walk(another), expected))
    denoiser(latents(), denoiser.plan.timesteps[1], [0, 1])  # it is where it was
    with pytest.raises(UsageError, match="cannot be pickled") as caught:
        pickle.dumps(denoiser)
    assert "qcgraph.load" in str(caught.value.hint)


def test_a_null_half_that_comes_first_is_refused_where_it_is_restored(
    captured: Program, run: Callable[[str, Program], Program]
) -> None:
    halved = run("plan-cache{interval=2 blocks=guidance},insert-cache", captured)
    denoiser, both = Denoiser(*parts(halved)), np.concatenate([latents(batch=1)] * 2)
    with pytest.raises(UsageError, match=r"the second half of this batch is not unconditional: class_label \[1\]"):
        denoiser(both, 888, [5, 1])
    assert denoiser(both, 888, [1, 5]).sample.shape == (2, 4, 8, 8)


def test_its_configuration(denoiser: Denoiser) -> None:
    config = denoiser.config
    assert (config.in_channels, config.out_channels, config.sample_size, config.num_embeds_ada_norm) == (2, 4, 8, 5)
    assert dict(config) == {"in_channels": 2, "out_channels": 4, "sample_size": 8, "num_embeds_ada_norm": 5}
    assert config["sample_size"] == 8
    assert len(config) == 4
    assert config.get("of") is None
    with pytest.raises(KeyError):
        config["of"]
    with pytest.raises(FrozenInstanceError):
        config.sample_size = 16  # type: ignore[misc]
    assert DenoiserConfig.of(ModelSpec.class_conditional("wide", (2, 8, 16), 5, 5, 4)).sample_size == (8, 16)


def test_where_it_is(denoiser: Denoiser) -> None:
    assert denoiser.device == torch.device("cpu")
    assert denoiser.dtype == torch.float32
    assert denoiser.to("cpu").to(torch.device("cpu"), torch.float32).to(device=None) is denoiser
    assert denoiser.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert denoiser.request().dtype == torch.bfloat16
    for asked in ("cuda", torch.device("cuda:1"), torch.int8):
        with pytest.raises(UsageError, match="runs on the CPU, not on") as caught:
            denoiser.to(asked)
        assert caught.value.hint
    assert repr(denoiser) == "Denoiser(tiny: ddim, 9 steps, guidance 1.5)"


def guided(denoiser: Denoiser, weight: float, steps: int = 3) -> None:
    """The plan's sampler with a guidance weight of its own."""
    latent = latents(batch=1)
    for step in denoiser.plan.steps[:steps]:
        both = np.concatenate([latent, latent])
        conditional, null = np.split(denoiser(both, step.timestep, [1, 5]).sample[:, :2], 2)
        eps = null + np.float32(weight) * (conditional - null)
        latent = np.float32(step.update.latent) * latent + np.float32(step.update.noise_prediction) * eps


def test_another_sampler_is_refused_unless_it_is_meant(cached: Program) -> None:
    guided(Denoiser(*parts(cached)), 1.5, steps=9)
    with pytest.raises(BundleError, match=r"guidance 1\.5; the latents that came were sampled with guidance 4"):
        guided(Denoiser(*parts(cached)), 4.0)
    free = Denoiser(*parts(cached), own_updates=True)
    guided(free, 4.0)
    guided(free.request(), 4.0)


def test_a_latent_that_the_host_changes_in_place_does_not_matter(denoiser: Denoiser) -> None:
    """What is compared is what came."""
    latent = np.concatenate([latents(batch=1)] * 2)
    for step in denoiser.plan.steps[:3]:
        conditional, null = np.split(denoiser(latent, step.timestep, [1, 5]).sample[:, :2], 2)
        latent *= np.float32(step.update.latent)
        latent += np.float32(step.update.noise_prediction) * (null + np.float32(1.5) * (conditional - null))


class Arbitrary:
    """Predictions that follow from nothing; those of the halves differ by as much as they are long."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)

    def run(self, call: Call) -> Array:
        return self._generator.standard_normal(call.inputs["latent"].shape, dtype=np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "flow"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmsolver++"])
def test_rounding_in_a_host_is_not_another_sampler(dtype: torch.dtype, betas: str, solver: str) -> None:
    """With diffusers' own schedulers, and also where coefficients are in the thousands."""
    process = NoiseSchedule(prediction=FLOW) if betas == "flow" else NoiseSchedule(beta_schedule=betas)
    solver = "flow-euler" if betas == "flow" and solver != "dpmsolver++" else solver
    spec = ModelSpec.class_conditional("arbitrary", (4, 8, 8), 5, 5, 4, process)
    for steps, guidance in [(2, 4.0), (9, 1.0), (20, 30.0)]:
        denoiser = Denoiser(Arbitrary(), make_step_plan(solver, steps, guidance, process, "m"), spec)
        scheduler = make_scheduler(solver, process)
        scheduler.set_timesteps(steps)
        latent = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
        for timestep in scheduler.timesteps:
            if guidance == 1.0:
                eps = denoiser(latent, timestep, [1]).sample
            else:
                conditional, null = denoiser(torch.cat([latent, latent]), timestep, [1, 5]).sample.chunk(2)
                eps = null + guidance * (conditional - null)
            latent = scheduler.step(eps, timestep, latent).prev_sample.to(dtype)
            if not latent.isfinite().all():  # half precision overflows here, with any denoiser
                assert dtype == torch.float16
                break
