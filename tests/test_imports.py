"""Imports point one way, and the command line starts without the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOMES = {"qcgraph.passes": ROOT / "passes", "qcgraph.export": ROOT / "export", "qcgraph": ROOT / "qcgraph"}


@dataclass(frozen=True)
class Layer:
    """Some modules and what they may import; names are separated by blanks.

    Attributes:
        modules: rooms and modules; a room stands for all that is in it, unless that is named in another layer.
        sees: the layers that these modules may import, besides their own.
        torch: whether importing these modules may import torch.
        peers: whether these modules may import each other.
        heavy: a slow or optional library that importing these modules may import.
    """

    modules: str
    sees: str = ""
    torch: bool = True
    peers: bool = True
    heavy: str = ""


BELOW = (
    "base files plan sampling facts recipe bundle ir capture models pipeline export runtime passes forecasters "
    "evaluation benchmark"
)
LAYERS = {
    # Everything may say what is wrong and how far it is, and keep libraries from saying more.
    "base": Layer("qcgraph.errors qcgraph.extensions qcgraph.progress qcgraph.quiet", torch=False),
    "files": Layer("qcgraph.files", "base", torch=False),
    # Plain data and arithmetic. Running a bundle needs nothing above this but a runner.
    "plan": Layer("qcgraph.plan", "base", torch=False),
    "sampling": Layer("qcgraph.sampling", "base plan", torch=False),
    "facts": Layer("qcgraph.facts", "base plan", torch=False),
    "recipe": Layer("qcgraph.recipe", "base files plan", torch=False),
    "bundle": Layer("qcgraph.bundle", "base files plan facts recipe", torch=False),
    # Program, its ops, legality and text.
    "ir": Layer("qcgraph.ir", "base files plan sampling facts"),
    "capture": Layer("qcgraph.capture", "base plan facts ir"),
    # The denoisers that ship or can be loaded. What compiles sees modules, never this room.
    "models": Layer("qcgraph.models", "base files plan sampling bundle ir capture"),
    # What a pass is, what orders them and what watches them.
    "pipeline": Layer("qcgraph.pipeline", "base files plan sampling facts bundle ir"),
    # Export reaches passes through the registry, by name.
    "export": Layer("qcgraph.export", "base files plan sampling facts bundle ir capture runtime"),
    # Running a bundle with ONNX Runtime must not import torch: what needs it is imported on demand.
    "runtime": Layer(
        "qcgraph.export.targets qcgraph.export.run.open qcgraph.export.run.runtimes qcgraph.export.run.onnxruntime",
        "base files plan sampling facts bundle ir export",
        torch=False,
    ),
    # Passes meet in the Program, never in each other; they may share helpers, which begin with _.
    "passes": Layer("qcgraph.passes", "base files plan sampling facts ir pipeline forecasters", peers=False),
    "forecasters": Layer("qcgraph.passes.caching.forecasters", "base"),
    # Judging a compilation, in memory or in a bundle.
    "evaluation": Layer(
        "qcgraph.evaluation", "base files plan sampling facts recipe bundle ir capture models pipeline export runtime"
    ),
    # Latency of a bundle against baselines. A process that runs one of them holds that one's runtime alone.
    "benchmark": Layer(
        "qcgraph.benchmark", "base files plan sampling bundle capture models export runtime", torch=False
    ),
    # A class of diffusers, which only a host that has diffusers asks for.
    "schedulers": Layer("qcgraph.schedulers", "base plan facts bundle", heavy="diffusers"),
    # The only room that sees all.
    "compiler": Layer("qcgraph.compiler", BELOW),
    "cli": Layer("qcgraph qcgraph.__main__ qcgraph.cli", f"{BELOW} compiler", torch=False),
}

# Slow to import, optional, or both: imported by the function that needs them.
INSIDE_FUNCTIONS = (
    "diffusers",
    "matplotlib",
    "nncf",
    "onnx",
    "onnx_graphsurgeon",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "scipy",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "torchmetrics",
)
TORCH = ("safetensors.torch", "torch")
NOT_FOR_HELP = (*INSIDE_FUNCTIONS, "PIL", "numpy", "pydantic", "safetensors", "torch")


@dataclass(frozen=True)
class Import:
    """One import in a source file.

    Attributes:
        target: the dotted name, as far as it names a module of qcgraph; of another library, all of it.
        line: where.
        eager: whether importing the file runs it: it stands outside of functions and TYPE_CHECKING.
    """

    target: str
    line: int
    eager: bool


def find_modules() -> dict[str, Path]:
    """The modules of the package and their files."""
    found: dict[str, Path] = {}
    for package, home in HOMES.items():
        for path in home.rglob("*.py"):
            parts = path.relative_to(home).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = find_modules()
LAYER_OF = {module: name for name, layer in LAYERS.items() for module in layer.modules.split()}


def layer_of(module: str) -> str | None:
    """The layer of a module: its own entry or that of the closest package above it, but not ``qcgraph`` itself."""
    if module == "qcgraph":
        return LAYER_OF[module]
    while module != "qcgraph":
        if module in LAYER_OF:
            return LAYER_OF[module]
        module = module.rpartition(".")[0]
    return None


def imports_of(path: Path) -> Iterator[Import]:
    """All imports of a file, also those inside functions."""
    yield from walk(ast.parse(path.read_text(), str(path)), eager=True)


def walk(node: ast.AST, *, eager: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (Import(resolve(node.module or "", alias.name), node.lineno, eager) for alias in node.names)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.body:
            yield from walk(child, eager=False)
        for child in node.orelse:
            yield from walk(child, eager=eager)
    else:
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, eager=eager and not inside)


def resolve(module: str, name: str) -> str:
    """What ``from module import name`` imports: a module when there is one, else something in it."""
    whole = f"{module}.{name}"
    return module if module.partition(".")[0] == "qcgraph" and whole not in MODULES else whole


def is_of(target: str, libraries: tuple[str, ...]) -> bool:
    return any(f"{target}.".startswith(f"{library}.") for library in libraries)


def test_every_module_has_a_layer() -> None:
    assert [module for module in MODULES if layer_of(module) is None] == []


def test_the_table_names_what_exists() -> None:
    assert [module for module in LAYER_OF if module not in MODULES] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    own = layer_of(module)
    assert own is not None, "not in LAYERS"
    allowed = {own, *LAYERS[own].sees.split()}
    wrong = []
    for item in imports_of(MODULES[module]):
        if not is_of(item.target, ("qcgraph",)):
            continue
        layer = layer_of(item.target)
        sideways = layer == own and item.target != module and not LAYERS[own].peers and "._" not in item.target
        if layer not in allowed or sideways:
            wrong.append(f"line {item.line}: {own} may not import {item.target} ({layer})")
    assert wrong == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_libraries_are_imported_inside_functions(module: str) -> None:
    own = layer_of(module)
    assert own is not None, "not in LAYERS"
    banned = INSIDE_FUNCTIONS if LAYERS[own].torch else INSIDE_FUNCTIONS + TORCH
    banned = tuple(library for library in banned if library != LAYERS[own].heavy)
    eager = [item for item in imports_of(MODULES[module]) if item.eager]
    assert [f"line {item.line}: {item.target}" for item in eager if is_of(item.target, banned)] == []


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        "import onnx.helper\n"
        "from typing import TYPE_CHECKING\n"
        "from qcgraph.errors import UsageError\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "try:\n    import sklearn\nexcept ImportError:\n    pass\n"
        "def run():\n    from torch import nn\n    from qcgraph import errors\n"
    )
    assert list(imports_of(source)) == [
        Import("onnx.helper", 1, eager=True),
        Import("typing.TYPE_CHECKING", 2, eager=True),
        Import("qcgraph.errors", 3, eager=True),
        Import("torch", 5, eager=False),
        Import("sklearn", 7, eager=True),
        Import("torch.nn", 11, eager=False),
        Import("qcgraph.errors", 12, eager=False),
    ]


def imported_by(arguments: list[str], directory: Path) -> set[str]:
    """The modules that a Python process imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    heading = "import time:"
    messages = [line for line in done.stderr.splitlines() if not line.startswith(heading)]
    assert done.returncode == 0, "\n".join(messages)
    rows = [line.removeprefix(heading).split("|") for line in done.stderr.splitlines() if line.startswith(heading)]
    return {name.strip() for _, _, name in rows[1:]}  # the first row holds the titles


@pytest.mark.parametrize(
    "arguments", [["-c", "import qcgraph.cli"], ["-m", "qcgraph", "--help"]], ids=["import", "help"]
)
def test_command_line_starts_lean(arguments: list[str], tmp_path: Path) -> None:
    imported = imported_by(arguments, tmp_path)
    assert sorted(name for name in imported if is_of(name, NOT_FOR_HELP)) == []


ABOVE = {"benchmark", "cli"}  # no torch of their own, and not needed to run a bundle


def test_a_bundle_runs_without_torch(tmp_path: Path) -> None:
    modules = sorted(
        name for name in MODULES if not LAYERS[layer_of(name) or "cli"].torch and layer_of(name) not in ABOVE
    )
    imported = imported_by(["-c", f"import {', '.join(modules)}"], tmp_path)
    assert set(modules) <= imported
    assert sorted(name for name in imported if is_of(name, (*INSIDE_FUNCTIONS, *TORCH))) == []
