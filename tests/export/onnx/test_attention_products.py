"""Quantized products of attention in ONNX Runtime: integer kernels, the same values, and faults that are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcgraph.export.check.verify import KERNEL, verify_export
from qcgraph.export.run.onnxruntime import OptimizedGraph
from qcgraph.export.targets import TARGETS
from qcgraph.facts import QuantizedSites
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import quantized_products, quantized_sites
from qcgraph.pipeline import Pipeline
from qcgraph.progress import Progress

TARGET = TARGETS["onnxruntime-cpu"]
CALIBRATE = (
    "calibrate{trajectories=4 selection=uniform latents=24},group-timesteps{groups=3},"
    f"plan-quant{{pair-high={TARGET.pair_high}}}"
)
FORMS = {"two planes": ("", 3), "one tensor": (" bits=6", 2), "one region": (" regions=false", 2)}  # products of each


@pytest.fixture(scope="module")
def sharp(captured: Program, sharpened: Callable[[Program], Program]) -> Program:
    return sharpened(captured)


@pytest.fixture(scope="module")
def in_float(sharp: Program, tmp_path_factory: pytest.TempPathFactory, export_of: Callable[..., Any]) -> Path:
    """Graphs whose linear layers are quantized, and the products of whose attention are not."""
    text = f"{CALIBRATE},split-attention,insert-qdq,{TARGET.legalize}"
    folder = tmp_path_factory.mktemp("in_float")
    export_of(Pipeline.parse(text).run(sharp), folder)
    return folder


@pytest.fixture(
    scope="module",
    params=["two planes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one tensor", "one region"))],
)
def form(
    request: pytest.FixtureRequest,
    sharp: Program,
    tmp_path_factory: pytest.TempPathFactory,
    export_of: Callable[..., Any],
) -> tuple[Any, int]:
    """An export of each form, and how many products an attention has in it."""
    options, products = FORMS[request.param]
    quantize = f"plan-attention{{high={TARGET.product_high}{options}}},insert-attention-qdq"
    text = f"{CALIBRATE},split-attention,{quantize},insert-qdq,{TARGET.legalize}"
    program = Pipeline.parse(text).run(sharp)
    return export_of(program, tmp_path_factory.mktemp("attention")), products


@pytest.mark.slow
def test_it_passes_verification(form: tuple[Any, int]) -> None:
    export, products = form
    checks = verify_export(export.program, export.folder, TARGET, export.interfaces, Progress())
    assert [check.detail for check in checks if not check.passed] == []
    kernels = next(check for check in checks if check.name == "int8 kernels")
    assert f"and {2 * products} products of attention" in kernels.detail


@pytest.mark.slow
def test_all_products_are_integer_kernels(form: tuple[Any, int]) -> None:
    export, products = form
    ops = Counter(node.op for node in OptimizedGraph.of(export.folder / "main.onnx").nodes)
    assert ops[KERNEL] == 8 + 2 * products  # four linear layers in each of two blocks
    assert ops["Attention"] == 0


@pytest.mark.slow
def test_a_product_in_floating_point_is_found(form: tuple[Any, int], in_float: Path) -> None:
    """The graphs of a program whose attention was not quantized do not pass for those of one whose was."""
    export, products = form
    checks = verify_export(export.program, in_float, TARGET, export.interfaces, Progress())
    kernels = next(check for check in checks if check.name == "int8 kernels")
    assert not kernels.passed
    assert f"{2 * products} products of attention" in kernels.detail


def test_products_are_told_from_linear_layers(form: tuple[Any, int]) -> None:
    export, products = form
    found = quantized_products(export.program, "main")
    assert len(found) == 2 * products
    assert len(quantized_sites(export.program, "main")) == 8
    nodes = {node.name: node for node in export.program.variants["main"].graph.nodes}
    made = {operand.all_input_nodes[0].name for name in found for operand in nodes[name].all_input_nodes}
    attentions = export.program.facts[QuantizedSites].attentions.values()
    assert made <= {name for attention in attentions for name in attention.nodes["main"].all_quantizers}
