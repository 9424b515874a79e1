"""Graphs, engines and exports of a stranger: no file outside of their folder is read, whatever they name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from qcgraph.bundle import MANIFEST, Bundle
from qcgraph.bundle.engines import ENGINE_FOLDER, has_engines, read_engines
from qcgraph.bundle.exports import EXPORT_FOLDER
from qcgraph.cli import run
from qcgraph.errors import BundleError, UsageError
from qcgraph.export.onnx.valid import load_graph
from qcgraph.export.package.formats import export_bundle
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.export.run.open_engines import read_engine
from qcgraph.ir.serialize import load_program
from qcgraph.plan.roles import VariantKind
from qcgraph.sampling.runner import Call

BundleOf = Callable[[Any], Bundle]


def rewrite(bundle: Path, name: str, content: bytes) -> None:
    """Write a file anew, and its entry in the manifest."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def with_location(bundle: Path, location: str) -> None:
    """Let the weights of a graph come from another file."""
    model = onnx.load(bundle / "full.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    rewrite(bundle, "full.onnx", model.SerializeToString())


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "link", "pipe", "absent", "unlisted"])
def test_weights_come_from_the_bundle_alone(
    bundle_of: BundleOf, unquantized: Any, tmp_path: Path, location: str
) -> None:
    path = bundle_of(unquantized).path
    weights = (path / "weights.safetensors").read_bytes()
    (tmp_path / "secret").write_bytes(weights)
    (path / "unlisted").write_bytes(weights)
    (path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(path / "pipe")
    with_location(path, location)
    opened = Bundle.open(path)
    with pytest.raises(BundleError) as caught:
        export_bundle(opened, tmp_path / "exported", "onnx-single")
    assert caught.value.hint
    assert not (tmp_path / "exported").exists()
    if location != "unlisted":
        with pytest.raises(BundleError, match=f"takes weights from '{location}', which"):
            load_graph(path / "full.onnx")
        for command in ("sample", "verify"):
            target = ["-o", str(tmp_path / "grid.png"), "-n", "1"] if command == "sample" else []
            assert run([command, str(path), *target]) == 2
        runner = OnnxRuntimeRunner(path, opened.interfaces)
        with pytest.raises(BundleError):
            runner.run(Call("full", VariantKind.COMPUTES, 0, {}, {}))


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff" * 100, b"graph", b"\x08\x07"])
def test_what_is_no_graph(bundle_of: BundleOf, unquantized: Any, tmp_path: Path, content: bytes) -> None:
    path = bundle_of(unquantized).path
    rewrite(path, "full.onnx", content)
    with pytest.raises((BundleError, UsageError)):
        export_bundle(Bundle.open(path), tmp_path / "exported", "triton")
    assert run(["sample", str(path), "-o", str(tmp_path / "grid.png"), "-n", "1"]) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.safetensors", b""),
        ("weights.safetensors", b"\xff" * 16),
        ("weights.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"),
        ("program.json", b"\xff"),
        ("program.json", b"["),
        ("program.json", b"[" * 100000),
        ("program.json", b'{"format": 1, "variants": []}'),
        ("program.json", b'{"format": 1, "variants": {"main": 7}, "history": [], "facts": {}}'),
        ("program.json", b"null"),
    ],
)
def test_damaged_programs(
    captured: Any, tmp_path: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcgraph.ir.serialize import save_program

    save_program(captured, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError) as caught:
        load_program(tmp_path)
    assert caught.value.hint
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(BundleError, match="is not a regular file"):
        load_program(tmp_path)


# Records of engines and exports.

ENGINE = {
    "variant": "full",
    "file": "full.sm89.engine",
    "sha256": hashlib.sha256(b"engine").hexdigest(),
    "bytes": 6,
    "compute_capability": "8.9",
    "batch": {"minimum": 1, "optimum": 1, "maximum": 2},
    "seconds": 1.0,
    "layers": 1,
    "steps": None,
    "quantized_gemms": None,
    "not_quantized": None,
    "fused_attention": None,
    "conditional_jumps": None,
}
RECORD = {
    "format": 1,
    "qcgraph": "0.1.0",
    "provider": "tensorrt-rtx",
    "version": "1.0",
    "source": {"model": "tiny", "target": "torch", "manifest": "0" * 64},
    "engines": [ENGINE],
}


def engines(folder: Path, **changed: object) -> Path:
    folder.mkdir()
    (folder / "full.sm89.engine").write_bytes(b"engine")
    (folder / "timing.cache").write_bytes(b"grown since")
    (folder / "engines.json").write_text(json.dumps(RECORD | {"engines": [ENGINE | changed]}))
    return folder


@pytest.mark.parametrize("file", ["../engine", "/etc/passwd", "a/b", "", ".", "..", "a\0b"])
def test_engines_are_files_of_their_folder(tmp_path: Path, file: str) -> None:
    folder = engines(tmp_path / "engines", file=file)
    with pytest.raises(BundleError, match="which is no character" if "\0" in file else "file: String should match"):
        read_engines(folder)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_an_engine_that_is_something_else(tmp_path: Path, kind: str) -> None:
    folder = engines(tmp_path / "engines")
    engine = read_engines(folder).engines[0]
    assert read_engine(folder, engine) == b"engine"
    (folder / engine.file).rename(tmp_path / "engine")
    if kind == "pipe":
        os.mkfifo(folder / engine.file)
    else:
        (folder / engine.file).symlink_to("/dev/zero" if kind == "device" else tmp_path / "engine")
    with pytest.raises(BundleError, match=r"leads out|not a regular file"):
        read_engine(folder, engine)


@pytest.mark.parametrize(
    "text", ["{" * 10, '{"engines": ' * 5000, "[]", '{"engines": [7]}', "\ud800", '{"qcgraph": 1}']
)
def test_odd_records_of_engines(tmp_path: Path, text: str) -> None:
    folder = engines(tmp_path / "engines")
    (folder / "engines.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert not has_engines(folder)
    with pytest.raises(BundleError) as caught:
        read_engines(folder)
    assert caught.value.hint
    with pytest.raises(UsageError, match="exists and holds no engines"):
        ENGINE_FOLDER.check(folder, force=True)


@pytest.mark.parametrize("name", [".git", ".env", "mine.engine", "timing.cache.bak"])
def test_engines_are_replaced_alone(tmp_path: Path, name: str) -> None:
    folder = engines(tmp_path / "engines")
    ENGINE_FOLDER.check(folder, force=True)
    (folder / name).touch()
    with pytest.raises(UsageError, match=f"holds {name}, which qcgraph did not write"):
        ENGINE_FOLDER.check(folder, force=True)
    (folder / name).unlink()
    (folder / "full.sm89.engine").write_bytes(b"edited")
    with pytest.raises(UsageError, match="which was changed after qcgraph wrote it"):
        ENGINE_FOLDER.check(folder, force=True)


def test_exports_are_replaced_alone(bundle_of: BundleOf, unquantized: Any, tmp_path: Path) -> None:
    bundle, place = bundle_of(unquantized), tmp_path / "repository"
    export_bundle(bundle, place, "triton")
    (place / "2").mkdir()
    with pytest.raises(UsageError, match=r"holds 2/, which qcgraph did not write"):
        export_bundle(bundle, place, "triton", force=True)
    (place / "2").rmdir()
    (place / "1" / ".hidden").touch()
    with pytest.raises(UsageError, match=r"holds 1/\.hidden, which qcgraph did not write"):
        export_bundle(bundle, place, "triton", force=True)
    (place / "1" / ".hidden").unlink()
    (place / "config.pbtxt").write_text("edited")
    with pytest.raises(UsageError, match=r"holds config\.pbtxt, which was changed after qcgraph wrote it"):
        export_bundle(bundle, place, "triton", force=True)
    (place / "config.pbtxt").unlink()
    export_bundle(bundle, place, "triton", force=True)
    EXPORT_FOLDER.check(place, force=True)


@pytest.mark.parametrize("text", ["[]", '{"kind": "triton"}', '{"kind": "triton", "qcgraph": "1", "files": {"a": 1}}'])
def test_a_record_of_something_else_is_not_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(UsageError, match="was not written by qcgraph export"):
        EXPORT_FOLDER.check(tmp_path, force=True)
