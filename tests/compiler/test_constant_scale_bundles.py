"""Bundles for consumers that need constant scales, compiled from the embedded model: verified, drawing digits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import qcgraph
from qcgraph.compiler.compilation import verify_bundle
from qcgraph.export.run.open import runner_of
from qcgraph.models.classifier import load_classifier
from qcgraph.recipe import Recipe
from qcgraph.sampling.loop import sample

pytestmark = pytest.mark.slow  # it compiles
LABELS = list(range(10))
CASES = [  # each part of the form once; a compilation takes seconds
    ("tensorrt-rtx", "w8a8", 'scales = "range"\n'),
    ("onnx-opset21", "w6a6", "attention = true\n"),
]


@pytest.mark.parametrize(("target", "bits", "text"), CASES)
def test_it_compiles_verifies_and_draws(target: str, bits: str, text: str, tmp_path: Path) -> None:
    few = f'[calibration]\ntrajectories = 4\n[quantization]\nrounding = "nearest"\ngroups = 3\n{text}'
    recipe = Recipe.from_toml(few).override(target=target, bits=bits, steps=7, cache="interval=3")
    bundle = qcgraph.compile("digits", recipe, output=tmp_path / "bundle")
    can_judge = target != "tensorrt-rtx" or importlib.util.find_spec("tensorrt_rtx") is not None
    checks = verify_bundle(bundle, target=target if can_judge else "onnx")
    assert all(check.passed for check in checks)
    assert [check.value for check in checks if check.name == "constant scales"] == [0]
    drawn, expected = (sample(runner_of(bundle, name), bundle.plan, bundle.spec, LABELS, 5) for name in (None, "torch"))
    assert np.linalg.norm(drawn - expected) / np.linalg.norm(expected) < 0.05
    assert load_classifier().accuracy(torch.from_numpy(drawn), torch.tensor(LABELS)) >= 0.9
