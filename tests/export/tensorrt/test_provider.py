"""Engines: which batches they take, what is refused, and, where TensorRT-RTX is installed, what is built."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qcgraph.bundle import Bundle, write_plan, writing
from qcgraph.bundle.engines import Batch, EngineManifest, engine_files, has_engines, read_engines
from qcgraph.errors import BundleError, UsageError
from qcgraph.export.tensorrt import engines
from qcgraph.export.tensorrt import provider as tensorrt
from qcgraph.export.tensorrt.engines import batch_for, build_engines, default_batch, default_provider, parse_batch
from qcgraph.export.tensorrt.provider import NodeProblem, compute_capabilities, load_provider, refusal
from qcgraph.facts import Facts
from qcgraph.ir.program import Program
from qcgraph.plan.roles import COMPUTES, HALF, TensorRole, prepares
from qcgraph.plan.spec import Interface, ModelSpec, TensorSpec
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update
from qcgraph.progress import Progress
from qcgraph.recipe import Recipe
from qcgraph.sampling.modulation import TOGETHER

ROLES = {"full": COMPUTES, "half": HALF, "prepare_full": prepares("full")}
GUIDED = StepPlan(Fingerprint("0123456789abcdef", "ddim", 1, 1.5), (Step(1.0, Update(1.0, 0.1), "full"),), ROLES)


def batch(minimum: int, optimum: int, maximum: int) -> Batch:
    return Batch(minimum=minimum, optimum=optimum, maximum=maximum)


@pytest.fixture
def bundle_of(tmp_path: Path) -> Callable[..., Bundle]:
    """A bundle around exported graphs."""

    def build(program: Program, folder: Path, name: str = "bundle") -> Bundle:
        facts: Facts = program.facts
        interfaces = {variant: graph.interface for variant, graph in program.variants.items()}
        with writing(tmp_path / name, model="tiny", target="onnxruntime-cpu") as place:
            write_plan(place, facts[ModelSpec], facts[StepPlan], interfaces)
            (place / "recipe.lock.toml").write_text(Recipe().to_toml())
            for file in folder.iterdir():
                (place / file.name).write_bytes(file.read_bytes())
        return Bundle.open(tmp_path / name)

    return build


@pytest.fixture
def bundle(unquantized: Any, bundle_of: Callable[..., Bundle]) -> Bundle:
    return bundle_of(unquantized.program, unquantized.folder)


def test_a_batch_is_three_rising_numbers() -> None:
    assert parse_batch("2,4,16") == batch(2, 4, 16)
    assert parse_batch(" 1, 1 ,1") == batch(1, 1, 1)
    assert str(parse_batch("2,4,16")) == "2,4,16"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("4", "not three whole numbers"),
        ("1,2,3,4", "not three whole numbers"),
        ("1,2,many", "not three whole numbers"),
        ("", "not three whole numbers"),
        ("0,1,2", "the smallest batch is 1, not 0"),
        ("4,2,8", "does not rise"),
        ("1,9,8", "does not rise"),
    ],
)
def test_other_batches_are_refused(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as raised:
        parse_batch(text)
    assert raised.value.where == "--batch"


def test_the_default_is_one_to_eight_samples() -> None:
    assert default_batch(GUIDED) == batch(2, 2, 16)
    assert default_batch(replace(GUIDED, fingerprint=replace(GUIDED.fingerprint, guidance=1.0))) == batch(1, 1, 8)


def test_a_variant_of_both_halves_takes_even_batches() -> None:
    assert batch_for("full", batch(1, 3, 5), GUIDED) == batch(1, 3, 5)
    assert batch_for("half", batch(2, 4, 6), GUIDED) == batch(2, 4, 6)
    with pytest.raises(UsageError, match="half takes both halves of guidance in one batch, and 3 is odd"):
        batch_for("half", batch(2, 3, 6), GUIDED)


def test_a_preparing_variant_sees_many_steps_at_once() -> None:
    assert batch_for("full", batch(2, 2, 16), GUIDED) == batch(2, 2, 16)
    assert batch_for("prepare_full", batch(2, 2, 16), GUIDED) == batch(1, TOGETHER, TOGETHER)
    assert batch_for("prepare_full", batch(2, 2, 256), GUIDED) == batch(1, TOGETHER, 256)


def test_every_node_is_named_and_every_reason_once() -> None:
    nodes = tuple(NodeProblem(name, "MatMulInteger", "is not supported") for name in ("a", "b"))
    other = NodeProblem("c", "Clip", "int8 is not allowed")
    message = refusal({"full.onnx": (*nodes, other), "reuse.onnx": nodes[:1]}).message
    assert message.splitlines() == [
        "TensorRT cannot hold 4 of the nodes",
        "  full.onnx: MatMulInteger is not supported: a, b",
        "  full.onnx: Clip int8 is not allowed: c",
        "  reuse.onnx: MatMulInteger is not supported: a",
    ]
    assert refusal({"full.onnx": (other,)}).message == "full.onnx: Clip int8 is not allowed: c"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(tensorrt.importlib, "import_module", missing)
    with pytest.raises(UsageError, match="TensorRT-RTX is not installed") as raised:
        load_provider("tensorrt-rtx")
    assert raised.value.hint == "pip install qcgraph[tensorrt-rtx]"
    with pytest.raises(UsageError, match="unknown provider 'tensorrt-rt'"):
        load_provider("tensorrt-rt")


def test_a_bundle_is_built_by_what_it_was_compiled_for(bundle: Bundle) -> None:
    assert default_provider(bundle) == "tensorrt-rtx"
    compiled = replace(bundle, manifest=bundle.manifest.model_copy(update={"target": "tensorrt"}))
    assert default_provider(compiled) == "tensorrt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tensorrt_builds_for_the_gpu_that_is_here(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "load_provider", lambda _: SimpleNamespace(__version__="10.13.0"))
    for capabilities in ([], ["8.9"]):
        with pytest.raises(UsageError, match="TensorRT builds for the GPU that is here, and ") as raised:
            build_engines(bundle, capabilities, provider="tensorrt")
        assert raised.value.where == "--compute-capability"
        assert raised.value.hint == "build with --target tensorrt-rtx"


def test_a_library_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libtensorrt_rtx.so: no such file")

    monkeypatch.setattr(tensorrt.importlib, "import_module", broken)
    with pytest.raises(UsageError, match=r"TensorRT-RTX cannot be loaded: libtensorrt_rtx\.so: no such file"):
        load_provider("tensorrt-rtx")


def test_engines_that_are_no_engines(tmp_path: Path) -> None:
    assert not has_engines(tmp_path)
    with pytest.raises(BundleError, match="the file is missing"):
        read_engines(tmp_path)
    (tmp_path / "engines.json").write_text('{"format": 9, "qcgraph": "0.0", "engines": []}')
    assert engine_files(tmp_path) == {"engines.json"}
    with pytest.raises(BundleError):
        read_engines(tmp_path)


# What follows needs the library, and no GPU.


@pytest.fixture
def module() -> Any:
    return pytest.importorskip("tensorrt_rtx")


def test_compute_capabilities_of_the_library(module: Any) -> None:
    names = list(compute_capabilities(module))
    assert {"8.9", "12.0"} <= set(names)
    assert names == sorted(names, key=float)


def test_a_graph_is_read_with_its_weights(module: Any, unquantized: Any) -> None:
    assert tensorrt.problems(module, unquantized.folder / "full.onnx") == ()


def test_every_node_that_the_library_refuses_is_found(module: Any, compiled: Any) -> None:
    found = tensorrt.problems(module, compiled.folder / "full.onnx")
    assert len(found) > 5
    assert {(item.operator, item.reason) for item in found} == {("MatMulInteger", "is not supported")}
    assert all(item.node.endswith("/MatMulInteger") for item in found)


def test_another_interface_is_refused(module: Any, unquantized: Any) -> None:
    latent = TensorSpec("latent", "f32", ("B", 1, 8, 8), TensorRole.STATE)
    wrong = Interface((latent,), (TensorSpec("other", "f32", ("B",), TensorRole.PREDICTION),))
    with pytest.raises(BundleError, match="not those of its plan"):
        tensorrt.build(module, unquantized.folder / "reuse.onnx", wrong, batch(2, 2, 2), "8.9")


@pytest.mark.slow
def test_engines_of_a_bundle(module: Any, bundle: Bundle) -> None:
    record = build_engines(bundle, ["8.9", "12.0"])
    folder = bundle.path / "engines"
    assert isinstance(record, EngineManifest)
    assert [engine.file for engine in record.engines] == [
        "full.sm89.engine",
        "full.sm120.engine",
        "reuse.sm89.engine",
        "reuse.sm120.engine",
    ]
    assert (record.provider, record.version) == ("tensorrt-rtx", module.__version__)
    assert record.source.manifest == hashlib.sha256((bundle.path / "manifest.json").read_bytes()).hexdigest()
    for engine in record.engines:
        content = (folder / engine.file).read_bytes()
        assert (engine.bytes, engine.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert engine.layers > (engine.steps or 0) > 0
        assert (engine.quantized_gemms, engine.conditional_jumps) == (0, 0)
    assert engine_files(folder) == {path.name for path in folder.iterdir()}
    assert Bundle.open(bundle.path).manifest == bundle.manifest

    with pytest.raises(UsageError, match="exists"):
        build_engines(bundle, ["8.9"])
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds mine\.txt, which qcgraph did not write"):
        build_engines(bundle, ["8.9"], force=True)
    (folder / "mine.txt").unlink()
    assert len(build_engines(bundle, ["8.9"], force=True).engines) == 2
    with writing(bundle.path, model="tiny", target="torch", force=True) as place:  # the engines go with their bundle
        write_plan(place, bundle.spec, bundle.plan, bundle.interfaces)
        (place / "recipe.lock.toml").write_text(Recipe().to_toml())
    assert not folder.exists()


class Replacing(Progress):
    """Puts another bundle in the place of one when the first engine is begun."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def note(self, text: str) -> None:
        """Replace the bundle, at the first line of a build."""
        if text.startswith("building full"):
            bundle = self._bundle
            with writing(bundle.path, model="another", target="onnxruntime-cpu", force=True) as place:
                shutil.copytree(bundle.path, place, ignore=lambda *_: ["manifest.json"], dirs_exist_ok=True)


