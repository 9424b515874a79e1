"""Program: printing, digest, editing, running, and the round trip to disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qcgraph.capture.capture import capture
from qcgraph.errors import BundleError, ContractError
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.graph import output_node, spec_of
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import load_program, program_from_json, program_to_json, save_program
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan

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
    editor.set_outputs([doubled], editor.outputs)
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
        editor.set_outputs([scaled], editor.outputs)
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


def test_roles_survive_the_disk(captured: Program, run: Callable[[str, Program], Program], tmp_path: Path) -> None:
    """Those of variants and of tensors, with the cached values that these hold and how old they are."""
    program = run("plan-cache{interval=3 history=2},insert-cache,insert-forecast,hoist-adaln", captured)
    assert {spec.age for spec in program.variants["reuse"].interface.taken(TensorRole.CACHE)} == {0, 1}
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    assert loaded.interfaces == program.interfaces
    assert loaded.facts[StepPlan].roles == program.facts[StepPlan].roles
    assert loaded.digest == program.digest


def test_a_mask_of_infinities_survives_the_disk(captured: Program, tmp_path: Path) -> None:
    class Masked(torch.nn.Module):
        def forward(self, latent: torch.Tensor, timestep: torch.Tensor, class_label: torch.Tensor) -> torch.Tensor:
            masked = latent.masked_fill(latent > 100, float("-inf"))
            return masked.exp() * timestep.reshape(-1, 1, 1, 1) + class_label.reshape(-1, 1, 1, 1)

    spec = replace(captured.facts[ModelSpec], output_channels=2)
    program = capture(Masked().eval(), spec, ("latent", "timestep", "class_label"))
    save_program(program, tmp_path)
    assert "-Infinity" in (tmp_path / "program.json").read_text()
    ours, theirs = program.run("main", inputs()), load_program(tmp_path).run("main", inputs())
    assert torch.equal(ours["noise_prediction"], theirs["noise_prediction"])


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "operator.attrgetter",
        "operator.pow",
        "aten.add_.Tensor",
        "aten.nothing.here",
        "aten.add.__init__",
        "aten.from_file.default",
        "aten.rand.default",
        "aten.empty.memory_format",
        "profiler._record_function_enter.default",
        "higher_order.cond.default",
        "x",
        "",
    ],
)
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


EVIL = "getattr(__import__('builtins'), 'open')('stolen', 'w')"


def nodes_of(data: dict[str, Any], op: str = "call_function", target: str = "") -> list[dict[str, Any]]:
    return [
        node for node in data["variants"]["main"]["nodes"] if node["op"] == op and node["target"].startswith(target)
    ]


def call(target: str, name: str, *arguments: Any) -> dict[str, Any]:
    return {
        "op": "call_function",
        "name": name,
        "target": target,
        "args": {"list": list(arguments)},
        "kwargs": {},
        "path": "",
    }


def insert(data: dict[str, Any], *calls: dict[str, Any]) -> None:
    data["variants"]["main"]["nodes"][-1:-1] = calls


def name_an_input(data: dict[str, Any]) -> None:
    nodes_of(data, "placeholder")[0]["target"] = f"latent={EVIL}"
    data["variants"]["main"]["inputs"][0]["name"] = f"latent={EVIL}"


def name_a_constant(data: dict[str, Any]) -> None:
    nodes_of(data, "get_attr")[0]["target"] = f'x") or {EVIL} or ("'


@pytest.mark.parametrize(
    "change",
    [
        name_an_input,
        name_a_constant,
        lambda data: nodes_of(data)[0]["kwargs"].update({f"a={EVIL}, b": 1}),
        lambda data: nodes_of(data)[0].update(op="call_method", target=f"x({EVIL}) or"),
        lambda data: nodes_of(data)[0].update(op="call_module", target="x"),
        lambda data: nodes_of(data)[0].update(name=f"x={EVIL}"),
    ],
)
def test_no_name_in_a_file_becomes_code(
    captured: Program, change: Callable[[dict[str, Any]], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch runs a graph as text, into which it writes some names as they are."""
    monkeypatch.chdir(tmp_path)
    data = program_to_json(captured)
    change(data)
    constants = dict(captured.constants) | {f'x") or {EVIL} or ("': captured.constants["pos_embed"]}
    with pytest.raises(BundleError):
        program_from_json(data, constants).run("main", inputs())
    assert not list(tmp_path.iterdir())


def growing(step: Callable[[int, str], list[dict[str, Any]]]) -> Callable[[dict[str, Any]], None]:
    """Integers, each of which is made of the one before."""

    def change(data: dict[str, Any]) -> None:
        insert(data, call("aten.sym_size.int", "n0", {"node": "latent"}, 0))
        for index in range(300):
            insert(data, *step(index, f"n{index}"))

    return change


def squared(index: int, name: str) -> list[dict[str, Any]]:
    return [call("operator.mul", f"n{index + 1}", {"node": name}, {"node": name})]


