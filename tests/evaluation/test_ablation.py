"""Parts that are taken out leave exactly what was there without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.errors import BundleError
from qcgraph.evaluation.ablation import (
    activation_quantizers,
    compensation_tables,
    dequantized_weight,
    float_weight,
    without_compensation,
    without_quantization,
)
from qcgraph.export.targets import TARGETS
from qcgraph.facts import QuantPlan
from qcgraph.ir import legality
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import quantized_sites
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.recipe import Recipe
from qcgraph.sampling.loop import sample

LABELS = [0, 1, 2, 3]


def draw(program: Program) -> np.ndarray:
    return sample(TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], LABELS, 7)


def compile_like(captured: Program, recipe: Recipe, **options: str) -> Program:
    return default_pipeline(recipe.override(**options), TARGETS["torch"]).run(captured)


def test_without_all_is_the_cached_model(compiled: Program, captured: Program, recipe: Recipe) -> None:
    bare = without_compensation(without_quantization(compiled, captured))
    legality.verify(bare)
    cached = compile_like(captured, recipe, bits="off", compensate="off")
    np.testing.assert_allclose(draw(bare), draw(cached), atol=2e-4)  # of latents of 100
    assert not activation_quantizers(bare)


@pytest.mark.slow
def test_without_compensation_is_the_quantized_cached_model(
    compiled: Program, captured: Program, recipe: Recipe
) -> None:
    steps = default_pipeline(recipe, TARGETS["torch"]).passes
    uncompensated = type(default_pipeline(recipe, TARGETS["torch"]))(steps[:-2]).run(captured)
    if compiled.facts[QuantPlan] == uncompensated.facts[QuantPlan]:  # the same codes, hence the same target
        np.testing.assert_array_equal(draw(without_compensation(compiled)), draw(uncompensated))
    assert len(compensation_tables(compiled)) == 3
    assert not np.array_equal(draw(without_compensation(compiled)), draw(compiled))


def test_kept_sites_stay_quantized(compiled: Program, captured: Program) -> None:
    sites = [site.name for site in quantized_sites(compiled, "full")]
    one = without_quantization(compiled, captured, keep=sites[:1])
    assert [site.name for site in quantized_sites(one, "full")] == sites[:1]
    assert without_quantization(compiled, captured, keep=sites) is not None
    np.testing.assert_array_equal(draw(without_quantization(compiled, captured, keep=sites)), draw(compiled))
    assert not np.array_equal(draw(one), draw(without_quantization(compiled, captured)))


def test_a_model_without_the_weights_is_refused(compiled: Program, captured: Program) -> None:
    lacking = replace(captured, constants={"other": torch.zeros(1)})
    with pytest.raises(BundleError, match="no weight"):
        without_quantization(compiled, lacking)


def test_quantizers_and_weights_are_what_the_plan_says(compiled: Program, captured: Program) -> None:
    plan = compiled.facts[QuantPlan]
    found = {site: quantizer for quantizer in activation_quantizers(compiled) for site in quantizer.sites}
    assert set(found) == set(plan.sites)
    for name, quantizer in found.items():
        activation = plan.sites[name].activation
        assert quantizer.high == activation.high
        for group in range(2):
            scale, zero_point = quantizer.parameters(group)
            position = group if len(activation.scales) > 1 else 0
            assert scale == pytest.approx(activation.scales[position], rel=1e-6)
            assert zero_point == activation.zero_points[position]
    for site in quantized_sites(compiled, "full"):
        weight = float_weight(site, captured, compiled)
        error = (dequantized_weight(compiled, "full", site) - weight).norm() / weight.norm()
        assert error <= 2 / plan.sites[site.name].weight.high  # some are rounded to make up for others, or in pairs
