"""plan-equalization: factors by the formula, or those of least expected noise; what cannot be divided is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qcgraph.errors import ContractError, UsageError
from qcgraph.facts import EqualizationPlan, EqualizedActivation
from qcgraph.ir.program import Program
from qcgraph.plan.steps import StepPlan

Run = Callable[[str, Program], Program]
Changed = Callable[[Program, float, float, slice], Program]
EQUALIZED = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1")]
COUNT = 2  # trajectories


def planned(program: Program, run: Run, options: str = "") -> dict[str, EqualizedActivation]:
    """What is planned, by the one site that reads each activation."""
    fact = run(f"plan-equalization{{trajectories={COUNT}{options}}}", program).facts[EqualizationPlan]
    assert all(len(item.sites) == 1 for item in fact.activations)
    return {item.sites[0]: item for item in fact.activations}


def test_golden(captured: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("plan-equalization", captured, run(f"plan-equalization{{trajectories={COUNT}}}", captured))


def test_graphs_and_constants_stay_as_they_are(captured: Program, run: Run) -> None:
    program = run(f"plan-equalization{{trajectories={COUNT}}}", captured)
    assert program.variants == captured.variants
    assert program.constants == captured.constants


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_factors_are_those_of_the_formula(
    captured: Program, run: Run, seen: Mapping[str, Any], strength: float
) -> None:
    """max|x - o|^a / max|W|^(1 - a) up to a common factor, their geometric mean 1; o is the middle of the range."""
    found = planned(captured, run, f" strength={strength}")
    assert list(found) == EQUALIZED
    for site in EQUALIZED:
        weight = captured.constants[f"{site}.weight"].abs().amax(dim=0)
        factors = seen[site].half_width ** strength / weight ** (1 - strength)
        expected = factors / factors.log().mean().exp()
        torch.testing.assert_close(torch.tensor(found[site].factors), expected, rtol=1e-3, atol=0)
        torch.testing.assert_close(torch.tensor(found[site].offsets), seen[site].middle, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", ["", " strength=0", " strength=0.5", " strength=1"])
def test_an_activation_that_is_always_0_is_planned_exactly_as_it_is(
    captured: Program, run: Run, with_channels: Changed, options: str
) -> None:
    program = with_channels(captured, -1.0, 0.0, slice(0, 32))
    found = planned(program, run, options)["blocks.0.attn.qkv"]
    assert found.factors == (1.0,) * 32
    assert found.offsets == (0.0,) * 32


def expected_noise(channels: Any, weight: Tensor, weight_bits: int, activation_bits: int) -> float:
    """D^2 / 12 of activations times the squared weight, plus that of every row times the power of the activation."""
    step = 2 * channels.half_width.max() / (2**activation_bits - 1)
    rows = weight.abs().amax(dim=1) / (2 ** (weight_bits - 1) - 1)
    return float(step**2 * weight.square().sum() + rows.square().sum() * channels.power.sum()) / 12


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (8, 4)])
def test_no_more_noise_is_expected_than_without(
    captured: Program,
    run: Run,
    seen: Mapping[str, Any],
    observed: Callable[[Program], Mapping[str, Any]],
    weight_bits: int,
    activation_bits: int,
) -> None:
    options = f"trajectories={COUNT} weight-bits={weight_bits} activation-bits={activation_bits}"
    program = run(f"plan-equalization{{{options}}},equalize", captured)
    channels = observed(program)
    for site in EQUALIZED:
        if site.endswith("qkv"):
            continue  # its rows are divided as well
        before, after = (
            expected_noise(found[site], owner.constants[f"{site}.weight"], weight_bits, activation_bits)
            for found, owner in ((seen, captured), (channels, program))
        )
        assert after <= before * (1 + 1e-4)


def test_the_choice_follows_the_bits(captured: Program, run: Run) -> None:
    """Where weights are the coarser ones, their noise decides, and the other way round."""
    choices = [
        planned(captured, run, f" weight-bits={weight} activation-bits={activation}")
        for weight, activation in ((2, 8), (8, 2))
    ]
    assert choices[0] != choices[1]


def test_what_cannot_be_equalized_is_refused(captured: Program, run: Run) -> None:
    program = run(f"plan-equalization{{trajectories={COUNT}}}", captured)
    refusals = {refusal.where: refusal.reason for refusal in program.history[-1].refusals}
    assert set(refusals) == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
    assert all(reason.startswith("not equalized: it does not come from a linear") for reason in refusals.values())


def test_variants_are_refused(cached: Program, run: Run) -> None:
    with pytest.raises(UsageError, match="takes the one graph") as caught:
        planned(cached, run)
    assert "before insert-cache" in str(caught.value.hint)


def test_a_step_plan_is_needed(captured: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="needs StepPlan"):
        planned(replace(captured, facts=captured.facts.without(StepPlan)), run)


@pytest.mark.parametrize("strength", ["-0.01", "1.01", "NaN", "Infinity"])
def test_bad_strengths(captured: Program, run: Run, strength: str) -> None:
    with pytest.raises(UsageError, match="strength") as caught:
        planned(captured, run, f" strength={strength}")
    assert caught.value.hint


def test_it_needs_a_trajectory(captured: Program, run: Run) -> None:
    with pytest.raises(UsageError, match="trajectories -1"):
        run("plan-equalization{trajectories=-1}", captured)
