"""fit-requantization, and how insert-qdq folds what it finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from qcgraph.facts import QuantPlan, Requantization, SiteCorrection
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.quantization.fit_requantization import Regression
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.loop import sample
from qcgraph.sampling.runner import Array

Run = Callable[[str, Program], Program]
PLANNED = "calibrate{trajectories=8 selection=uniform},group-timesteps{groups=2},plan-quant{weight-bits=4}"


@pytest.fixture(scope="module")
def coarse(cached: Program, run: Run) -> Program:
    """The cached tiny denoiser with a plan of 4-bit weights, not quantized yet."""
    return run(PLANNED, cached)


def latents(program: Program) -> Array:
    return sample(TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], [0, 1, 2, 3] * 4, seed=5)


def test_fit_requantization_golden(coarse: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("fit-requantization", coarse, run("fit-requantization", coarse))


def test_a_known_law_is_found() -> None:
    generator = torch.Generator().manual_seed(1)
    quantized = torch.randn(500, 3, generator=generator)
    gains, offsets = torch.tensor([1.1, 0.9, 1.0]), torch.tensor([0.2, -0.1, 0.0])
    regression = Regression(3)
    for part in (quantized[:200], quantized[200:]):
        regression.add(part * gains + offsets, part)
    found = regression.correction()
    np.testing.assert_allclose(found.gains, gains, rtol=1e-5)
    np.testing.assert_allclose(found.offsets, offsets, atol=1e-5)


def test_a_channel_that_does_not_vary_is_only_shifted() -> None:
    regression = Regression(2)
    regression.add(torch.tensor([[3.0, 1.0], [3.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, 2.0]]))
    assert regression.correction() == SiteCorrection((1.0, 1.0), (2.0, 0.0))


def test_neutral_corrections_change_no_bit(coarse: Program, run: Run) -> None:
    widths = {name: len(coarse.constants[f"{name}.weight"]) for name in coarse.facts[QuantPlan].sites}
    neutral = Requantization({name: SiteCorrection((1.0,) * n, (0.0,) * n) for name, n in widths.items()})
    plain, folded = run("insert-qdq", coarse), run("insert-qdq", coarse.with_facts(neutral))
    assert np.array_equal(latents(plain), latents(folded))


def test_the_correction_is_folded_as_the_formula_says(coarse: Program, run: Run) -> None:
    """a2 * (s * codes) and a2 * beta + b2, on one site with a bias of its own."""
    name = "blocks.0.mlp.fc1"
    bias = torch.linspace(-1, 1, len(coarse.constants[f"{name}.bias"]))
    program = replace(coarse, constants=dict(coarse.constants) | {f"{name}.bias": bias})
    gains, offsets = 1 + 0.1 * bias, 0.3 * bias
    fact = Requantization({name: SiteCorrection(tuple(gains.tolist()), tuple(offsets.tolist()))})
    plain, folded = run("insert-qdq", program), run("insert-qdq", program.with_facts(fact))
    scale = f"{name}.weight_scale"
    torch.testing.assert_close(folded.constants[scale], gains * plain.constants[scale], rtol=1e-6, atol=0)
    torch.testing.assert_close(folded.constants[f"{name}.corrected_bias"], gains * bias + offsets, rtol=1e-6, atol=0)
    assert torch.equal(folded.constants[f"{name}.weight_codes"], plain.constants[f"{name}.weight_codes"])


def test_coarse_weights_lose_less_with_it(captured: Program, run: Run) -> None:
    planned = run(PLANNED, captured)
    exact = latents(captured)
    errors = [
        float(np.square(latents(run(passes, planned)) - exact).mean())
        for passes in ("insert-qdq", "fit-requantization,insert-qdq")
    ]
    assert errors[1] < 0.8 * errors[0]


def test_consumers_are_the_block_after_the_cached_range(captured: Program, run: Run) -> None:
    program = run(f"plan-cache{{interval=3 blocks=0..0}},insert-cache,{PLANNED}", captured)
    found = run("fit-requantization{sites=consumers}", program).facts[Requantization].sites
    assert found
    assert {name.split(".mlp")[0].split(".attn")[0] for name in found} == {"blocks.1"}


def test_without_consumers_nothing_is_fitted(coarse: Program, run: Run) -> None:
    program = run("fit-requantization{sites=consumers}", coarse)
    assert program.facts[Requantization].sites == {}
    assert "nothing follows the cached blocks" in program.history[-1].refusals[0].reason
