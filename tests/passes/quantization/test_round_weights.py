"""round-weights: results change less than with nearest codes, and what is chosen is what insert-qdq takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qcgraph.errors import ContractError, UsageError
from qcgraph.facts import CalibrationSet, Facts, QuantPlan, RoundedWeight, RoundedWeights, WeightQuant
from qcgraph.ir import legality
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.graph import copy_graph, spec_of
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import nearest, quantize_weight, rounded_activation, weight_codes
from qcgraph.ir.quantized_sites import quantized_sites
from qcgraph.ir.rounding import search_scales
from qcgraph.passes.calibration._calibration_set import CalibrationBatch, entering
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import encode_latents
from qcgraph.sampling.loop import sample

Run = Callable[[str, Program], Program]
HIGH = 7  # the largest code of 4 bits
PLAN = "group-timesteps{groups=2},plan-quant{weight-bits=4}"
SITES = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture(scope="module")
def coarse(cached: Program, run: Run) -> Program:
    """The cached tiny denoiser with a calibration set and a plan of 4-bit weights."""
    return run(f"calibrate{{trajectories=6 selection=uniform latents=12}},{PLAN}", cached)


def weights_of(program: Program) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scales of every weight, by site."""
    return {name: weight_codes(program, name, f"{name}.weight") for name in SITES}


def chosen(program: Program, site: str) -> RoundedWeight:
    """What round-weights says of a site's weight."""
    found = program.facts[RoundedWeights].sites[site]
    assert found is not None
    return found


def result_errors(program: Program, coarse: Program) -> dict[str, float]:
    """Mean squared error that the weights of a program make in the results of every site, activations rounded."""
    rows, plan = CalibrationBatch.of(coarse), coarse.facts[QuantPlan].sites
    found = {}
    for site, value in entering(coarse, rows, set(SITES)):
        codes, scale = weights_of(program)[site.name]
        error = codes * scale[:, None] - coarse.constants[f"{site.name}.weight"]
        rounded = rounded_activation(value, rows.groups, plan[site.name].activation)
        found[site.name] = float((rounded @ error.t()).square().mean())
    return found


def test_the_graphs_stay_as_they_are_until_insert_qdq(coarse: Program, run: Run) -> None:
    program = run("round-weights", coarse)
    assert program.text == coarse.text
    assert program.history[-1].changed
    new = {name for site in SITES for name in (chosen(program, site).codes, chosen(program, site).scale)}
    assert set(program.constants) - set(coarse.constants) == new
    assert all(program.constants[name] is value for name, value in coarse.constants.items())


def test_round_weights_golden(coarse: Program, run: Run, golden: Callable[[str, str], None]) -> None:
    """The constants that it adds: graphs do not show what nothing refers to yet."""
    program = run("round-weights", coarse)
    new = [(name, value) for name, value in program.constants.items() if name not in coarse.constants]
    golden("round-weights", "".join(f"{name}: {spec_of('', value)}\n" for name, value in new))


def test_with_it_insert_qdq_makes_the_same_graph_as_without(coarse: Program, run: Run) -> None:
    assert run("round-weights,insert-qdq", coarse).text == run("insert-qdq", coarse).text


@pytest.mark.parametrize("method", ["feedback", "search"])
def test_insert_qdq_takes_them(coarse: Program, run: Run, method: str) -> None:
    program = run(f"round-weights{{method={method}}}", coarse)
    inserted = run("insert-qdq", program)
    for site in SITES:
        found = chosen(program, site)
        assert torch.equal(inserted.constants[f"{site}.weight_codes"], program.constants[found.codes])
        assert torch.equal(inserted.constants[f"{site}.weight_scale"], program.constants[found.scale])
        assert found.codes not in inserted.constants
        assert found.scale not in inserted.constants
    assert RoundedWeights not in inserted.facts


@pytest.mark.parametrize("method", ["feedback", "search"])
def test_codes_and_scales_fit_the_plan(coarse: Program, run: Run, method: str) -> None:
    for site, (codes, scale) in weights_of(run(f"round-weights{{method={method}}}", coarse)).items():
        weight = coarse.constants[f"{site}.weight"]
        assert codes.dtype == torch.int8
        assert codes.shape == weight.shape
        assert codes.abs().max() == HIGH
        assert scale.dtype == torch.float32
        assert scale.shape == weight.shape[:1]
        assert (scale > 0).all()
        assert (scale <= weight.abs().amax(dim=1) / HIGH * (1 + 1e-6)).all()


