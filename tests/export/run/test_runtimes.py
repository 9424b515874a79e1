"""Runtimes: which one runs a target's programs, and what the one door makes of a program in a folder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.export.run.open import open_runner
from qcgraph.export.run.runtimes import ONNXRUNTIME, RUNTIMES, TORCH, Exported, runtime_for
from qcgraph.export.targets import TARGETS, Target
from qcgraph.ir.execute import TorchRunner
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.loop import sample


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_target_names_runtimes(target: Target) -> None:
    assert target.runtime in RUNTIMES
    assert (target.stand_in or TORCH) in RUNTIMES
    assert RUNTIMES[target.stand_in or target.runtime].reads_graphs == target.emits_onnx


@pytest.mark.parametrize(
    ("target", "precision", "expected"),
    [
        ("torch", "f32", TORCH),
        ("onnxruntime-cpu", "f32", ONNXRUNTIME),
        ("onnx", "f16", ONNXRUNTIME),
        ("onnx", "bf16", TORCH),
        ("tensorrt-rtx", "f16", ONNXRUNTIME),
        ("tensorrt", "bf16", TORCH),
    ],
)
def test_the_runtime_that_runs_a_type(target: str, precision: str, expected: str) -> None:
    assert runtime_for(TARGETS[target], precision).name == expected


def test_a_target_without_a_stand_in_runs_on_its_own() -> None:
    assert runtime_for(replace(TARGETS["tensorrt"], stand_in=""), "bf16").name == "tensorrt"


def test_a_program_in_a_folder_runs_on_each(unquantized: Any) -> None:
    exported = Exported(unquantized.program, unquantized.folder, unquantized.interfaces)
    target, facts = TARGETS["onnxruntime-cpu"], unquantized.program.facts
    runners = [open_runner(target, exported, name) for name in (None, TORCH)]
    assert [type(runner) for runner in runners] == [OnnxRuntimeRunner, TorchRunner]
    found, expected = (sample(runner, facts[StepPlan], facts[ModelSpec], [0, 1], 3) for runner in runners)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_engines_run_from_a_bundle_alone(unquantized: Any) -> None:
    exported = Exported(unquantized.program, unquantized.folder, unquantized.interfaces)
    with pytest.raises(UsageError, match="from a bundle alone") as raised:
        open_runner(TARGETS["tensorrt"], exported, "tensorrt")
    assert "qcgraph build" in str(raised.value.hint)


def test_an_unknown_runtime() -> None:
    with pytest.raises(UsageError, match="unknown backend 'onnxruntim'\n\nhint: did you mean 'onnxruntime'"):
        open_runner(TARGETS["onnx"], None, "onnxruntim")  # type: ignore[arg-type]