def nested(index: int, name: str) -> list[dict[str, Any]]:
    parts = [
        call("operator.floordiv", f"a{index}", {"node": name}, 3),
        call("operator.mod", f"b{index}", {"node": name}, 7),
    ]
    return [*parts, call("operator.add", f"n{index + 1}", {"node": f"a{index}"}, {"node": f"b{index}"})]


def deep(data: dict[str, Any]) -> None:
    value: dict[str, Any] = {"list": []}
    for _ in range(5000):
        value = {"list": [value]}
    nodes_of(data)[0]["args"]["list"] = [value]


@pytest.mark.parametrize(
    "change",
    [
        growing(squared),
        growing(nested),
        deep,
        lambda data: insert(data, call("aten.zeros.default", "z", {"list": [10**15]})),
        lambda data: insert(data, call("aten.zeros.default", "z", {"list": [10**30]})),
        lambda data: insert(
            data,
            call("aten.sym_size.int", "s", {"node": "latent"}, 0),
            call("operator.floordiv", "z", {"node": "s"}, 0),
        ),
        lambda data: nodes_of(data, target="aten.linear")[0]["args"].update(list=["a", "b"]),
        lambda data: nodes_of(data, target="aten.linear")[0]["args"].update(list=[]),
        lambda data: nodes_of(data, target="aten.linear")[0]["args"]["list"].reverse(),
        lambda data: nodes_of(data, target="aten.reshape")[0]["args"]["list"].__setitem__(1, {"list": [7, 7]}),
        lambda data: nodes_of(data, target="operator.getitem")[0]["args"]["list"].__setitem__(1, "x"),
        lambda data: nodes_of(data, target="aten.scaled")[0]["args"]["list"].extend([None, 0.5]),
        lambda data: nodes_of(data)[0]["args"].update(list=[{"node": nodes_of(data)[0]["name"]}]),
        lambda data: nodes_of(data)[0]["args"].update(list=[{"node": []}]),
        lambda data: nodes_of(data)[0]["args"].update(list=[{"dtype": "f99"}]),
        lambda data: nodes_of(data)[0]["args"].update(list=[{"device": "cuda"}]),
        lambda data: nodes_of(data)[0]["args"].update(list=[{"torch": "ops"}]),
        lambda data: nodes_of(data)[0]["args"].update(list=[{"node": "latent", "list": []}]),
        lambda data: nodes_of(data)[0]["args"].update(list=[[1]]),
        lambda data: nodes_of(data)[0].update(args=None),
        lambda data: nodes_of(data)[0].update(target=5),
        lambda data: nodes_of(data)[0].update(provenance={"x": 1}),
        lambda data: data["variants"]["main"].update(nodes=None),
        lambda data: data["variants"]["main"].update(nodes=[]),
        lambda data: data["variants"]["main"]["nodes"].append(call("aten.neg.default", "late", {"node": "latent"})),
        lambda data: data["variants"]["main"]["nodes"].insert(1, dict(data["variants"]["main"]["nodes"][0])),
        lambda data: data["variants"]["main"]["inputs"][0].update(shape=["B", 2, 8, "Q"]),
        lambda data: data["variants"]["main"]["inputs"][0].update(dtype="f77"),
        lambda data: data["variants"]["main"]["outputs"][0].update(shape=["B", 1, 8, 8]),
        lambda data: data["variants"]["main"]["inputs"][0].pop("role"),
        lambda data: data["variants"]["main"]["inputs"][0].update(role=None),
        lambda data: data["variants"]["main"]["inputs"][0].update(role="latent"),
        lambda data: data["variants"]["main"]["inputs"][1].update(role="cache", value="cache_0"),
        lambda data: data["variants"]["main"]["inputs"][1].update(age="old"),
        lambda data: data["facts"]["StepPlan"].update(roles={}),
        lambda data: data["facts"]["StepPlan"]["roles"].update(other={"kind": "reuses", "of": ""}),
        lambda data: data["facts"]["StepPlan"]["roles"].update(main={"kind": "guesses", "of": ""}),
        lambda data: data.update(variants=[1]),
        lambda data: data.update(variants={}),
    ],
)
def test_a_damaged_program_is_refused_in_words(captured: Program, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(json.dumps(program_to_json(captured)))
    change(data)
    with pytest.raises(BundleError) as caught:
        program_from_json(data, captured.constants)
    assert caught.value.where == "program.json"
    assert caught.value.hint
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "null", '{"format": ' + "1" * 5000 + "}"])
def test_text_that_is_no_program_is_refused(captured: Program, tmp_path: Path, text: str) -> None:
    save_program(captured, tmp_path)
    (tmp_path / "program.json").write_text(text)
    with pytest.raises(BundleError, match=r"program\.json"):
        load_program(tmp_path)


def test_damaged_weights_are_refused(captured: Program, tmp_path: Path) -> None:
    save_program(captured, tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(BundleError, match=r"weights\.safetensors: cannot be read"):
        load_program(tmp_path)
