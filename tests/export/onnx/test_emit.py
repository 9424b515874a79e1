"""Emission: one weights file for all graphs, the names of the program, and refusals that say where."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file

from qcgraph.capture.capture import capture
from qcgraph.errors import QcgraphError
from qcgraph.export.onnx.annotate import NAMESPACE, SCOPES, record_types, value_specs
from qcgraph.export.onnx.emit import INLINE_BYTES, emit_onnx, tensor_places
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.program import Program, tensor_digest
from qcgraph.ir.serialize import EXPORTED, WEIGHTS, load_program
from qcgraph.pipeline import Pipeline
from qcgraph.plan.roles import REUSES
from qcgraph.plan.spec import BATCH, ModelSpec, TensorSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress

EXPORT = """
import sys
from pathlib import Path
from qcgraph.export.onnx.emit import emit_onnx
from qcgraph.ir.serialize import load_program
from qcgraph.progress import Progress
emit_onnx(load_program(Path(sys.argv[1])), Path(sys.argv[2]), 23, Progress(), integer_products=True)
"""


def graph_of(folder: Path, variant: str) -> onnx.GraphProto:
    return onnx.load(str(folder / f"{variant}.onnx"), load_external_data=False).graph


def place_of(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def test_interfaces_are_the_programs(compiled: Any) -> None:
    for variant, interface in compiled.interfaces.items():
        graph = graph_of(compiled.folder, variant)
        for values, specs in ((graph.input, interface.inputs), (graph.output, interface.outputs)):
            shapes = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values]
            assert [value.name for value in values] == [spec.name for spec in specs]
            assert shapes == [list(spec.shape) for spec in specs]
            assert BATCH in shapes[0]


def test_weights_are_on_disk_once(compiled: Any) -> None:
    places = tensor_places(compiled.folder / WEIGHTS)
    for variant in compiled.interfaces:
        for tensor in graph_of(compiled.folder, variant).initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = place_of(tensor)
                assert place["location"] == WEIGHTS
                assert (int(place["offset"]), int(place["length"])) in places.values()
            else:
                assert tensor.name not in compiled.program.constants
                assert len(tensor.raw_data) <= INLINE_BYTES
    stored = load_file(compiled.folder / WEIGHTS)
    assert set(compiled.program.constants) == {name for name in stored if not name.startswith(EXPORTED)}
    large = [tensor_digest(tensor) for tensor in stored.values() if tensor.nbytes > INLINE_BYTES]
    assert len(large) == len(set(large))


def test_variants_share_the_weights(compiled: Any) -> None:
    places = [
        {tensor.name: place_of(tensor) for tensor in graph_of(compiled.folder, variant).initializer if place_of(tensor)}
        for variant in ("full", "reuse")
    ]
    shared = set(places[0]) & set(places[1])
    assert {"pos_embed", "final_layer.linear.weight"} <= shared
    assert all(places[0][name] == places[1][name] for name in shared)


@pytest.mark.slow
def test_what_the_exporter_makes_is_stored_once(
    captured: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter makes the ones that a LayerNorm without weights is multiplied by; here they count as large."""
    monkeypatch.setattr("qcgraph.export.onnx.emit.INLINE_BYTES", 100)
    variants = {"main": captured.variants["main"], "second": captured.variants["main"]}
    plan = captured.facts[StepPlan]
    twice = Program(variants, captured.constants, captured.facts)
    twice = twice.with_facts(replace(plan, roles=plan.roles | {"second": REUSES}))
    emit_onnx(twice, tmp_path, 21, Progress(), integer_products=True)
    places = tensor_places(tmp_path / WEIGHTS)
    made = {name: place for name, place in places.items() if name.startswith(EXPORTED)}
    assert made
    assert all(name.startswith("onnx/main/") for name in made)
    used = {int(place_of(tensor)["offset"]) for tensor in graph_of(tmp_path, "second").initializer if place_of(tensor)}
    assert {offset for offset, _ in made.values()} <= used
    assert load_program(tmp_path).constants.keys() == captured.constants.keys()


def test_program_reads_back(compiled: Any) -> None:
    assert load_program(compiled.folder).text == compiled.program.text