def test_search_rounds_to_nearest_with_the_searched_scales(coarse: Program, run: Run) -> None:
    rows, plan = CalibrationBatch.of(coarse), coarse.facts[QuantPlan].sites
    found = weights_of(run("round-weights{method=search}", coarse))
    for site, value in entering(coarse, rows, set(SITES)):
        rounded = rounded_activation(value, rows.groups, plan[site.name].activation).flatten(0, -2)
        weight = coarse.constants[f"{site.name}.weight"]
        scale = search_scales(weight, rounded.t() @ rounded / len(rounded), WeightQuant(HIGH))
        codes, found_scale = found[site.name]
        assert (found_scale != scale).float().mean() < 0.02  # rows are in another order: a tie may fall otherwise
        assert torch.equal(codes.float(), nearest(weight, found_scale, WeightQuant(HIGH)))


def test_results_change_less(coarse: Program, run: Run) -> None:
    plain = result_errors(coarse, coarse)
    searched = result_errors(run("round-weights{method=search}", coarse), coarse)
    fed_back = result_errors(run("round-weights", coarse), coarse)
    for site in SITES:
        assert fed_back[site] < 0.8 * searched[site]
        assert searched[site] < plain[site]


def test_images_change_less(coarse: Program, captured: Program, run: Run) -> None:
    def latents(program: Program) -> np.ndarray:
        plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
        return sample(TorchRunner(program), plan, spec, [0, 1, 2, 3] * 4, seed=5)

    planned = run(f"calibrate{{trajectories=6 selection=uniform latents=24}},{PLAN}", captured)
    exact = latents(captured)
    plain, rounded = (
        float(np.square(latents(run(passes, planned)) - exact).mean())
        for passes in ("insert-qdq", "round-weights,insert-qdq")
    )
    assert rounded < 0.8 * plain


@pytest.mark.parametrize("method", ["feedback", "search"])
def test_a_weight_that_is_on_a_grid_stays_on_it(coarse: Program, run: Run, method: str) -> None:
    """Of 15 values 2^-6 apart, the largest in every row: 4 bits hold them, and nothing is left to round."""
    generator = torch.Generator().manual_seed(0)
    constants, codes = dict(coarse.constants), {}
    for site in SITES:
        codes[site] = torch.randint(-HIGH, HIGH + 1, constants[f"{site}.weight"].shape, generator=generator)
        codes[site][:, 0] = HIGH
        constants[f"{site}.weight"] = codes[site] * 2.0**-6
    program = run(f"round-weights{{method={method}}}", replace(coarse, constants=constants))
    for site, (found, scale) in weights_of(program).items():
        assert torch.equal(found, codes[site].to(torch.int8))
        assert torch.equal(scale, torch.full_like(scale, 2.0**-6))


def test_a_layer_without_a_plan_is_left_alone(coarse: Program, run: Run) -> None:
    sites = {name: site for name, site in coarse.facts[QuantPlan].sites.items() if name != SITES[3]}
    program = run("round-weights", coarse.with_facts(QuantPlan(sites)))
    assert set(program.facts[RoundedWeights].sites) == set(SITES) - {SITES[3]}
    assert chosen(program, SITES[2]).codes in program.constants
    empty = run("round-weights", coarse.with_facts(QuantPlan({})))
    assert empty.constants_digest == coarse.constants_digest
    assert empty.facts[RoundedWeights].sites == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite(coarse: Program, run: Run, value: float) -> None:
    found = coarse.facts[CalibrationSet]
    latents = np.full((len(found.steps), *coarse.facts[ModelSpec].latent_shape), value, dtype=np.float32)
    program = run("round-weights", coarse.with_facts(replace(found, latents=encode_latents(latents))))
    refusals = {refusal.where: refusal.reason for refusal in program.history[-1].refusals}
    assert set(refusals) == set(SITES)
    assert all(reason.startswith("rounded to nearest: its activation is not finite") for reason in refusals.values())
    plan = coarse.facts[QuantPlan].sites
    assert program.facts[RoundedWeights].sites == dict.fromkeys(SITES)  # said, not left to be noticed
    for site, (codes, _) in weights_of(program).items():
        assert torch.equal(codes, quantize_weight(coarse.constants[f"{site}.weight"], plan[site].weight)[0])


@pytest.mark.parametrize("kind", [CalibrationSet, QuantPlan])
def test_what_it_needs(coarse: Program, run: Run, kind: type) -> None:
    with pytest.raises(ContractError, match=f"needs {kind.__name__}") as caught:
        run("round-weights", replace(coarse, facts=coarse.facts.without(kind)))
    assert caught.value.hint


