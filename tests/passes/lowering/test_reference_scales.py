"""reference-scales: constant scales, ratios for each timestep group around the product, the same function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qcgraph.errors import ContractError
from qcgraph.evaluation.ablation import without_quantization
from qcgraph.facts import ActivationQuant, QuantizedSites, QuantPlan, SiteQuant, WeightQuant
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import quantized_products, quantized_sites
from qcgraph.passes.lowering.reference_scales import reference_scale
from qcgraph.plan.steps import StepPlan

Run = Callable[[str, Program], Program]
ops = torch.ops.qcgraph
GROUPED = "blocks.0.attn.qkv"
STATIC = "blocks.1.mlp.fc1"
LOWER = "insert-qdq,lower-linear"
GROUPS = range(3)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def quantized(
    cached: Program, activation: ActivationQuant, *, others: dict[str, ActivationQuant] | None = None
) -> Program:
    """The cached tiny denoiser with a hand-written plan: a symmetric activation, and a static one."""
    weight, static = WeightQuant(127), ActivationQuant((0.05,), (0,), -128, 127, "int8")
    activations = {GROUPED: activation, STATIC: static, **(others or {})}
    steps = cached.facts[StepPlan]
    groups = [index // 3 for index in range(len(steps))]
    plan = QuantPlan({name: SiteQuant(quant, weight) for name, quant in activations.items()})
    return cached.with_facts(plan, steps.with_groups(groups))


def symmetric(*scales: float, low: int = -128, high: int = 127) -> ActivationQuant:
    return ActivationQuant(scales, (0,) * len(scales), low, high, "int8")


@pytest.fixture(scope="module")
def lowered(cached: Program, run: Run) -> Program:
    return run(LOWER, quantized(cached, symmetric(0.02, 0.03, 0.05)))


@pytest.fixture(scope="module")
def referenced(lowered: Program, run: Run) -> Program:
    return run("reference-scales", lowered)


def prediction(program: Program, group: int) -> torch.Tensor:
    inputs = {
        "latent": torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(group)),
        "timestep": torch.full((3,), 700.0),
        "class_label": torch.arange(3),
        "group": torch.tensor(group),
    }
    names = program.variants["full"].interface.input_names
    return program.run("full", {name: inputs[name] for name in names})["noise_prediction"]


def test_golden(lowered: Program, referenced: Program, golden_diff: Callable[..., None]) -> None:
    golden_diff("reference-scales", lowered, referenced)


@pytest.mark.parametrize("group", GROUPS)
def test_it_is_the_same_function_in_every_group(lowered: Program, referenced: Program, group: int) -> None:
    torch.testing.assert_close(prediction(referenced, group), prediction(lowered, group), **CLOSE)


@pytest.mark.parametrize("high", [127, 31, 7])
@pytest.mark.parametrize("group", GROUPS)
def test_also_with_fewer_bits_and_scales_far_apart(cached: Program, run: Run, high: int, group: int) -> None:
    program = run(LOWER, quantized(cached, symmetric(0.003, 3.0, 0.1, low=-high - 1, high=high)))
    torch.testing.assert_close(prediction(run("reference-scales", program), group), prediction(program, group), **CLOSE)


@pytest.mark.parametrize("group", GROUPS)
def test_it_is_exact_where_all_groups_have_the_same_scale(cached: Program, run: Run, group: int) -> None:
    program = run(LOWER, quantized(cached, symmetric(0.03, 0.03, 0.03)))
    assert torch.equal(prediction(run("reference-scales", program), group), prediction(program, group))


def test_quantizers_have_constants(referenced: Program) -> None:
    nodes = referenced.variants["full"].graph.nodes
    quantizers = [node for node in nodes if node.target in (ops.quantize.default, ops.dequantize.default)]
    assert len(quantizers) == 6  # two activations, each quantized and dequantized, and two weights
    for node in quantizers:
        assert [parameter.op for parameter in node.args[1:3]] == ["get_attr"] * 2
    assert referenced.constants[f"{GROUPED}.input_zero_point_reference"].item() == 0


def test_ratios_are_near_one(referenced: Program) -> None:
    reference = referenced.constants[f"{GROUPED}.input_scale_reference"]
    ratio, inverse = (referenced.constants[f"{GROUPED}.input_scale_{name}"] for name in ("ratio", "inverse"))
    torch.testing.assert_close(reference * ratio, torch.tensor([0.02, 0.03, 0.05]))
    torch.testing.assert_close(ratio.log().sum(), torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(ratio * inverse, torch.ones(3))


@pytest.mark.parametrize("scales", [(0.02,), (1e-30, 1e30), (0.7, 0.7, 0.7)])
def test_the_reference_is_the_geometric_mean(scales: tuple[float, ...]) -> None:
    found = reference_scale(torch.tensor(scales))
    assert found.item() == pytest.approx(float(torch.tensor(scales).double().log().mean().exp()), rel=1e-6)
    if len(set(scales)) == 1:
        assert torch.equal(found, torch.tensor(scales[0]))


def test_static_activations_stay_as_they_are(cached: Program, run: Run) -> None:
    program = run(LOWER, quantized(cached, symmetric(0.03)))
    assert not run("reference-scales", program).history[-1].changed


def test_nothing_quantized_nothing_changed(captured: Program, run: Run) -> None:
    assert not run("reference-scales", captured).history[-1].changed


def test_a_second_time_changes_nothing(referenced: Program, run: Run) -> None:
    assert not run("reference-scales", referenced).history[-1].changed


def test_linears_of_one_activation_share_a_quantize(cached: Program, run: Run) -> None:
    """As where queries, keys and values are projected apart; here a second linear reads what the first does."""
    program = run("insert-qdq", quantized(cached, symmetric(0.02, 0.03, 0.05)))
    graph = program.variants["full"].graph
    quantize = next(node for node in graph.nodes if node.target is ops.quantize.default)
    (dequantize,) = quantize.users
    (linear,) = dequantize.users
    with graph.inserting_after(linear):
        second = graph.create_node("call_function", linear.target, linear.args)
    with graph.inserting_after(second):
        both = graph.create_node("call_function", torch.ops.aten.add.Tensor, (linear, second))
    second.meta, both.meta = dict(linear.meta), dict(linear.meta)
    linear.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)
    sites = program.facts[QuantizedSites]
    placed = replace(sites.linears[GROUPED].nodes["full"], product=second.name, leaving=second.name)
    other = replace(sites.linears[GROUPED], nodes={"full": placed})
    before = run("lower-linear", program.with_facts(replace(sites, linears={**sites.linears, "second": other})))
    after = run("reference-scales", before)
    assert after.text.count("qcgraph.quantize(") == before.text.count("qcgraph.quantize(") == 2
    rescaled = [site for site in quantized_sites(after, "full") if site.is_rescaled]
    assert len(rescaled) == 2
    assert len({site.entering for site in rescaled}) == 1
    torch.testing.assert_close(prediction(after, 2), prediction(before, 2), **CLOSE)


def test_sites_are_found_as_before(lowered: Program, referenced: Program) -> None:
    before, after = (quantized_sites(program, "full") for program in (lowered, referenced))
    assert [site.is_rescaled for site in after] == [True, False]
    assert not any(site.is_rescaled for site in before)
    for one, other in zip(before, after, strict=True):
        assert (one.name, one.entering, one.codes, one.has_bias) == (
            other.name,
            other.entering,
            other.codes,
            other.has_bias,
        )


@pytest.mark.parametrize("group", GROUPS)
def test_without_quantization_nothing_is_left_of_it(
    referenced: Program, cached: Program, captured: Program, group: int
) -> None:
    bare = without_quantization(referenced, captured)
    assert "select(" not in bare.text
    torch.testing.assert_close(prediction(bare, group), prediction(cached, group), **CLOSE)


@pytest.mark.parametrize("bits", [8, 6])
def test_products_of_attention(cached: Program, run: Run, bits: int) -> None:
    """Both factors have a ratio."""
    quantize = f"plan-attention{{bits={bits} symmetric=true regions=false}},insert-attention-qdq"
    observed = "split-attention,calibrate{trajectories=4 selection=uniform latents=24},group-timesteps{groups=2}"
    before = run(f"{observed},{quantize}", cached)
    after = run("reference-scales", before)
    assert len(quantized_products(after, "full")) == 4
    for group in range(2):
        torch.testing.assert_close(prediction(after, group), prediction(before, group), **CLOSE)
    bare = without_quantization(after, cached)
    torch.testing.assert_close(prediction(bare, 1), prediction(cached, 1), **CLOSE)


BITS = ActivationQuant((0.02, 0.3, 0.02), (0, 0, 0), -128, 127, "int8", bits=(8, 4, 8))
REGIONS = ActivationQuant((0.01, 0.02, 0.01), (0, 0, 0), -31, 124, "int8", shift=2)
ASYMMETRIC = ActivationQuant((0.02, 0.03, 0.04), (100, 110, 120), 0, 255, "uint8")


@pytest.mark.parametrize(
    ("activation", "reason", "remedy"),
    [
        (ASYMMETRIC, "its zero points are not 0", "symmetric=true"),
        (REGIONS, "it has two regions", "search-scales{regions=false}"),
        (BITS, "it has other bits in other timestep groups", "allocate-bits{groups=false}"),
    ],
)
def test_what_has_no_constant_scale_is_refused(
    cached: Program, run: Run, activation: ActivationQuant, reason: str, remedy: str
) -> None:
    with pytest.raises(ContractError) as caught:
        run(f"{LOWER},reference-scales", quantized(cached, activation))
    assert caught.value.message == f"cannot have constant scales: {GROUPED} ({reason})"
    assert remedy in str(caught.value.hint)


def test_all_of_them_are_named(cached: Program, run: Run) -> None:
    others = {"blocks.1.attn.qkv": REGIONS, "blocks.1.mlp.fc2": BITS}
    with pytest.raises(ContractError) as caught:
        run(f"{LOWER},reference-scales", quantized(cached, ASYMMETRIC, others=others))
    message = caught.value.message
    assert all(f"{name} (it" in message for name in (GROUPED, *others))


def test_linears_have_to_be_lowered(cached: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="is not lowered") as caught:
        run("insert-qdq,reference-scales", quantized(cached, symmetric(0.02, 0.03, 0.05)))
    assert "lower-linear before" in str(caught.value.hint)
