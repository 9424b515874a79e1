"""search-scales: scales that change the prediction less, and two regions where they leave less error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from qcgraph.errors import ContractError, UsageError
from qcgraph.facts import CalibrationSet, QuantPlan, Ranges
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import rounded_activation
from qcgraph.passes.calibration._calibration_set import CalibrationBatch, entering
from qcgraph.passes.quantization._scale_search import BINS
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import encode_latents

Run = Callable[[str, Program], Program]
Planned = Searched = Callable[..., Program]
LEANING, EVEN = "blocks.0.mlp.fc2", "blocks.1.mlp.fc2"  # two thirds of what enters the first one's GELU are negative
SITES = ("blocks.0.attn.qkv", LEANING, EVEN)
SYMMETRIC, ONE_REGION = " symmetric=true", "regions=false"
COMPUTING = (0, 3, 6)  # steps; groups 0, 0 and 1


@pytest.fixture(scope="module")
def calibrated(cached: Program, run: Run) -> Program:
    """The cached tiny denoiser with a calibration set; the MLP of its first block leans to negative values."""
    name = "blocks.0.mlp.fc1.bias"
    program = replace(cached, constants={**cached.constants, name: cached.constants[name] - 1})
    return run("calibrate{trajectories=4 selection=uniform latents=12},group-timesteps{groups=2}", program)


@pytest.fixture(scope="module")
def planned(calibrated: Program, run: Run) -> Planned:
    """It with a plan of so many bits, for three sites."""

    def make(bits: int = 6, options: str = "") -> Program:
        program = run(f"plan-quant{{activation-bits={bits}{options}}}", calibrated)
        return program.with_facts(QuantPlan({name: program.facts[QuantPlan].sites[name] for name in SITES}))

    return cache(make)


@pytest.fixture(scope="module")
def searched(planned: Planned, run: Run) -> Searched:
    """The plan of so many bits after search-scales with some options."""
    return cache(
        lambda text="", bits=6, options="": run(
            f"search-scales{{{text}}}" if text else "search-scales", planned(bits, options)
        )
    )


def reasons(program: Program, about: str = "") -> dict[str, str]:
    return {refusal.where: refusal.reason for refusal in program.history[-1].refusals if about in refusal.reason}


def activation_error(program: Program, site: str) -> float:
    """Mean squared error of what enters a site on the calibration set."""
    rows = CalibrationBatch.of(program)
    ((_, value),) = entering(program, rows, {site})
    rounded = rounded_activation(value, rows.groups, program.facts[QuantPlan].sites[site].activation)
    return float((rounded - value).square().mean())


def prediction_error(program: Program, run: Run) -> float:
    """Mean squared error of the noise prediction on the calibration set, once quantized."""
    rows, quantized = CalibrationBatch.of(program), run("insert-qdq", program)
    errors = []
    for group in (0, 1):
        part = rows[rows.groups == group]
        inputs = {"latent": part.latents, "timestep": part.timesteps, **part.conditions}
        exact = program.run("full", inputs)["noise_prediction"]
        found = quantized.run("full", {**inputs, "group": torch.tensor(group)})["noise_prediction"]
        errors.append((found - exact)[:, :2].square().flatten(1).mean(dim=1))
    return float(torch.cat(errors).mean())


def test_search_scales_golden(planned: Planned, searched: Searched, golden_diff: Callable[..., None]) -> None:
    golden_diff("search-scales", planned(), searched())


@pytest.mark.parametrize(("bits", "options"), [(4, ""), (6, ""), (6, SYMMETRIC), (8, "")])
def test_scales_are_positive_and_exact_in_float32(searched: Searched, bits: int, options: str) -> None:
    for site in searched("", bits, options).facts[QuantPlan].sites.values():
        activation = site.activation
        assert all(scale > 0 and scale == float(np.float32(scale)) for scale in activation.scales)
        assert len(activation.scales) == len(activation.zero_points) in (1, 2)
        assert all(activation.low <= zero <= activation.high for zero in activation.zero_points)


def test_sites_and_weights_stay_as_planned(planned: Planned, searched: Searched) -> None:
    sites, found = (program.facts[QuantPlan].sites for program in (planned(), searched()))
    assert list(found) == list(sites)
    for name, site in sites.items():
        assert found[name].weight == site.weight
        if not found[name].activation.shift:
            same = replace(found[name].activation, scales=(), zero_points=())
            assert same == replace(site.activation, scales=(), zero_points=())


def test_predictions_change_less(planned: Planned, searched: Searched, run: Run) -> None:
    """Without regions and with them; with few bits by more than with many."""
    plain, one, two = (
        prediction_error(program, run) for program in (planned(4), searched(ONE_REGION, 4), searched("", 4))
    )
    assert one < 0.95 * plain
    assert two < 1.02 * one
    assert one / plain < prediction_error(searched("", 8), run) / prediction_error(planned(8), run)


@pytest.mark.parametrize(("bits", "options"), [(4, ""), (8, ""), (8, SYMMETRIC)])
def test_range_without_regions_covers_as_planned(planned: Planned, searched: Searched, bits: int, options: str) -> None:
    """To the width of a bin of the histogram."""
    found = searched(f"objective=range {ONE_REGION}", bits, options).facts[QuantPlan].sites
    for name, site in planned(bits, options).facts[QuantPlan].sites.items():
        activation = found[name].activation
        assert activation.scales == pytest.approx(site.activation.scales, rel=1.001 / BINS, abs=0)
        assert np.abs(np.subtract(activation.zero_points, site.activation.zero_points)).max() <= 1
        assert activation.shift == 0


@pytest.mark.parametrize("options", ["", SYMMETRIC])
def test_range_without_regions_is_what_was_planned(planned: Planned, searched: Searched, options: str) -> None:
    found = searched(f"objective=range {ONE_REGION}", 8, options).facts[QuantPlan].sites
    for name, site in planned(8, options).facts[QuantPlan].sites.items():
        assert found[name].activation.scales == pytest.approx(site.activation.scales, rel=1e-6, abs=0)
        assert found[name].activation.zero_points == site.activation.zero_points


def test_groups_that_find_the_same_share_it(planned: Planned, run: Run) -> None:
    program = planned()
    ranges = program.facts[Ranges]
    flat = {
        name: replace(site, lows=(min(site.lows),) * len(site.lows), highs=(max(site.highs),) * len(site.highs))
        for name, site in ranges.planned.items()
    }
    merged = run("search-scales{objective=range}", program.with_facts(replace(ranges, planned=flat)))
    assert {len(site.activation.scales) for site in merged.facts[QuantPlan].sites.values()} == {1}


@pytest.mark.parametrize(("objective", "bits", "shift"), [("fisher", 6, 2), ("range", 6, 2)])
def test_after_a_gelu_two_regions_where_they_leave_less_error(
    searched: Searched, objective: str, bits: int, shift: int
) -> None:
    found = searched(f"objective={objective}", bits)
    activation, levels = found.facts[QuantPlan].sites[LEANING].activation, 2 ** (bits - 1) - 1
    assert (activation.shift, activation.low, activation.high) == (shift, 0, levels + levels * 2**shift)
    assert set(activation.zero_points) == {levels}
    assert LEANING not in reasons(found, "region")
    one = searched(f"objective={objective} {ONE_REGION}", bits)
    assert one.facts[QuantPlan].sites[LEANING].activation.shift == 0
    if objective == "range":
        assert activation_error(found, LEANING) < 0.9 * activation_error(one, LEANING)


def test_signed_codes_have_their_regions_about_zero(searched: Searched) -> None:
    activation = searched("", 6, SYMMETRIC).facts[QuantPlan].sites[LEANING].activation
    assert (activation.shift, activation.low, activation.high, activation.dtype) == (2, -31, 124, "int8")
    assert set(activation.zero_points) == {0}


def test_where_two_regions_leave_more_error_there_is_one_and_a_reason(searched: Searched) -> None:
    found = searched("objective=range")
    assert found.facts[QuantPlan].sites[EVEN].activation.shift == 0
    reason = reasons(found)[EVEN]
    assert reason.startswith("one region: two would leave ")
    assert int(reason.removesuffix("% of its error").split()[-1]) > 90


@pytest.mark.parametrize(("objective", "options"), [("fisher", ""), ("range", ""), ("range", SYMMETRIC)])
def test_two_regions_of_8_bits_do_not_fit(searched: Searched, objective: str, options: str) -> None:
    found = searched(f"objective={objective}", 8, options)
    assert {site.activation.shift for site in found.facts[QuantPlan].sites.values()} == {0}
    told = reasons(found, "region")
    assert set(told) == {LEANING, EVEN}
    assert all("two do not fit a tensor, and a second product would leave" in reason for reason in told.values())


def test_only_what_follows_a_nonlinearity_is_asked_for_regions(searched: Searched) -> None:
    found = searched("", 6, SYMMETRIC)
    shifted = {name for name, site in found.facts[QuantPlan].sites.items() if site.activation.shift}
    assert LEANING in shifted
    assert shifted | set(reasons(found, "region")) == {LEANING, EVEN}


def test_two_regions_run(planned: Planned, searched: Searched, run: Run) -> None:
    """insert-qdq makes one op of them, whose result has less error than that of one step."""
    text = run("insert-qdq", searched()).text
    assert text.count("qcgraph.quantize_regions(") == 1
    assert text.count(" qcgraph.quantize(") == 2
    assert prediction_error(searched(), run) < prediction_error(planned(), run)


def test_groups_without_samples_are_covered_and_named(planned: Planned, run: Run) -> None:
    program = planned(8)
    few = program.facts[CalibrationSet]
    assert set(few.steps) == set(COMPUTING)
    early = replace(few, steps=(COMPUTING[0],) * len(few.steps))
    found = run(f"search-scales{{{ONE_REGION}}}", program.with_facts(early))
    told = {(refusal.where, refusal.reason) for refusal in found.history[-1].refusals}
    for name, site in program.facts[QuantPlan].sites.items():
        assert (name, "no sample tells in timestep groups 1: scales cover the range") in told
        scale = found.facts[QuantPlan].sites[name].activation.scales[1]
        assert scale == pytest.approx(site.activation.scales[1], rel=1.001 / BINS, abs=0)


def test_scales_that_only_suit_the_samples_they_were_searched_on_are_not_taken(planned: Planned, run: Run) -> None:
    """With few samples searched scales clip what the others hold; then scales cover the range, and it is said."""
    program = planned(6)
    found = run(f"search-scales{{clipping=1 {ONE_REGION}}}", with_samples(program, 3))
    told = {refusal.where: refusal.reason for refusal in found.history[-1].refusals}
    refused = [
        name for name, reason in told.items() if reason.startswith("scales cover the range: searched ones leave")
    ]
    assert refused
    for name in refused:
        covering, site = (item.facts[QuantPlan].sites[name].activation for item in (program, found))
        assert site.scales == pytest.approx(covering.scales, rel=1.001 / BINS, abs=0)


def test_one_sample_can_not_be_searched_and_judged(planned: Planned, run: Run) -> None:
    found = run(f"search-scales{{{ONE_REGION}}}", with_samples(planned(6), 1))
    reasons = {refusal.reason for refusal in found.history[-1].refusals}
    assert "scales cover the range: there are too few samples to search on some and to judge on others" in reasons


def with_samples(program: Program, count: int) -> Program:
    """The program with the first samples of its calibration set."""
    whole = program.facts[CalibrationSet]
    latents = CalibrationBatch.of(program).latents[:: program.facts[StepPlan].halves][:count]
    few = replace(
        whole,
        steps=whole.steps[:count],
        conditions={name: values[:count] for name, values in whole.conditions.items()},
        latents=encode_latents(latents.numpy()),
    )
    return program.with_facts(few)


def test_clipping_that_weighs_much_keeps_the_range(planned: Planned, searched: Searched) -> None:
    """Half a step less at either end is not clipping: the codes there are still the nearest ones."""
    sizes = {}
    for clipping in ("1", "1e12"):
        found = searched(f"{ONE_REGION} clipping={clipping}", 4).facts[QuantPlan].sites
        sites = planned(4).facts[QuantPlan].sites
        ratios = [np.divide(found[name].activation.scales, site.activation.scales) for name, site in sites.items()]
        sizes[clipping] = np.concatenate(ratios)
    assert sizes["1e12"].min() > 1 - 1 / 15
    assert sizes["1"].mean() < sizes["1e12"].mean()


def test_by_default_clipping_weighs_once_for_each_computing_step(searched: Searched) -> None:
    found, expected = (searched(f"{ONE_REGION}{options}", 4) for options in ("", f" clipping={len(COMPUTING)}"))
    assert found.facts[QuantPlan] == expected.facts[QuantPlan]


@pytest.mark.parametrize("clipping", ["0", "0.99", "-3"])
def test_bad_clipping(planned: Planned, run: Run, clipping: str) -> None:
    with pytest.raises(UsageError, match="clipping") as caught:
        run(f"search-scales{{clipping={clipping}}}", planned())
    assert caught.value.hint


@pytest.mark.parametrize("clipping", ["NaN", "Infinity"])
def test_clipping_that_is_not_a_number(planned: Planned, run: Run, clipping: str) -> None:
    with pytest.raises(UsageError, match="clipping"):
        run(f"search-scales{{clipping={clipping}}}", planned())


def test_a_bad_objective(planned: Planned, run: Run) -> None:
    with pytest.raises(UsageError, match="objective"):
        run("search-scales{objective=mse}", planned())


@pytest.mark.parametrize("kind", [CalibrationSet, QuantPlan, Ranges])
def test_what_it_needs(planned: Planned, run: Run, kind: type) -> None:
    program = planned()
    with pytest.raises(ContractError, match=f"needs {kind.__name__}"):
        run("search-scales", replace(program, facts=program.facts.without(kind)))


def test_the_seed_decides(planned: Planned, searched: Searched, run: Run) -> None:
    """With so few bits that searched scales are taken."""
    assert run("search-scales", planned(4)).digest == searched("", 4).digest
    assert run("search-scales{seed=1}", planned(4)).digest != searched("", 4).digest


def test_nothing_to_do(calibrated: Program, run: Run) -> None:
    program = run("search-scales", calibrated.with_facts(QuantPlan({})))
    assert program.facts[QuantPlan] == QuantPlan({})
