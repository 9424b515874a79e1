"""The fact of quantized sites after every pass of default pipelines, against what the graphs themselves show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx

from qcgraph.capture.capture import capture
from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.export.targets import TARGETS
from qcgraph.facts import AttentionPlan, LinearNodes, QuantizedLinear, QuantizedSites, QuantPlan
from qcgraph.ir.graph import Variant
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.models import load_model
from qcgraph.pipeline import Pass, Pipeline
from qcgraph.pipeline.instruments import Instrument
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.recipe import Recipe

pytestmark = pytest.mark.slow  # many captures and exports, each short
aten = torch.ops.aten
ops = torch.ops.qcgraph
STEPS = 5
QUANTIZES = (ops.quantize.default, ops.quantize_regions.default)
RECIPE = """
[sampling]
steps = 5
[calibration]
trajectories = 2
samples = 6
[quantization]
groups = 2
equalize = false
{quantization}
[cache]
schedule = "{schedule}"
forecast = "{forecast}"
[modulation]
hoist = true
[target]
name = "{target}"
"""


@pytest.fixture(scope="module")
def digits(small_digits: Path) -> Program:
    model = load_model(str(small_digits))
    program = capture(model.module, model.spec, model.input_names)
    return program.with_facts(make_step_plan("ddim", STEPS, 1.5, model.spec.noise_schedule, program.constants_digest))


class Watching(Instrument):
    """Compares the fact with what is seen in the graphs, after every pass."""

    def __init__(self, origin: Program) -> None:
        self.origin = origin
        self.seen: list[tuple[str, int]] = []

    def after(self, pass_: Pass, before: Program, after: Program) -> None:
        sites = after.facts.get(QuantizedSites) or QuantizedSites({}, {})
        for name, variant in after.variants.items():
            named = {site: (linear, nodes) for site, linear, nodes in sites.linears_of(name)}
            seen = {site: found for site, *found in seen_linears(variant)}
            assert {site: nodes for site, (_, nodes) in named.items()} == {
                site: nodes for site, (nodes, *_) in seen.items()
            }, f"{pass_.name}, {name}"
            for site, (linear, _) in named.items():
                _, *constants = seen[site]
                assert [linear.codes, linear.scale, linear.transposed] == constants, f"{pass_.name}, {name}"
                self._codes_are_of_the_weight(after, linear)
            assert sites.products_of(name) == {*seen_products(variant)}, f"{pass_.name}, {name}"
        self.seen.append((pass_.name, len(sites.linears) + len(sites.attentions)))

    def _codes_are_of_the_weight(self, program: Program, linear: QuantizedLinear) -> None:
        weight = self.origin.constants[linear.weight]
        shape = program.constants[linear.codes].shape
        assert (shape[::-1] if linear.transposed else shape) == weight.shape


def seen_linears(variant: Variant) -> Iterator[tuple[str, LinearNodes, str, str, bool]]:
    """Every product of a dequantized activation and dequantized constant codes, told by its shape in the graph."""
    nodes = {node.name: node for node in variant.graph.nodes}
    for site in find_sites(variant):
        product = nodes[site.node]
        pair = [value for value in product.args[:2] if getattr(value, "target", None) is ops.dequantize.default]
        codes = [value.args[0] for value in pair]
        if len(pair) != 2 or codes[0].target not in QUANTIZES or codes[1].op != "get_attr":
            continue
        (user,) = product.users if len(product.users) == 1 else (product,)
        ratio = user.target is aten.mul.Tensor and user.all_input_nodes[-1].target is ops.select.default
        rescaled = user if ratio else product
        leaving = rescaled
        for added in rescaled.users:
            if added.target is aten.add.Tensor and any(value.op == "get_attr" for value in added.all_input_nodes):
                leaving = added
        yield (
            site.name,
            LinearNodes(
                quantizer=codes[0].name,
                product=product.name,
                leaving=leaving.name,
                divides=codes[0].all_input_nodes[0].name if ratio else "",
                rescales=rescaled.name if ratio else "",
            ),
            str(codes[1].target),
            str(pair[1].args[1].target),
            product.target is aten.matmul.default,
        )


def seen_products(variant: Variant) -> Iterator[str]:
    for node in variant.graph.nodes:
        if node.target in (aten.linear.default, aten.matmul.default):
            operands = [value for value in node.args[:2] if isinstance(value, fx.Node)]
            if all(value.target is ops.dequantize.default for value in operands):
                yield node.name


CASES = {
    "onnxruntime-cpu": ("onnxruntime-cpu", 'bits = "w8a8"\nattention = true', "interval=2", "affine"),
    "planes of few bits": ("onnxruntime-cpu", 'bits = "w6a6"\nattention = true', "off", "auto"),
    "constant scales": ("onnx", 'bits = "w8a8"\nattention = true', "interval=2", "auto"),
    "16 bits": ("tensorrt", 'bits = "w8a8"', "dps=2", "auto"),
    "fp8": ("tensorrt", 'bits = "fp8"', "interval=2", "auto"),
}


SLOW = ("onnxruntime-cpu", "planes of few bits", "16 bits")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_the_fact_is_true_after_every_pass(digits: Program, case: str) -> None:
    target, quantization, schedule, forecast = CASES[case]
    text = RECIPE.format(target=target, quantization=quantization, schedule=schedule, forecast=forecast)
    recipe = Recipe.from_toml(text)
    watching = Watching(digits)
    program = default_pipeline(recipe, TARGETS[target]).run(digits, [watching])
    attentions = len(program.facts[AttentionPlan].sites) if AttentionPlan in program.facts else 0
    quantized = len(program.facts[QuantPlan].sites) + attentions
    assert quantized == (8 + 2 if "attention" in quantization else 8)
    names = [name for name, _ in watching.seen]
    first = names.index("insert-qdq")
    expected = [0] * first + [quantized] * (len(names) - first)
    if attentions:
        expected[first - 1] = attentions  # after insert-attention-qdq
    assert [count for _, count in watching.seen] == expected


def test_variants_that_are_made_of_quantized_ones_have_their_sites(digits: Program) -> None:
    """Where the cache is inserted after the quantizers, and variants are dropped again."""
    quantize = "calibrate{trajectories=2},group-timesteps{groups=2},plan-quant,insert-qdq"
    watching = Watching(digits)
    program = Pipeline.parse(f"{quantize},plan-cache{{interval=2 blocks=0..0}},insert-cache").run(digits, [watching])
    linears = program.facts[QuantizedSites].linears
    assert set(program.variants) == {"full", "reuse"}
    assert {name for name, linear in linears.items() if "reuse" in linear.nodes} == {
        name for name in linears if name.startswith("blocks.1.")
    }
    assert all("full" in linear.nodes for linear in linears.values())