def test_a_bundle_that_is_replaced_meanwhile_gives_no_engines(module: Any, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="replaced, changed or deleted while it was built into engines") as error:
        build_engines(bundle, ["8.9"], tmp_path / "elsewhere", progress=Replacing(bundle))
    assert error.value.hint == "do it again"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
def test_forecasts_take_their_row_as_a_scalar(
    module: Any, forecasting: Any, bundle_of: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = bundle_of(forecasting.program, forecasting.folder)
    assert any(spec.shape == () for interface in bundle.interfaces.values() for spec in interface.inputs)
    record = build_engines(bundle, ["8.9"], tmp_path / "elsewhere", batch(1, 2, 3))
    assert {engine.variant for engine in record.engines} == set(bundle.interfaces)
    assert {engine.batch for engine in record.engines} == {batch(1, 2, 3)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorRT-RTX has the calls, and measures nothing
def test_timings_go_into_the_next_build(
    module: Any, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = module.Builder(tensorrt.quiet_log(module)).create_builder_config()
    for earlier in (b"", b"of something else"):
        assert bytes(tensorrt.timings_of(config, earlier).serialize())

    given = []

    def build(*arguments: Any) -> tensorrt.Built:
        given.append(arguments[-1])
        return tensorrt.Built(memoryview(b"engine"), 1.0, 7, b"timings")

    provider = replace(tensorrt.LIBRARIES["tensorrt-rtx"], builds_ahead=False)
    monkeypatch.setattr(tensorrt, "LIBRARIES", {"tensorrt-rtx": provider})
    monkeypatch.setattr(tensorrt, "build", build)
    monkeypatch.setattr(engines, "_present_capability", lambda *_: "8.9")
    for _ in range(2):
        build_engines(bundle, [], tmp_path / "engines", force=True)
    assert (tmp_path / "engines" / "timing.cache").read_bytes() == b"timings"
    assert given == [b"", b"timings", b"timings", b"timings"]


def test_a_failure_leaves_nothing(module: Any, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = tensorrt.build

    def fails(*arguments: Any) -> tensorrt.Built:
        if arguments[1].name == "full.onnx":
            raise KeyboardInterrupt
        return built(*arguments)

    monkeypatch.setattr(tensorrt, "build", fails)
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, ["8.9"], tmp_path / "engines")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_engines_are_json(module: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record, with an engine that is not one: nothing can be told of its steps."""
    monkeypatch.setattr(tensorrt, "build", lambda *_: tensorrt.Built(memoryview(b"engine"), 1.2345, 7))
    build_engines(bundle, ["8.9", "8.9"])
    data = json.loads((bundle.path / "engines" / "engines.json").read_text())
    assert data["format"] == 1
    (first, _) = data["engines"]
    assert (first["seconds"], first["layers"], first["steps"], first["quantized_gemms"]) == (1.23, 7, None, None)