def test_weights_are_as_readable_as_the_rest(compiled: Any) -> None:
    modes = {path.stat().st_mode for path in compiled.folder.iterdir()}
    assert len(modes) == 1


def names_by_op(export: Any, kinds: dict[Any, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Nodes of the program with the ops that are to make their values, and all values with the ops that make them."""
    nodes = export.program.variants["full"].graph.nodes
    expected = {node.name: kinds[node.target] for node in nodes if node.target in kinds}
    return expected, {name: node.op_type for node in graph_of(export.folder, "full").node for name in node.output}


def test_values_have_the_names_of_the_program(compiled: Any) -> None:
    kinds = {
        torch.ops.qcgraph.quantize.default: "QuantizeLinear",
        torch.ops.aten.matmul.default: "Mul",  # the last of the nodes that a product of integers takes
        torch.ops.aten.layer_norm.default: "LayerNormalization",
    }
    expected, made = names_by_op(compiled, kinds)
    assert len(expected) == 8 * 2 + 5
    assert expected.items() <= made.items()
    assert list(made.values()).count("MatMulInteger") == 8


@pytest.mark.slow
def test_products_of_dequantized_values_have_the_names_of_the_program(dequantizing: Any) -> None:
    kinds = {
        torch.ops.qcgraph.dequantize.default: "DequantizeLinear",
        torch.ops.aten.matmul.default: "MatMul",
    }
    expected, made = names_by_op(dequantizing, kinds)
    assert len(expected) == 8 * 3
    assert expected.items() <= made.items()
    assert "MatMulInteger" not in made.values()


def test_both_forms_are_on_the_same_weights(compiled: Any, dequantizing: Any) -> None:
    assert (compiled.folder / WEIGHTS).read_bytes() == (dequantizing.folder / WEIGHTS).read_bytes()


def test_nothing_of_this_machine_gets_out(compiled: Any) -> None:
    for variant in compiled.interfaces:
        data = (compiled.folder / f"{variant}.onnx").read_bytes()
        assert b".py" not in data
        assert str(Path.home()).encode() not in data
        assert b"stack_trace" not in data


def types_of(graph: onnx.GraphProto) -> dict[str, tuple[int, list[int | str]]]:
    """Element type and shape of every value whose type a graph states."""
    found = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        found[value.name] = (tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim])
    return found


def metadata_of(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


@pytest.mark.slow
@pytest.mark.parametrize("export", ["compiled", "dequantizing", "unquantized"])
def test_every_value_has_its_type(export: str, request: pytest.FixtureRequest) -> None:
    """Types are those of the program, where it has the value, and inference finds no other."""
    found = request.getfixturevalue(export)
    for variant in found.program.variants:
        model = onnx.load(str(found.folder / f"{variant}.onnx"), load_external_data=False)
        types, specs = types_of(model.graph), value_specs(found.program.variants[variant])
        assert {name for node in model.graph.node for name in node.output} <= types.keys()
        assert len(specs.keys() & types.keys()) > 20
        for name in specs.keys() & types.keys():
            assert types[name][1] == list(specs[name].shape), name
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def test_types_that_the_graph_denies_are_not_written() -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Exp", ["x"], ["y"]), onnx.helper.make_node("Exp", ["y"], ["z"])],
        "graph",
        [value("x", onnx.TensorProto.FLOAT, [BATCH, 4])],
        [value("z", onnx.TensorProto.FLOAT, [BATCH, 4])],
        value_info=[value("y", onnx.TensorProto.FLOAT, [4, 9])],  # stale
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    for wrong in (TensorSpec("y", "f32", (BATCH, 5)), TensorSpec("y", "f16", (BATCH, 4)), TensorSpec("y", "f32", (4,))):
        record_types(proto, {"y": wrong})
        assert types_of(proto.graph)["y"] == (onnx.TensorProto.FLOAT, [BATCH, 4])


def test_names_of_weights_that_differ_in_odd_characters_alone(captured: Program, tmp_path: Path) -> None:
    """PyTorch lets a parameter have any name without a dot."""
    names = ["scale_1", "scale#1", "Scale_1", "scale 1"]

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.ParameterList([torch.tensor(2.0), torch.tensor(3.0)])  # scale.1 among them
            for index, name in enumerate(names):
                self.register_parameter(name, torch.nn.Parameter(torch.tensor(5.0 + index)))

        def forward(self, latent: torch.Tensor, timestep: torch.Tensor, class_label: torch.Tensor) -> torch.Tensor:
            factors = torch.stack([*self.scale, *(self.get_parameter(name) for name in names)])
            given = (timestep + class_label).reshape(-1, 1, 1, 1)
            return (latent * factors[0] + given * factors[1]) * factors[2:].prod()

    spec = replace(captured.facts[ModelSpec], output_channels=2)
    program = capture(Odd().eval().requires_grad_(False), spec, ("latent", "timestep", "class_label"))
    emit_onnx(program, tmp_path, 20, Progress(), integer_products=True)
    inputs = {"latent": torch.randn(2, 2, 8, 8), "timestep": torch.tensor([1.0, 2.0]), "class_label": torch.arange(2)}
    found = OnnxRuntimeRunner(tmp_path, program.interfaces).run_outputs(
        "main", {name: value.numpy() for name, value in inputs.items()}, {}
    )
    torch.testing.assert_close(
        torch.from_numpy(found["noise_prediction"].numpy()), program.run("main", inputs)["noise_prediction"]
    )


def test_nodes_say_which_module_they_come_from(compiled: Any) -> None:
    graph = graph_of(compiled.folder, "full")
    nodes = {node.name: node for node in graph.node}
    assert len(nodes) == len(graph.node)
    product, part = nodes["blocks.1.attn.qkv/matmul_4"], nodes["blocks.1.attn.qkv/matmul_4/MatMulInteger"]
    assert (product.op_type, list(product.output), part.op_type) == ("Mul", ["matmul_4"], "MatMulInteger")
    scopes = ["", "blocks", "blocks.1", "blocks.1.attn", "blocks.1.attn.qkv", "matmul_4"]
    for node in (product, part):
        assert metadata_of(node) == {NAMESPACE: "blocks/1/attn/qkv/matmul_4", SCOPES: str(scopes)}
    assert all(metadata_of(node).keys() == {NAMESPACE, SCOPES} for node in graph.node)


@pytest.mark.slow
def test_types_stay_in_16_bits(captured: Program, tmp_path: Path) -> None:
    program = Pipeline.parse("plan-precision{dtype=float16},reduce-precision").run(captured)
    emit_onnx(program, tmp_path, 23, Progress(), integer_products=False)
    graph = graph_of(tmp_path, "main")
    types = types_of(graph)
    assert {name for node in graph.node for name in node.output} <= types.keys()
    assert onnx.TensorProto.FLOAT16 in {element for element, _ in types.values()}


def test_the_quantizer_of_onnxruntime_takes_the_graphs(unquantized: Any, tmp_path: Path) -> None:
    """It infers shapes strictly, and refuses types that are stale."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(unquantized.folder / "full.onnx", tmp_path / "quantized.onnx")
    assert "MatMulInteger" in {node.op_type for node in graph_of(tmp_path, "quantized").node}


@pytest.mark.slow
def test_export_says_nothing(unquantized: Any, tmp_path: Path) -> None:
    """In a process of its own, because libraries warn once."""
    command = [sys.executable, "-c", EXPORT, str(unquantized.folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "reuse.onnx").read_bytes() == (unquantized.folder / "reuse.onnx").read_bytes()


@pytest.mark.slow
def test_op_without_onnx_form_is_refused_by_name(captured: Program, tmp_path: Path) -> None:
    editor = GraphEditor(captured.variants["main"], captured.constants, "test")
    node = editor.node("conv2d")
    with editor.after(node):
        strange = editor.call(torch.ops.aten.special_airy_ai.default, node, source=node)
    node.replace_all_uses_with(strange, delete_user_cb=lambda user: user is not strange)
    with pytest.raises(
        QcgraphError, match=r"^graph main, %special_airy_ai: cannot be exported to ONNX: .*aten.special_airy_ai"
    ):
        emit_onnx(with_edits(captured, {"main": editor}), tmp_path, 23, Progress(), integer_products=True)
    assert list(tmp_path.iterdir()) == []
