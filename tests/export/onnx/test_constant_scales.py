"""Graphs for consumers that need constant scales: what is in them, and that they compute what the program computes."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import qcgraph
from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.export.check.check import Check
from qcgraph.export.check.verify import verify_export
from qcgraph.export.onnx.emit import emit_onnx, tensor_places
from qcgraph.export.run.onnxruntime import OptimizedGraph
from qcgraph.export.targets import TARGETS
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import WEIGHTS
from qcgraph.pipeline import Pipeline
from qcgraph.progress import Progress
from qcgraph.recipe import Recipe

NAMES = [name for name, target in TARGETS.items() if target.constant_scales]
TARGET = TARGETS["onnx"]
RATIOS = "blocks.0.attn.qkv.input_scale_ratio"
# One scale a group, also where they are close: no search, which would share them.
PIPELINE = (
    "plan-cache{interval=3},insert-cache,calibrate{trajectories=2},group-timesteps{groups=3},"
    "plan-quant{symmetric=true},insert-qdq,lower-linear"
)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcgraph.export.check.parity.SAMPLES", 8)


@pytest.fixture(scope="module")
def program(captured: Program) -> Program:
    return Pipeline.parse(f"{PIPELINE},reference-scales").run(captured)


@pytest.fixture(scope="module")
def exported(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The graphs for a target, made once for all targets that have the same."""
    folders: dict[tuple[int, bool], Path] = {}

    def graphs_for(name: str) -> Path:
        form = (TARGETS[name].opset, TARGETS[name].integer_products)
        if form not in folders:
            folders[form] = export(program, tmp_path_factory.mktemp("exported"), name)
        return folders[form]

    return graphs_for