def test_a_bad_method(coarse: Program, run: Run) -> None:
    with pytest.raises(UsageError, match="method"):
        run("round-weights{method=nearest}", coarse)


def test_the_same_twice(coarse: Program, run: Run) -> None:
    assert run("round-weights", coarse).digest == run("round-weights", coarse).digest


def test_an_edit_in_between_leaves_them(coarse: Program, run: Run) -> None:
    """No graph refers to the codes until insert-qdq takes them; the fact holds them through edits before that."""
    program = run("round-weights", coarse)
    edited = run("split-attention", program)
    assert edited.facts[RoundedWeights] == program.facts[RoundedWeights]
    inserted = run("insert-qdq", edited)
    for site in SITES:
        assert torch.equal(inserted.constants[f"{site}.weight_codes"], program.constants[chosen(program, site).codes])


def test_the_fact_survives_being_written(coarse: Program, run: Run) -> None:
    facts = run("round-weights", coarse).facts
    assert Facts.decode(json.loads(json.dumps(facts.encode())))[RoundedWeights] == facts[RoundedWeights]


def without_codes(program: Program) -> Program:
    name = chosen(program, SITES[1]).codes
    return replace(program, constants={key: value for key, value in program.constants.items() if key != name})


def without_choice(program: Program) -> Program:
    found = program.facts[RoundedWeights]
    sites = {site: choice for site, choice in found.sites.items() if site != SITES[1]}
    return program.with_facts(replace(found, sites=sites))


def of_other_codes(program: Program) -> Program:
    plan = dict(program.facts[QuantPlan].sites)
    plan[SITES[1]] = replace(plan[SITES[1]], weight=WeightQuant(HIGH // 2))
    return program.with_facts(QuantPlan(plan))


def of_another_weight(program: Program) -> Program:
    name = f"{SITES[1]}.weight"
    return replace(program, constants={**program.constants, name: program.constants[name] * 2})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_codes, "are gone"),
        (without_choice, "no codes were chosen"),
        (of_other_codes, "chosen up to 7, and 3 is planned"),
        (of_another_weight, "its weight has changed"),
    ],
)
@pytest.mark.parametrize("taker", ["insert-qdq", "fit-requantization"])
def test_codes_are_not_guessed(
    coarse: Program, run: Run, change: Callable[[Program], Program], says: str, taker: str
) -> None:
    with pytest.raises(ContractError, match=says) as caught:
        run(taker, change(run("round-weights", coarse)))
    assert SITES[1] in str(caught.value.where)
    assert caught.value.hint


def test_a_pass_that_drops_them_is_caught(coarse: Program, run: Run) -> None:
    broken = without_codes(run("round-weights", coarse))
    with pytest.raises(ContractError, match="a fact holds constant"):
        legality.verify(broken)


def test_weights_that_are_floating_point_are_refused(coarse: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="fp8") as caught:
        run("plan-quant{format=fp8},round-weights", coarse)
    assert caught.value.hint


def test_layers_that_share_a_weight_have_codes_of_their_own(coarse: Program, run: Run) -> None:
    """Each for its own activations and bits; a correction is that of its own layer too."""
    one, other = "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"
    program = shared(coarse, one, other)
    plan = dict(program.facts[QuantPlan].sites)
    plan[other] = replace(plan[other], weight=WeightQuant(127))
    rounded = run("round-weights", program.with_facts(QuantPlan(plan)))
    codes = {site: rounded.constants[chosen(rounded, site).codes] for site in (one, other)}
    assert codes[one].abs().max() == HIGH
    assert codes[other].abs().max() == 127
    inserted = run("fit-requantization,insert-qdq", rounded)
    held = {site.name: site.codes for site in quantized_sites(inserted, "full")}
    assert torch.equal(inserted.constants[held[one]], codes[one])
    assert torch.equal(inserted.constants[held[other]], codes[other])


def shared(program: Program, one: str, other: str) -> Program:
    """The program with the weight of one layer in the place of another's."""
    variants = {name: replace(found, graph=copy_graph(found.graph)) for name, found in program.variants.items()}
    for variant in variants.values():
        nodes = {str(node.target): node for node in variant.graph.nodes if node.op == "get_attr"}
        if f"{other}.weight" in nodes:
            nodes[f"{other}.weight"].replace_all_uses_with(nodes[f"{one}.weight"])
            variant.graph.erase_node(nodes[f"{other}.weight"])
    return replace(program, variants=variants)
