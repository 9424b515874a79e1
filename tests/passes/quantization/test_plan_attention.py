"""plan-attention: codes of the products of attention, the probabilities in one region or two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qcgraph.errors import ContractError, UsageError
from qcgraph.facts import ActivationQuant, AttentionPlan, RegionQuant
from qcgraph.ir.attention import find_attention
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites

Run = Callable[[str, Program], Program]
Predict = Callable[[Program], torch.Tensor]
SET = "calibrate{trajectories=4 selection=uniform latents=24},group-timesteps{groups=2}"
NAMES = ("blocks.0.attn.attention", "blocks.1.attn.attention")


def test_split_attention_is_the_same_function(sharp: Program, run: Run, prediction: Predict) -> None:
    program = run("split-attention", sharp)
    torch.testing.assert_close(prediction(program), prediction(sharp), rtol=1e-5, atol=1e-5)
    assert not [site for site in find_sites(program.variants["full"]) if site.kind == "attention"]
    assert tuple(found.name for found in find_attention(program.variants["full"])) == NAMES


def test_masked_attention_is_not_split(sharp: Program, run: Run) -> None:
    """Nor any other whose products are not plain; the reason is recorded."""
    graph = sharp.variants["full"].graph
    node = next(node for node in graph.nodes if node.target is torch.ops.aten.scaled_dot_product_attention.default)
    node.kwargs = {"is_causal": True}
    try:
        program = run("split-attention", sharp)
    finally:
        node.kwargs = {}
    assert [(found.where, found.reason) for found in program.history[-1].refusals] == [
        (NAMES[0], "its attention is causal")
    ]
    assert tuple(found.name for found in find_attention(program.variants["full"])) == NAMES[1:]


def test_golden(split: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("plan-attention", split, run("plan-attention", split))


def test_it_only_decides(split: Program, run: Run) -> None:
    planned = run("plan-attention", split)
    assert planned.variants == split.variants
    assert planned.constants == split.constants


def test_without_regions_the_probabilities_have_one(split: Program, run: Run) -> None:
    sites = run("plan-attention{regions=false}", split).facts[AttentionPlan].sites
    assert all(isinstance(site.probabilities, ActivationQuant) for site in sites.values())


def test_one_timestep_group_has_one_of_each(sharp: Program, run: Run) -> None:
    text = SET.replace("groups=2", "groups=1")
    for site in run(f"split-attention,{text},plan-attention", sharp).facts[AttentionPlan].sites.values():
        assert len(site.query.scales) == len(site.key.scales) == len(site.value.scales) == 1
        assert isinstance(site.probabilities, RegionQuant)
        assert len(site.probabilities.splits) == 1


def test_symmetric_codes_have_no_zero_point(split: Program, run: Run) -> None:
    for site in run("plan-attention{symmetric=true}", split).facts[AttentionPlan].sites.values():
        for quant in (site.query, site.key, site.value):
            assert quant.dtype == "int8"
            assert not any(quant.zero_points)
        assert site.probabilities.dtype == "int8"


def test_attention_that_overflows_is_left_alone(sharp: Program, run: Run) -> None:
    name = "blocks.0.attn.qkv.weight"
    weight = sharp.constants[name].clone()
    weight[: len(weight) // 3] = 1e38
    broken = replace(run(f"split-attention,{SET}", sharp), constants={**sharp.constants, name: weight})
    program = run("plan-attention", broken)
    reasons = {found.where: found.reason for found in program.history[-1].refusals}
    assert reasons[NAMES[0]].endswith("is not finite during calibration")
    assert NAMES[0] not in program.facts[AttentionPlan].sites


def test_attention_of_zeros_is_left_alone(sharp: Program, run: Run) -> None:
    name, bias = "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.bias"
    constants = {**sharp.constants, **{key: torch.zeros_like(sharp.constants[key]) for key in (name, bias)}}
    program = run("plan-attention", replace(run(f"split-attention,{SET}", sharp), constants=constants))
    reasons = {found.where: found.reason for found in program.history[-1].refusals}
    assert reasons[NAMES[1]] == "its query is zero during calibration"
    assert tuple(program.facts[AttentionPlan].sites) == NAMES[:1]


def test_attention_that_was_not_split_is_none(sharp: Program, run: Run) -> None:
    program = run(f"{SET},plan-attention", sharp)
    assert program.facts[AttentionPlan] == AttentionPlan({})
    assert [found.reason for found in program.history[-1].refusals] == [
        "no attention in its products: split-attention goes before"
    ]


@pytest.mark.parametrize("bits", [2, 9])
def test_other_bits_are_refused(split: Program, run: Run, bits: int) -> None:
    with pytest.raises(UsageError, match=f"bits {bits}"):
        run(f"plan-attention{{bits={bits}}}", split)


def test_it_needs_a_calibration_set(sharp: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="CalibrationSet"):
        run("split-attention,plan-attention", sharp)


def test_groups_without_samples_get_the_scales_of_all(sharp: Program, run: Run) -> None:
    text = "calibrate{trajectories=4 selection=uniform latents=1},group-timesteps{groups=3}"
    program = run(f"split-attention,{text},plan-attention", sharp)
    reasons = [found.reason for found in program.history[-1].refusals]
    assert any(reason.startswith("no sample tells in timestep groups") for reason in reasons)
    for site in program.facts[AttentionPlan].sites.values():
        assert all(scale > 1e-6 for scale in site.query.scales)
