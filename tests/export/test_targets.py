"""Targets: names, hints, and that every legalization is a pipeline."""

from __future__ import annotations

import pytest

from qcgraph.errors import UsageError
from qcgraph.export.targets import TARGETS, Target, target_named
from qcgraph.pipeline import Pipeline


@pytest.mark.parametrize("name", TARGETS)
def test_found_by_name(name: str) -> None:
    assert target_named(name).name == name


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(UsageError, match="unknown target 'onnxruntime_cpu'\n\nhint: did you mean 'onnxruntime-cpu'"):
        target_named("onnxruntime_cpu")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_legalization_is_pipeline_text(target: Target) -> None:
    assert Pipeline.parse(target.legalize).text == target.legalize


def test_weights_of_onnxruntime_never_saturate() -> None:
    """CPUs without VNNI add two products of uint8 and int8 in a saturating int16."""
    high = TARGETS["onnxruntime-cpu"].weight_high
    assert 2 * 255 * high <= 2**15 - 1 < 2 * 255 * (high + 1)
