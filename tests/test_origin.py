"""The model a bundle came from: found by what was typed, recognised by its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qcgraph.bundle import Bundle
from qcgraph.compiler import compile_model
from qcgraph.errors import UsageError
from qcgraph.models import LoadedModel, load_model
from qcgraph.origin import captured_origin, find_model
from qcgraph.recipe import Recipe

EXACT = Recipe().override(steps=2, bits="off", target="torch")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    compiled = compile_model("digits", EXACT, tmp_path_factory.mktemp("origin") / "digits").bundle
    assert compiled is not None
    return compiled


def test_what_was_typed_is_recorded(bundle: Bundle) -> None:
    assert bundle.report["source"] == "digits"


def test_the_recorded_model_is_found_and_is_the_one(bundle: Bundle) -> None:
    program = captured_origin(bundle, find_model(bundle))
    assert program.constants_digest == bundle.plan.fingerprint.model
    assert list(program.variants) == ["main"]


def test_other_weights_are_refused(bundle: Bundle) -> None:
    model = load_model("digits")
    with torch.no_grad():
        next(model.module.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(UsageError, match="was compiled from another model") as caught:
        captured_origin(bundle, model)
    assert "--model" in str(caught.value)


def test_a_model_that_came_as_an_object_is_looked_for_by_its_name(tmp_path: Path, tiny_model: LoadedModel) -> None:
    bundle = compile_model(tiny_model, EXACT, tmp_path / "tiny").bundle
    assert bundle is not None
    assert bundle.report["source"] is None
    with pytest.raises(UsageError, match="cannot load the model that the bundle was compiled from, 'tiny'") as caught:
        find_model(bundle)
    assert "hint: say where it is now: --model" in str(caught.value)
    captured_origin(bundle, tiny_model)


def test_a_path_that_is_gone_asks_for_the_model(
    bundle: Bundle, tmp_path: Path, rewrite_report: Callable[[Path, dict[str, object]], None]
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(bundle.path, copied)
    rewrite_report(copied, {"source": "dit-xl-2:gone/weights.pt"})
    opened = Bundle.open(copied, check=True)
    with pytest.raises(UsageError, match="no such checkpoint file") as caught:
        find_model(opened)
    assert "--model" in str(caught.value)
    assert find_model(opened, "digits").spec.name == "digits"


@pytest.fixture
def rewrite_report() -> Callable[[Path, dict[str, object]], None]:
    """Change fields of a bundle's report, and its entry in the manifest."""
    import hashlib

    def rewrite(folder: Path, fields: dict[str, object]) -> None:
        path, manifest = folder / "report.json", folder / "manifest.json"
        text = json.dumps(json.loads(path.read_text()) | fields)
        path.write_text(text)
        data = json.loads(manifest.read_text())
        data["files"]["report.json"] = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "bytes": len(text)}
        manifest.write_text(json.dumps(data))

    return rewrite
