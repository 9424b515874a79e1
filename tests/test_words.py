"""One word, one meaning: no class shares its name with another, and what roles say is spelled nowhere else."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("qcgraph", "passes", "export")

# Spellings that roles, calls and facts took the place of, and the files that may still have them, with the reason.
SPELLINGS = {
    r"\bFULL\b|\bis_preparation\b|\bpreparation\(|\bINPUTS\b|\bFROM_HOST\b": {},
    r'"(latent|timestep|modulation|group|row)"(?!: step\.)': {
        "qcgraph/plan/spec.py": "names the inputs",
        "qcgraph/plan/roles.py": "names the roles",
        "qcgraph/recipe/recipe.py": "a section of recipes",
        "qcgraph/cli/inspect_bundle.py": "columns of a table",
        "qcgraph/cli/solver_view.py": "columns of a table",
    },
    r'"(class_label|noise_prediction)"': {
        "qcgraph/plan/spec.py": "names the condition and the prediction",
        "qcgraph/sampling/denoiser.py": "what diffusers calls a condition",
        "qcgraph/cli/inspect_bundle.py": "columns of a table",
    },
    r'"main"': {
        "qcgraph/plan/steps.py": "names the captured variant",
        "qcgraph/cli/__init__.py": "the entry point",
        "export/tensorrt/steps.py": "a section in TensorRT's own text",
    },
    r'"full"': {
        "passes/caching/insert_cache.py": "names the computing variant",
        "qcgraph/plan/schedule/timed.py": "a word of plan files",
        "qcgraph/bundle/plan_file.py": "hints quote plan files",
    },
    r'"prepare_|_age\{|"_age': {
        "passes/caching/insert_forecast.py": "names the inputs of older values",
        "passes/lowering/hoist_adaln.py": "names the preparing variants",
        "export/package/single_model.py": "names the inputs of older values",
    },
    r"(removesuffix|endswith|removeprefix|startswith)\(\s*f?\"(_codes|_t|_scale|prepare|cache|_age)": {},
    r"null_class|class_count|class_label(?!\()|calibration_labels": {
        "qcgraph/plan/spec.py": "makes the condition of a class-conditional model",
        "qcgraph/sampling/denoiser.py": "the call of a diffusers transformer",
    },
    r"index_of\(float\(|TIMESTEP\.name\]\.flat|inputs\[\"timestep": {},
}
MODELS = "qcgraph/models/"  # a DiT and its folders are class-conditional


def sources() -> Iterator[tuple[str, str]]:
    """Yield the path of each module of the product, and its text without docstrings."""
    for home in PRODUCT:
        for path in sorted((ROOT / home).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")


def code(text: str) -> str:
    """Blank the docstrings and comments of a module."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for line in range(node.lineno - 1, (node.end_lineno or node.lineno)):
                lines[line] = ""
    return "\n".join(line.split("  #")[0] for line in lines)


def test_no_two_classes_share_a_name() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for path, text in sources():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                found[node.name.lstrip("_")].append(f"{path}:{node.lineno}")
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_a_role_says_is_spelled_nowhere_else(spelling: str) -> None:
    pattern, allowed = re.compile(spelling), SPELLINGS[spelling]
    found = {path for path, text in sources() if not path.startswith(MODELS) and pattern.search(code(text))}
    assert found == set(allowed)  # nor is there an exception that nothing needs
