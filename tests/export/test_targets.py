"""Targets: names, hints, and that every legalization is a pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcgraph.bundle import Bundle, writing
from qcgraph.errors import BundleError, UsageError
from qcgraph.export.targets import TARGETS, Target, record_of, target_named, target_of
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
    target = TARGETS["onnxruntime-cpu"]
    assert target.pair_high is not None
    assert 255 * target.pair_high <= 2**15 - 1 < 255 * (target.pair_high + 1)
    assert target.product_high == 64


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_bundle_holds_the_target_of_another_distribution(target: Target, tmp_path: Path) -> None:
    """Its own targets are known by name; another one is read from the manifest as data."""

    def bundle(name: str, record: dict[str, Any] | None) -> Bundle:
        with writing(tmp_path / name, model="toy", target=name, target_record=record, force=True) as folder:
            (folder / "plan.json").write_text("{}")
            (folder / "recipe.lock.toml").write_text("")
        return Bundle.open(tmp_path / name)

    assert record_of(target) is None
    assert target_of(bundle(target.name, None)) is target
    foreign = replace(target, name="foreign", opset=19)
    assert target_of(bundle("foreign", record_of(foreign))) == foreign
    with pytest.raises(UsageError, match="unknown target 'foreign'"):
        target_of(bundle("foreign", None))
    with pytest.raises(BundleError, match="holds a target that cannot be read"):
        target_of(bundle("foreign", {"name": "foreign", "opset": "many"}))