@pytest.fixture
def folder(exported: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the graphs, to break."""
    return Path(shutil.copytree(exported("onnx"), tmp_path / "copy"))


def export(program: Program, folder: Path, target: str) -> Path:
    emit_onnx(program, folder, TARGETS[target].opset, Progress(), integer_products=TARGETS[target].integer_products)
    return folder


def verify(program: Program, folder: Path, target: str = "onnx") -> dict[tuple[str, str], Check]:
    checks = verify_export(program, folder, TARGETS[target], program.interfaces, Progress())
    return {(check.variant, check.name): check for check in checks}


def failed(checks: dict[tuple[str, str], Check]) -> list[str]:
    return [name for (_, name), check in checks.items() if not check.passed]


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(str(folder / "full.onnx"), load_external_data=False).graph


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_graphs_pass(program: Program, exported: Callable[[str], Path], name: str) -> None:
    folder = exported(name)
    checks = verify(program, folder, name)
    assert failed(checks) == []
    assert checks["full", "int8 kernels"].detail == "8 linears in int8, none of them left in float"
    assert checks["full", "constant scales"].value == 0
    ops = Counter(node.op_type for node in graph_of(folder).node)
    assert ops["Attention"] == (2 if TARGETS[name].opset >= 23 else 0)
    model = onnx.load(str(folder / "full.onnx"), load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", TARGETS[name].opset)]


@pytest.mark.slow
def test_quantizers_read_initializers_only(folder: Path) -> None:
    graph = graph_of(folder)
    initializers = {tensor.name for tensor in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert Counter(node.op_type for node in quantizers) == {"QuantizeLinear": 8, "DequantizeLinear": 16}
    assert all(set(node.input[1:]) <= initializers for node in quantizers)


def test_every_product_is_between_ratios(folder: Path) -> None:
    graph = graph_of(folder)
    users = {name: node for node in graph.node for name in node.input}
    makers = {name: node for node in graph.node for name in node.output}
    products = [
        node
        for node in graph.node
        if node.op_type == "MatMul" and makers.get(node.input[1], node).op_type == "DequantizeLinear"
    ]
    assert len(products) == 8
    for product in products:
        quantize = makers[makers[product.input[0]].input[0]]
        divide, multiply = makers[quantize.input[0]], users[product.output[0]]
        assert (divide.op_type, multiply.op_type) == ("Mul", "Mul")
        for ratio in (makers[divide.input[1]], makers[multiply.input[1]]):
            assert (ratio.op_type, ratio.input[1]) == ("Gather", "group")


@pytest.mark.slow
def test_narrow_codes_are_clipped_at_constants(captured: Program, tmp_path: Path) -> None:
    pipeline = PIPELINE.replace("symmetric=true", "symmetric=true activation-bits=6")
    program = Pipeline.parse(f"{pipeline},reference-scales").run(captured)
    graph = graph_of(export(program, tmp_path, "onnx"))
    initializers = {tensor.name for tensor in graph.initializer}
    clips = [node for node in graph.node if node.op_type == "Clip"]
    assert len(clips) == 8
    assert all(set(node.input[1:]) <= initializers for node in clips)
    assert failed(verify(program, tmp_path)) == []


@pytest.mark.slow
def test_selected_scales_are_found(captured: Program, tmp_path: Path) -> None:
    program = Pipeline.parse(PIPELINE).run(captured)
    checks = verify(program, export(program, tmp_path, "onnx"))
    assert "constant scales" in failed(checks)
    assert ("full", "site exactness") not in checks
    assert "blocks.0.attn.qkv.input_scale" in checks["full", "constant scales"].detail


@pytest.mark.parametrize("name", [RATIOS, RATIOS.replace("ratio", "inverse"), RATIOS.replace("ratio", "reference")])
def test_a_wrong_ratio_or_reference_is_found(program: Program, folder: Path, name: str) -> None:
    offset, length = tensor_places(folder / WEIGHTS)[name]
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.seek(offset)
        values = np.frombuffer(stream.read(length), np.float32) * np.float32(1.01)
        stream.seek(offset)
        stream.write(values.tobytes())
    checks = verify(program, folder)
    assert "site exactness" in failed(checks)
    assert "blocks.0.attn.qkv" in checks["full", "site exactness"].detail


def test_a_product_without_its_ratio_is_found(program: Program, folder: Path) -> None:
    model = onnx.load(str(folder / "full.onnx"), load_external_data=False)
    gather = next(node for node in model.graph.node if RATIOS in node.input)
    rescaled = next(node for node in model.graph.node if gather.output[0] in node.input)
    add = next(node for node in model.graph.node if rescaled.output[0] in node.input)
    add.input[list(add.input).index(rescaled.output[0])] = rescaled.input[0]
    model.graph.node.remove(rescaled)
    onnx.save(model, str(folder / "full.onnx"))
    assert "site exactness" in failed(verify(program, folder))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"bits": "w8a8"}, {"bits": "w4a6"}, {"bits": "auto=6"}], ids=str)
def test_the_default_pipeline_never_plans_what_has_no_constant_scale(name: str, options: dict[str, str]) -> None:
    text = default_pipeline(Recipe().override(**options), TARGETS[name]).text
    assert ("search-scales" in text) == ("search-scales{regions=false" in text) == (options["bits"] != "w8a8")
    assert ("allocate-bits" in text) == ("groups=false" in text)
    assert text.endswith(
        "lower-linear,reference-scales" + (",plan-precision,reduce-precision" if name.startswith("tensorrt") else "")
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["", "attention = true", 'bits = "auto=6"'])
def test_all_at_once(captured: Program, tmp_path: Path, recipe: str) -> None:
    text = f"[calibration]\ntrajectories = 4\n[quantization]\n{recipe}\n"
    chosen = Recipe.from_toml(text).override(steps=9, groups=3, cache="interval=3", compensate="vc")
    program = default_pipeline(chosen, TARGET).run(captured)
    assert failed(verify(program, export(program, tmp_path, "onnx"))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "onnx-opset21"])
def test_products_that_share_an_activation_are_integer_kernels(tmp_path: Path, name: str) -> None:
    """Queries, keys and values of diffusers' DiT are three layers that read one activation."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=2,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_elementwise_affine=False,
    )
    transformer.save_pretrained(tmp_path / "dit")
    recipe = Recipe.from_toml(
        '[calibration]\ntrajectories = 2\n[quantization]\nscales = "range"\nrounding = "nearest"\nequalize = false'
    ).override(target=name, steps=2, bits="w8a8", groups=2)
    bundle = qcgraph.compile(str(tmp_path / "dit"), recipe, output=tmp_path / "out")  # which verifies it
    assert OptimizedGraph.of(bundle.file("main.onnx")).count("MatMulIntegerToFloat") == 6
