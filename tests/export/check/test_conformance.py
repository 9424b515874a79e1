"""Conformance to a target: sound graphs pass, and every damage fails the check that is for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcgraph.bundle import write_plan, writing
from qcgraph.cli import run
from qcgraph.errors import UsageError
from qcgraph.export.check.check import Check
from qcgraph.export.check.conformance import check_cache_tensors, check_conformance
from qcgraph.export.check.engine_checks import expected_of
from qcgraph.export.onnx.emit import emit_onnx
from qcgraph.export.targets import TARGETS
from qcgraph.export.tensorrt import provider as tensorrt
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.recipe import Recipe

TARGET = TARGETS["tensorrt-rtx"]
PIPELINE = (
    "plan-cache{interval=3},insert-cache,calibrate{trajectories=2},group-timesteps{groups=3},"
    f"plan-quant{{symmetric=true}},insert-qdq,{TARGET.legalize}"
)
SITE = "blocks.1.mlp.fc1"


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcgraph.export.check.parity.SAMPLES", 8)


def export(program: Program, folder: Path) -> Path:
    emit_onnx(program, folder, TARGET.opset, Progress(), **TARGET.forms)
    return folder


@pytest.fixture(scope="module")
def program(captured: Program) -> Program:
    """Eight quantized linears with constant scales, two attentions in float32, and a cache."""
    return Pipeline.parse(PIPELINE).run(captured)


@pytest.fixture(scope="module")
def folder(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(program, tmp_path_factory.mktemp("conforming"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def check(program: Program, folder: Path, target: str = "onnx") -> dict[tuple[str, str], Check]:
    checks = check_conformance(program, folder, TARGETS[target], program.interfaces, Progress())
    assert len({(found.variant, found.name) for found in checks}) == len(checks)
    return {(found.variant, found.name): found for found in checks}


def failed(checks: dict[tuple[str, str], Check]) -> set[str]:
    return {name for (_, name), found in checks.items() if found.passed is False}


@contextmanager
def altered(folder: Path, name: str = "full.onnx") -> Iterator[onnx.ModelProto]:
    """A graph, to change; the weights stay as they are."""
    model = onnx.load(str(folder / name), load_external_data=False)
    yield model
    onnx.save(model, str(folder / name))


def prediction(graph: onnx.GraphProto) -> onnx.NodeProto:
    """The node that makes the noise prediction, which now has another name."""
    (node,) = (node for node in graph.node if "noise_prediction" in node.output)
    node.output[0] = "made"
    return node


def compute_scale(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if f"{SITE}.input_scale_reference" in node.input)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.0), "one"))
    model.graph.node.insert(0, helper.make_node("Mul", [node.input[1], "one"], ["computed"], name="computed"))
    for reader in model.graph.node[1:]:
        reader.input[:] = ["computed" if name == f"{SITE}.input_scale_reference" else name for name in reader.input]


def shift_zero_point(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.int8(3), "shifted"))
    for node in model.graph.node:
        if f"{SITE}.input_scale_reference" in node.input:
            node.input[2] = "shifted"


def call_stranger(model: onnx.ModelProto) -> None:
    """ONNX Runtime has the operator; ONNX and TensorRT have not."""
    prediction(model.graph)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    node = helper.make_node("QuickGelu", ["made"], ["noise_prediction"], name="stranger", domain="com.microsoft")
    model.graph.node.append(node)


def branch(model: onnx.ModelProto) -> None:
    prediction(model.graph)
    model.graph.initializer.append(numpy_helper.from_array(np.int64(1), "first"))
    model.graph.node.append(helper.make_node("Less", ["group", "first"], ["early"], name="early"))
    branches = {}
    for name, operator in (("then_branch", "Identity"), ("else_branch", "Neg")):
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4, 8, 8])
        node = helper.make_node(operator, ["made"], [name], name=f"in_{name}")
        branches[name] = helper.make_graph([node], name, [], [output])
    model.graph.node.append(helper.make_node("If", ["early"], ["noise_prediction"], name="choice", **branches))


def break_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "Softmax2"


def raise_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 24


DAMAGES: list[tuple[Callable[[onnx.ModelProto], None], str, str]] = [
    (compute_scale, "constant scales", "computed"),
    (shift_zero_point, "scales and zero points", "shifted"),
    (call_stranger, "operators", "com.microsoft.QuickGelu (stranger)"),
    (break_attribute, "valid ONNX", "Softmax2"),
    (raise_opset, "operators", "the opset is 24, and onnx takes up to 23"),
]


@pytest.mark.parametrize("target", ["onnx", "onnx-opset21"])
def test_a_portable_export_conforms(program: Program, folder: Path, target: str) -> None:
    checks = check(program, folder, target)
    assert failed(checks) == ({"operators"} if target == "onnx-opset21" else set())
    assert {"valid ONNX", "operators", "scales and zero points", "constant scales"} <= {name for _, name in checks}
    assert checks["", "cache tensors"].detail == "taken as they are left: cache_0"
    assert ("reuse", "parity of noise_prediction") in checks


@pytest.mark.parametrize(("damage", "name", "detail"), DAMAGES, ids=[damage.__name__ for damage, _, _ in DAMAGES])
def test_a_damage_fails_its_check(
    program: Program, copy: Path, damage: Callable[[onnx.ModelProto], None], name: str, detail: str
) -> None:
    with altered(copy) as model:
        damage(model)
    checks = check(program, copy)
    assert checks["full", name].passed is False
    assert detail in checks["full", name].detail


def test_tensors_that_are_left_and_taken_otherwise_are_found(program: Program, folder: Path, copy: Path) -> None:
    interfaces = program.interfaces
    plan, paths = program.facts[StepPlan], {variant: folder / f"{variant}.onnx" for variant in interfaces}
    assert check_cache_tensors(plan, interfaces, paths).passed
    (cache,) = (spec for spec in interfaces["reuse"].inputs if spec.name == "cache_0")
    for other, what in [
        (replace(cache, dtype="f16"), f"cache_0 is {cache} from full, reuse takes f16[B,16,32]"),
        (replace(cache, name="cache_7", value="cache_7"), "no variant computes cache_7, which reuse takes"),
    ]:
        inputs = tuple(other if spec is cache else spec for spec in interfaces["reuse"].inputs)
        changed = interfaces | {"reuse": replace(interfaces["reuse"], inputs=inputs)}
        found = check_cache_tensors(plan, changed, paths)
        assert not found.passed
        assert what in found.detail
        assert "reuse.onnx takes cache_0 as " in found.detail
    with altered(copy, "reuse.onnx") as model:
        (value,) = (value for value in model.graph.input if value.name == "cache_0")
        value.type.tensor_type.shape.dim[1].dim_value = 9
    found = check_cache_tensors(plan, interfaces, {variant: copy / path.name for variant, path in paths.items()})
    assert found.detail == f"reuse.onnx takes cache_0 as f32[B,9,32], the plan says {cache}"


def test_what_engines_should_be_fused_to(program: Program, folder: Path) -> None:
    linears = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    sites = {f"blocks.{block}.{name}" for block in range(2) for name in linears}
    found = expected_of(program, "full", folder / "full.onnx")
    assert (set(found.products.values()), found.absent) == (sites, ())
    assert set(found.attentions.values()) == {"blocks.0.attn.attention", "blocks.1.attn.attention"}
    assert (found.branches, found.is_half) == ((), False)
    assert set(expected_of(program, "full", folder / "reuse.onnx").absent) == sites  # a graph without any of them


def test_a_target_without_graphs_is_refused(program: Program, folder: Path) -> None:
    with pytest.raises(UsageError, match="torch takes no graphs"):
        check(program, folder, "torch")


def test_without_the_library(program: Program, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise UsageError(f"{tensorrt.LIBRARIES[name].title} is not installed")

    monkeypatch.setattr(tensorrt, "load_provider", missing)
    with pytest.raises(UsageError, match="TensorRT-RTX is not installed"):
        check(program, folder, "tensorrt-rtx")


@pytest.mark.slow
def test_the_command(program: Program, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sound bundle, one whose graph was damaged before it was written, and one without graphs."""

    def verify(folder: Path | None, *options: str) -> tuple[int, str, str]:
        with writing(tmp_path / "bundle", model="tiny", target="tensorrt-rtx", force=True) as place:
            write_plan(place, program.facts[ModelSpec], program.facts[StepPlan], program.interfaces)
            (place / "recipe.lock.toml").write_text(Recipe().to_toml())
            for file in folder.iterdir() if folder else ():
                shutil.copy(file, place)
        code = run(["verify", str(tmp_path / "bundle"), *options])
        return code, *capsys.readouterr()

    code, out, _ = verify(copy, "--target", "onnx")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["ok"] * (len(out.splitlines()) - 1)
    with altered(copy) as model:
        raise_opset(model)
    code, out, err = verify(copy, "--target", "onnx", "--json")
    data = json.loads(out)
    assert (code, data["passed"]) == (1, False)
    assert [item["name"] for item in data["checks"] if item["passed"] is False] == ["operators"]
    assert err.splitlines()[-1] == "hint: compile the model for it: --target onnx"
    assert verify(copy)[0] == 0  # what nobody asks for is not checked
    for options, what in [("onnx", "has no full.onnx"), ("torch", "torch takes no graphs"), ("onx", "unknown target")]:
        code, out, err = verify(None, "--target", options)
        assert (code, out) == (2, "")
        assert what in err
        assert "\n\nhint: " in err


