"""Bundles for consumers that need constant scales, compiled from the embedded model: verified, drawing digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qcgraph
from qcgraph.compiler import verify_bundle
from qcgraph.export.targets import TARGETS
from qcgraph.models.classifier import load_classifier
from qcgraph.recipe import Recipe
from qcgraph.runtime import open_runner
from qcgraph.sampling import sample

pytestmark = pytest.mark.slow  # it compiles
LABELS = list(range(10)) * 2
CASES = [
    *((name, "w8a8", "") for name, target in TARGETS.items() if target.constant_scales),
    ("onnx", "w6a6", ""),
    ("onnx", "w4a8", ""),
    ("onnx", "auto=6", ""),
    ("onnx", "w8a8", "[quantization]\nattention = true\n"),
]


@pytest.mark.parametrize(("target", "bits", "text"), CASES)
def test_it_compiles_verifies_and_draws(target: str, bits: str, text: str, tmp_path: Path) -> None:
    recipe = Recipe.from_toml(text).override(target=target, bits=bits, steps=10, cache="interval=3")
    bundle = qcgraph.compile("digits", recipe, output=tmp_path / "bundle")
    checks = verify_bundle(bundle)
    assert all(check.passed for check in checks)
    assert [check.value for check in checks if check.name == "constant scales"] == [0]
    drawn, expected = (
        sample(open_runner(bundle, name), bundle.plan, bundle.spec, LABELS, 5) for name in (None, "torch")
    )
    assert np.linalg.norm(drawn - expected) / np.linalg.norm(expected) < 0.05
    assert load_classifier().accuracy(torch.from_numpy(drawn), torch.tensor(LABELS)) >= 0.9
