"""A tiny compiled program, in memory."""

from __future__ import annotations

import pytest

from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.export.targets import TARGETS
from qcgraph.ir.program import Program
from qcgraph.recipe import Recipe


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Everything at once: quantized, cached, compensated."""
    return Recipe.from_toml("[calibration]\ntrajectories = 16\n").override(
        steps=9, groups=2, cache="interval=3", compensate="vc"
    )


@pytest.fixture(scope="session", params=["torch", "onnxruntime-cpu", "onnx"])
def compiled(request: pytest.FixtureRequest, captured: Program, recipe: Recipe) -> Program:
    """The tiny denoiser, compiled for a target: with linears as they are, lowered, and with constant scales."""
    return default_pipeline(recipe, TARGETS[request.param]).run(captured)