# What follows needs TensorRT-RTX, and no GPU.


@pytest.fixture(scope="session")
def _library() -> None:
    pytest.importorskip("tensorrt_rtx")


@pytest.mark.slow
@pytest.mark.usefixtures("_library")
def test_float32_conforms_but_for_its_attention(program: Program, folder: Path) -> None:
    checks = check(program, folder, "tensorrt-rtx")
    assert failed(checks) == set()
    assert checks["full", "8-bit products"].detail == "8 quantized products in 8 GEMMs of 8 bits"
    assert checks["full", "engines"].detail == "for 8.9 and 12.0"
    assert checks["full", "fused attention"].passed is None
    assert checks["full", "fused attention"].detail.startswith("not met: ")
    assert checks["reuse", "fused attention"].detail == "there is no attention"


@pytest.mark.slow
@pytest.mark.usefixtures("_library")
def test_16_bits_conform(program: Program, tmp_path: Path) -> None:
    reduced = Pipeline.parse("plan-precision{dtype=float16},reduce-precision").run(program)
    checks = check(reduced, export(reduced, tmp_path), "tensorrt-rtx")
    assert failed(checks) == set()
    assert checks["full", "fused attention"].detail == "each of 2 is one kernel"


@pytest.mark.slow
@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize(
    ("damage", "name", "detail"),
    [
        (call_stranger, "read by TensorRT-RTX", "stranger"),
        (branch, "conditional jumps", "1 in the engine in If choice: no CUDA graph can hold it"),
    ],
)
def test_a_damage_fails_the_gate_of_engines(
    program: Program, copy: Path, damage: Callable[[onnx.ModelProto], None], name: str, detail: str
) -> None:
    with altered(copy) as model:
        damage(model)
    checks = check(program, copy, "tensorrt-rtx")
    assert checks["full", name].passed is False
    assert detail in checks["full", name].detail


@pytest.mark.slow
@pytest.mark.usefixtures("_library")
def test_every_node_that_cannot_be_read_is_named(compiled: Any) -> None:
    checks = check(compiled.program, compiled.folder, "tensorrt-rtx")
    reading = checks["full", "read by TensorRT-RTX"]
    assert reading.value == reading.detail.count("/MatMulInteger") == 8
    assert {"read by TensorRT-RTX", "constant scales", "scales and zero points"} == failed(checks)


@pytest.mark.slow
@pytest.mark.usefixtures("_library")
def test_other_versions_are_not_looked_into(program: Program, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcgraph.export.check.engine_checks.PROBED_VERSIONS", ("9.9",))
    checks = check(program, folder, "tensorrt-rtx")
    assert failed(checks) == set()
    for name in ("8-bit products", "fused attention", "conditional jumps"):
        assert checks["full", name].passed is None
        assert checks["full", name].detail.startswith("not looked at: ")
