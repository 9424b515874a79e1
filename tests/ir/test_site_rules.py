"""The fact of quantized sites is compared with the graphs: every wrong entry is refused, with its site and node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from qcgraph.errors import ContractError
from qcgraph.facts import (
    ActivationQuant,
    AttentionPlan,
    AttentionQuant,
    QuantizedAttention,
    QuantizedSites,
    QuantPlan,
    SiteQuant,
    WeightQuant,
)
from qcgraph.ir import legality
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.program import Program
from qcgraph.ir.site_rules import find_wrong_sites
from qcgraph.pipeline import Pass, PassContext, Pipeline
from qcgraph.plan.steps import StepPlan

ops = torch.ops.qcgraph
SITE, OTHER, ATTENTION = "blocks.0.attn.qkv", "blocks.1.mlp.fc1", "blocks.0.attn.attention"
INSERT = "split-attention,insert-attention-qdq,insert-qdq"
SCALES = ActivationQuant((0.02, 0.03, 0.05), (0, 0, 0), -128, 127, "int8")


@pytest.fixture(scope="module")
def inserted(cached: Program) -> Program:
    """Two linears and an attention with symmetric codes in three timestep groups."""
    steps, quant = cached.facts[StepPlan], SiteQuant(SCALES, WeightQuant(127))
    attention = AttentionQuant(SCALES, SCALES, SCALES, SCALES)
    groups = [index // 3 for index in range(len(steps))]
    plans = (QuantPlan({SITE: quant, OTHER: quant}), AttentionPlan({ATTENTION: attention}))
    return Pipeline.parse(INSERT).run(cached.with_facts(*plans, steps.with_groups(groups)))


@pytest.fixture(scope="module")
def referenced(inserted: Program) -> Program:
    """The same, lowered and with constant scales."""
    return Pipeline.parse("lower-linear,reference-scales").run(inserted)


def changed(program: Program, *, nodes: Mapping[str, str] | None = None, **fields: Any) -> Program:
    """The program where the fact says something else of a linear."""
    sites = program.facts[QuantizedSites]
    linear = sites.linears[SITE]
    placed = {"full": replace(linear.nodes["full"], **(nodes or {}))}
    wrong = replace(linear, nodes=placed, **fields)
    return program.with_facts(replace(sites, linears={**sites.linears, SITE: wrong}))


def attention_changed(program: Program, *, variant: str = "full", **fields: Any) -> Program:
    """The program where the fact says something else of an attention."""
    sites = program.facts[QuantizedSites]
    placed = replace(sites.attentions[ATTENTION].nodes["full"], **fields)
    return program.with_facts(replace(sites, attentions={ATTENTION: QuantizedAttention({variant: placed})}))


def test_what_passes_write_is_true(inserted: Program, referenced: Program) -> None:
    for program in (inserted, referenced):
        assert not list(find_wrong_sites(program))
        assert set(program.facts[QuantizedSites].linears) == {SITE, OTHER}
        assert set(program.facts[QuantizedSites].attentions) == {ATTENTION}


def node_of(program: Program, site: str, role: str) -> str:
    return str(getattr(program.facts[QuantizedSites].linears[site].nodes["full"], role))


@pytest.mark.parametrize("constant", ["codes", "scale"])
def test_a_constant_that_is_not_there(inserted: Program, constant: str) -> None:
    wrong = changed(inserted, **{constant: "gone"})
    assert next(find_wrong_sites(wrong)) == f"quantized site {SITE}: its constant 'gone' is not there"


def test_a_variant_that_is_not_there(inserted: Program) -> None:
    sites = inserted.facts[QuantizedSites]
    nodes = sites.linears[SITE].nodes["full"]
    linear = replace(sites.linears[SITE], nodes={"full": nodes, "fuller": nodes})
    wrong = inserted.with_facts(replace(sites, linears={**sites.linears, SITE: linear}))
    assert list(find_wrong_sites(wrong)) == [f"quantized site {SITE} in fuller: there is no such variant"]


def test_a_site_in_no_variant(inserted: Program) -> None:
    sites = inserted.facts[QuantizedSites]
    linear = replace(sites.linears[SITE], nodes={})
    wrong = inserted.with_facts(replace(sites, linears={**sites.linears, SITE: linear}))
    assert next(find_wrong_sites(wrong)) == f"quantized site {SITE}: it is in no variant"


@pytest.mark.parametrize("role", ["quantizer", "product", "leaving", "divides", "rescales"])
def test_a_node_that_is_gone(referenced: Program, role: str) -> None:
    (what,) = {text for text in find_wrong_sites(changed(referenced, nodes={role: "lost"})) if SITE in text}
    assert what.startswith(f"quantized site {SITE} in full: its ")
    assert what.endswith(" %lost is gone")


def test_a_quantizer_that_makes_no_codes(inserted: Program) -> None:
    product = node_of(inserted, SITE, "product")
    found = list(find_wrong_sites(changed(inserted, nodes={"quantizer": product})))
    assert f"quantized site {SITE} in full: its quantizer %{product} makes no codes" in found


def test_a_product_that_takes_another_activation(inserted: Program) -> None:
    other, product = node_of(inserted, OTHER, "quantizer"), node_of(inserted, SITE, "product")
    found = list(find_wrong_sites(changed(inserted, nodes={"quantizer": other})))
    assert found == [f"quantized site {SITE} in full: its product %{product} does not take what %{other} quantizes"]


def test_a_product_that_takes_no_codes(inserted: Program) -> None:
    """Another product, in floating point: one that no site names is left, too."""
    nodes = inserted.variants["full"].graph.nodes
    plain = next(node for node in nodes if node.target is torch.ops.aten.linear.default)
    found = list(find_wrong_sites(changed(inserted, nodes={"product": plain.name, "leaving": plain.name})))
    assert f"quantized site {SITE} in full: its product %{plain.name} does not take dequantized codes" in found
    left = node_of(inserted, SITE, "product")
    assert f"product %{left} in full is quantized, and no site names it" in found


@pytest.mark.parametrize("constant", ["codes", "scale"])
def test_a_product_that_takes_other_constants(inserted: Program, constant: str) -> None:
    other = getattr(inserted.facts[QuantizedSites].linears[OTHER], constant)
    product = node_of(inserted, SITE, "product")
    found = list(find_wrong_sites(changed(inserted, **{constant: other})))
    expected = f"its product %{product} does not take the {constant} {other!r}"
    assert found == [f"quantized site {SITE} in full: {expected}"]


@pytest.mark.parametrize(("stage", "layout"), [("inserted", "[in,out]"), ("referenced", "[out,in]")])
def test_codes_of_the_other_layout(request: pytest.FixtureRequest, stage: str, layout: str) -> None:
    program: Program = request.getfixturevalue(stage)
    found = list(find_wrong_sites(changed(program, transposed=stage == "inserted")))
    product = node_of(program, SITE, "product")
    expected = f"its product %{product} does not take codes of the layout {layout}"
    assert found == [f"quantized site {SITE} in full: {expected}"]


def test_a_ratio_on_one_side(referenced: Program) -> None:
    found = list(find_wrong_sites(changed(referenced, nodes={"divides": ""})))
    product = node_of(referenced, SITE, "product")
    assert found == [f"quantized site {SITE} in full: its product %{product} has a ratio of scales on one side alone"]


def test_a_division_that_is_not_quantized(referenced: Program) -> None:
    other, quantizer = node_of(referenced, OTHER, "divides"), node_of(referenced, SITE, "quantizer")
    found = list(find_wrong_sites(changed(referenced, nodes={"divides": other})))
    assert found == [f"quantized site {SITE} in full: its quantizer %{quantizer} does not take what %{other} divides"]


def test_a_ratio_of_another_product(referenced: Program) -> None:
    other, product = node_of(referenced, OTHER, "rescales"), node_of(referenced, SITE, "product")
    found = list(find_wrong_sites(changed(referenced, nodes={"rescales": other})))
    assert f"quantized site {SITE} in full: its ratio %{other} does not multiply the product %{product}" in found


def test_a_result_of_another_site(referenced: Program) -> None:
    other, product = node_of(referenced, OTHER, "leaving"), node_of(referenced, SITE, "rescales")
    found = list(find_wrong_sites(changed(referenced, nodes={"leaving": other})))
    assert found == [f"quantized site {SITE} in full: its result %{other} is not made of %{product}"]


def test_a_product_that_no_site_names(inserted: Program) -> None:
    sites = inserted.facts[QuantizedSites]
    forgotten = inserted.with_facts(replace(sites, linears={OTHER: sites.linears[OTHER]}))
    product = node_of(inserted, SITE, "product")
    assert list(find_wrong_sites(forgotten)) == [f"product %{product} in full is quantized, and no site names it"]


def test_a_program_without_the_fact(inserted: Program) -> None:
    found = list(find_wrong_sites(replace(inserted, facts=inserted.facts.without(QuantizedSites))))
    assert len(found) == 4  # two linears, and both products of the attention
    assert all(text.endswith("is quantized, and no site names it") for text in found)


def test_an_attention_of_a_variant_that_is_not_there(inserted: Program) -> None:
    found = list(find_wrong_sites(attention_changed(inserted, variant="fuller")))
    assert f"quantized site {ATTENTION} in fuller: there is no such variant" in found


@pytest.mark.parametrize("fields", [{"products": ("lost",)}, {"quantizers": {"query": ("lost",)}}])
def test_a_node_of_an_attention_that_is_gone(inserted: Program, fields: Mapping[str, Any]) -> None:
    found = list(find_wrong_sites(attention_changed(inserted, **fields)))
    assert f"quantized site {ATTENTION} in full: its node %lost is gone" in found


def test_an_attention_whose_quantizer_makes_no_codes(inserted: Program) -> None:
    placed = inserted.facts[QuantizedSites].attentions[ATTENTION].nodes["full"]
    wrong = {**placed.quantizers, "query": (placed.products[0],)}
    found = list(find_wrong_sites(attention_changed(inserted, quantizers=wrong)))
    assert f"quantized site {ATTENTION} in full: its quantizer %{placed.products[0]} makes no codes" in found


def test_an_attention_whose_product_takes_other_codes(inserted: Program) -> None:
    placed = inserted.facts[QuantizedSites].attentions[ATTENTION].nodes["full"]
    product, other = placed.products[0], node_of(inserted, SITE, "quantizer")
    wrong = {**placed.quantizers, "query": (other,)}
    found = list(find_wrong_sites(attention_changed(inserted, quantizers=wrong)))
    expected = f"its product %{product} takes what none of its quantizers makes"
    assert found == [f"quantized site {ATTENTION} in full: {expected}"]


@dataclass(frozen=True)
class Forgets(Pass):
    """Quantize a product anew, and say nothing of it."""

    name: ClassVar[str] = "forgets"

    def run(self, program: Program, context: PassContext) -> Program:
        editor = GraphEditor(program.variants["full"], program.constants, self.name)
        quantize = next(node for node in editor.graph.nodes if node.target is ops.quantize.default)
        with editor.before(quantize):
            quantize.replace_all_uses_with(editor.call(quantize.target, *quantize.args, source=quantize))
        return with_edits(program, {"full": editor})


@pytest.mark.parametrize("stage", ["inserted", "referenced"])
def test_a_pass_that_forgets_fails_at_once(request: pytest.FixtureRequest, stage: str) -> None:
    program: Program = request.getfixturevalue(stage)
    quantizer = node_of(program, SITE, "quantizer")
    with pytest.raises(ContractError, match=f"quantized site {SITE} in full: .*%{quantizer} is gone") as caught:
        Pipeline((Forgets(),)).run(program)
    assert "pass forgets" in str(caught.value.where)


def test_the_legality_table_has_the_rule(inserted: Program) -> None:
    for right in (inserted, changed(inserted), attention_changed(inserted)):
        legality.verify(right)
    for wrong in (changed(inserted, nodes={"product": "lost"}), attention_changed(inserted, products=("lost",))):
        with pytest.raises(ContractError, match=r"quantized site .* %lost is gone"):
            legality.verify(wrong)
