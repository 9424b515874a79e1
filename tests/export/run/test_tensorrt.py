"""Engines on a GPU where there is one; elsewhere, that all that is asked of TensorRT-RTX exists."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcgraph.bundle import Bundle, write_plan, writing
from qcgraph.bundle.engines import ENGINES, runtime_cache
from qcgraph.export.run import tensorrt as run_tensorrt
from qcgraph.export.run.open_engines import open_engines
from qcgraph.export.run.tensorrt import TensorRTCall
from qcgraph.export.tensorrt.device import capability_of
from qcgraph.export.tensorrt.engines import build_engines
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.recipe import Recipe
from qcgraph.sampling.loop import sample

CLASSES = {  # what variables of the source hold
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "config": "IRuntimeConfig",
    "_runtime": "Runtime",
    "_kernels": "IRuntimeCache",
}


def asked() -> Iterator[tuple[str, str]]:
    """Every attribute that the source asks of a variable or an attribute, by their names."""
    for node in ast.walk(ast.parse(Path(run_tensorrt.__file__).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            yield (node.value.id if isinstance(node.value, ast.Name) else node.value.attr), node.attr


def test_all_that_is_asked_of_the_library_exists() -> None:
    module = pytest.importorskip("tensorrt_rtx")
    found = [(name, attribute) for name, attribute in asked() if name in CLASSES]
    assert {name for name, _ in found} == set(CLASSES)
    missing = [item for item in found if not hasattr(getattr(module, CLASSES[item[0]]), item[1])]
    assert missing == []
    assert [name for variable, name in asked() if variable == "module" and not hasattr(module, name)] == []
    kinds = ("ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy", "CudaGraphStrategy")
    for kind in (*kinds, "TensorIOMode", "TensorLocation"):
        members = [attribute for name, attribute in asked() if name == kind]
        assert members
        assert all(hasattr(getattr(module, kind), member) for member in members)
    assert set(run_tensorrt.TYPES.values()) <= set(module.DataType.__members__)
    assert hasattr(module.IExecutionContext, "is_stream_capturable")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_engines_draw_what_the_graphs_draw(unquantized: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    program = unquantized.program
    with writing(tmp_path / "bundle", model="tiny", target="tensorrt-rtx") as place:
        write_plan(place, program.facts[ModelSpec], program.facts[StepPlan], unquantized.interfaces)
        (place / "recipe.lock.toml").write_text(Recipe().to_toml())
        for file in unquantized.folder.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
    bundle = Bundle.open(tmp_path / "bundle")
    build_engines(bundle, ())
    runner = open_engines(bundle, "tensorrt-rtx")
    theirs, *ours = (
        sample(each, bundle.plan, bundle.spec, [0, 1, 4], seed=1) for each in (unquantized.runner(), runner, runner)
    )
    for latents in ours:
        assert np.linalg.norm(latents - theirs) <= 1e-2 * np.linalg.norm(theirs)  # products are of TensorFloat32
    assert all(call.is_graph for call in runner.calls if isinstance(call, TensorRTCall))
    assert (bundle.path / ENGINES / runtime_cache(capability_of(runner.device))).is_file()
