"""Program: printing, digest, editing, running, and the round trip to disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qcgraph.errors import BundleError, ContractError
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.graph import output_node, spec_of
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import load_program, program_from_json, program_to_json, save_program

aten = torch.ops.aten


def inputs(batch: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latent": torch.randn(batch, 2, 8, 8, generator=generator),
        "timestep": torch.linspace(10, 900, batch),
        "class_label": torch.arange(batch),
    }


def test_the_text_of_a_captured_program(captured: Program, golden: Callable[[str, str], None]) -> None:
    golden("capture", captured.text)


def test_text_and_digest_are_deterministic(captured: Program) -> None:
    again = replace(captured)
    assert again.text == captured.text
    assert again.compute_digest() == captured.digest


def test_the_digest_sees_a_single_changed_weight(captured: Program) -> None:
    name = "blocks.0.attn.qkv.weight"
    weight = captured.constants[name].clone()
    weight[0, 0] += 1e-6
    changed = replace(captured, constants={**captured.constants, name: weight})
    assert changed.text == captured.text
    assert changed.digest != captured.digest


def test_a_product_of_stacks_leaves_the_batch_a_symbol(captured: Program) -> None:
    """In the graph and in all that share its symbol; PyTorch 2.11 would read the sizes of this product as numbers."""
    editor = GraphEditor(captured.variants["main"], captured.constants, "test")
    heads = editor.node("scaled_dot_product_attention")
    with editor.after(heads):
        across = editor.call(aten.transpose.int, heads, -2, -1, source=heads)
        product = editor.call(aten.matmul.default, heads, across, source=heads)
    assert spec_of("", product.meta["val"]).shape == ("B", 2, 16, 16)
    assert spec_of("", heads.meta["val"]).shape == ("B", 2, 16, 16)


def double_the_output(program: Program) -> Program:
    editor = GraphEditor(program.variants["main"], program.constants, "test")
    output = output_node(editor.graph)
    (prediction,) = output.all_input_nodes
    with editor.before(output):
        doubled = editor.call(aten.mul.Tensor, prediction, 2.0, source=prediction)
    editor.set_outputs([doubled], ["noise_prediction"])
    return with_edits(program, {"main": editor})


def test_editing_makes_a_new_program_and_leaves_the_old_one(captured: Program) -> None:
    before = captured.compute_digest()
    edited = double_the_output(captured)
    assert captured.compute_digest() == before
    expected = 2 * captured.run("main", inputs())["noise_prediction"]
    assert torch.equal(edited.run("main", inputs())["noise_prediction"], expected)


def test_an_inserted_node_has_type_path_and_origin(captured: Program) -> None:
    line = next(line for line in double_the_output(captured).text.splitlines() if "; test, from" in line)
    assert "f32[B,4,8,8] = mul.Tensor(" in line


def test_a_constant_is_never_replaced_in_silence(captured: Program) -> None:
    def editor_with(value: float) -> GraphEditor:
        editor = GraphEditor(captured.variants["main"], captured.constants, "test")
        output = output_node(editor.graph)
        (prediction,) = output.all_input_nodes
        factor = editor.constant("factor", torch.tensor(value), prediction)
        with editor.before(output):
            scaled = editor.call(aten.mul.Tensor, prediction, factor, source=prediction)
        editor.set_outputs([scaled], ["noise_prediction"])
        return editor

    one = editor_with(2.0)
    node = output_node(one.graph).all_input_nodes[0]
    assert one.constant("factor", torch.tensor(2.0), node) is one.constant("factor", torch.tensor(2.0), node)
    with pytest.raises(ContractError, match="constant 'factor' exists with another value"):
        one.constant("factor", torch.tensor(3.0), node)
    with pytest.raises(ContractError, match="constant 'pos_embed' exists with another value"):
        one.constant("pos_embed", torch.tensor(3.0), node)
    with pytest.raises(ContractError, match="constant 'factor' exists with another value"):
        with_edits(captured, {"main": one, "other": editor_with(3.0)})


def test_unknown_variant(captured: Program) -> None:
    with pytest.raises(ContractError, match="no variant 'reuse'; there are: main"):
        captured.run("reuse", inputs())


def test_a_program_survives_the_disk(captured: Program, tmp_path: Path) -> None:
    save_program(captured, tmp_path)
    loaded = load_program(tmp_path)
    assert loaded.text == captured.text
    assert loaded.digest == captured.digest
    assert loaded.history == captured.history
    ours, theirs = captured.run("main", inputs()), loaded.run("main", inputs())
    assert torch.equal(ours["noise_prediction"], theirs["noise_prediction"])


@pytest.mark.parametrize("target", ["os.system", "operator.attrgetter", "aten.add_.Tensor", "aten.nothing.here", "x"])
def test_a_file_cannot_name_what_is_not_an_op(captured: Program, target: str) -> None:
    data = program_to_json(captured)
    call = next(node for node in data["variants"]["main"]["nodes"] if node["op"] == "call_function")
    call["target"] = target
    with pytest.raises(BundleError):
        program_from_json(json.loads(json.dumps(data)), captured.constants)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format=99),
        lambda data: data.pop("facts"),
        lambda data: data["facts"].update(Unknown={}),
        lambda data: data["facts"]["StepPlan"].pop("fingerprint"),
        lambda data: data["variants"]["main"]["nodes"][-1]["args"].update(list=[{"node": "nowhere"}]),
    ],
)
def test_a_program_of_another_version_is_refused(captured: Program, change: Callable[[dict[str, Any]], object]) -> None:
    data = program_to_json(captured)
    change(data)
    with pytest.raises(BundleError) as caught:
        program_from_json(data, captured.constants)
    assert caught.value.hint == "compile again with this version"
    assert caught.value.where == "program.json"


def test_a_missing_constant_is_named(captured: Program) -> None:
    constants = {name: value for name, value in captured.constants.items() if name != "pos_embed"}
    with pytest.raises(BundleError, match="constant 'pos_embed' is missing"):
        program_from_json(program_to_json(captured), constants)
