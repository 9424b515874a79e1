"""The model a bundle came from: found by what was typed, recognised by its weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qcgraph.bundle import Bundle
from qcgraph.cli import run
from qcgraph.compiler.compilation import compile_model
from qcgraph.errors import UsageError
from qcgraph.models import LoadedModel, load_model
from qcgraph.models.source import captured_origin, find_model
from qcgraph.recipe import Recipe

EXACT = Recipe().override(steps=2, bits="off", target="torch")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    compiled = compile_model("digits", EXACT, tmp_path_factory.mktemp("origin") / "digits").bundle
    assert compiled is not None
    return compiled


@pytest.mark.slow
def test_what_was_typed_is_recorded(bundle: Bundle) -> None:
    assert bundle.report is not None
    assert bundle.report.source == "digits"


@pytest.mark.slow
def test_the_recorded_model_is_found_and_is_the_one(bundle: Bundle) -> None:
    program = captured_origin(bundle, find_model(bundle))
    assert program.constants_digest == bundle.plan.fingerprint.model
    assert list(program.variants) == ["main"]


@pytest.mark.slow
def test_other_weights_are_refused(bundle: Bundle) -> None:
    model = load_model("digits")
    with torch.no_grad():
        next(model.module.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(UsageError, match="was compiled from another model") as caught:
        captured_origin(bundle, model)
    assert "--model" in str(caught.value)


@pytest.mark.slow
def test_a_model_that_came_as_an_object_is_looked_for_by_its_name(tmp_path: Path, tiny_model: LoadedModel) -> None:
    bundle = compile_model(tiny_model, EXACT, tmp_path / "tiny").bundle
    assert bundle is not None
    assert bundle.report is not None
    assert bundle.report.source is None
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


@pytest.mark.slow
def test_a_model_of_the_current_folders_checkout_is_found_from_another_folder(
    small_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = tmp_path / "tools" / "models" / small_digits.name
    placed.parent.mkdir(parents=True)
    placed.symlink_to(small_digits)
    monkeypatch.chdir(tmp_path)
    bundle = compile_model(small_digits.name, EXACT, tmp_path / "bundle").bundle
    assert bundle is not None
    monkeypatch.chdir("/")
    captured_origin(bundle, find_model(bundle))


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that can be imported, and the file that it makes when it is."""
    (tmp_path / "trap_module.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'imported')!r}).touch()\n"
        "def factory():\n    raise AssertionError('called')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "imported"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["trap_module:factory", "os:abort", "trap_module:missing"])
def test_a_recorded_function_is_never_called(
    bundle: Bundle,
    tmp_path: Path,
    trap: Path,
    source: str,
    rewrite_report: Callable[[Path, dict[str, object]], None],
) -> None:
    shutil.copytree(bundle.path, tmp_path / "copied")
    rewrite_report(tmp_path / "copied", {"source": source})
    opened = Bundle.open(tmp_path / "copied")
    with pytest.raises(UsageError, match=f"was compiled from '{source}', and what a bundle names is not") as caught:
        find_model(opened)
    assert "name it yourself, if you trust it: --model " in (caught.value.hint or "")
    for command in (["eval"], ["bench", "--no-baselines"], ["verify"], ["inspect"]):
        run([command[0], str(opened.path)])
    assert not trap.exists()


def test_the_name_of_a_model_is_not_called_either(
    bundle: Bundle, tmp_path: Path, trap: Path, rewrite_report: Callable[[Path, dict[str, object]], None]
) -> None:
    shutil.copytree(bundle.path, tmp_path / "copied")
    rewrite_report(tmp_path / "copied", {"source": None})
    rewrite(tmp_path / "copied", "plan.json", lambda text: text.replace('"digits"', '"trap_module:factory"'))
    with pytest.raises(UsageError, match="what a bundle names is not called"):
        find_model(Bundle.open(tmp_path / "copied"))
    assert not trap.exists()


def test_a_function_that_the_user_names_is_called(bundle: Bundle, tmp_path: Path, trap: Path) -> None:
    with pytest.raises(UsageError, match=r"your factory factory\(\) raised AssertionError: called"):
        find_model(bundle, "trap_module:factory")
    assert trap.exists()


def rewrite(folder: Path, name: str, change: Callable[[str], str]) -> None:
    """Change a file of a bundle, and its entry in the manifest."""
    path, manifest = folder / name, folder / "manifest.json"
    content = change(path.read_text()).encode()
    path.write_bytes(content)
    data = json.loads(manifest.read_text())
    data["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest.write_text(json.dumps(data))


@pytest.fixture
def rewrite_report() -> Callable[[Path, dict[str, object]], None]:
    """Change fields of a bundle's report, and its entry in the manifest."""

    def change(folder: Path, fields: dict[str, object]) -> None:
        rewrite(folder, "report.json", lambda text: json.dumps(json.loads(text) | fields))

    return change
