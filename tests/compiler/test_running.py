"""Runners for passes that sample many times: the numbers are those of the program, however many rows run together."""

from __future__ import annotations

import numpy as np
import pytest

from qcgraph.compiler import running as opening
from qcgraph.compiler.running import running_for
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.export.targets import target_named
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.loop import sample
from qcgraph.sampling.runner import Runner

CPU = target_named("onnxruntime-cpu")
QUANTIZED = "calibrate{trajectories=2 selection=uniform latents=8},group-timesteps,plan-quant,insert-qdq"
CACHED = "plan-cache{interval=3 blocks=0..1},insert-cache"


def drawn(program: Program, runner: Runner) -> np.ndarray:
    """Return five samples, ten rows of a guided batch."""
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    return sample(runner, plan, spec, in_turn(5, spec), seed=0, batch=5)


@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("passes", ["", CACHED])
def test_numbers_are_those_of_the_program(
    captured: Program, passes: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "rows_together", lambda sites, held: rows)
    program = Pipeline.parse(passes).run(captured)
    with running_for(CPU)(program) as runner:
        assert not isinstance(runner, TorchRunner)
        assert np.abs(drawn(program, runner) - drawn(program, TorchRunner(program))).max() < 1e-4


def test_parts_are_small_enough_unless_values_are_cached(captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "rows_together", lambda sites, held: 3)
    sizes: list[int] = []
    run = OnnxRuntimeRunner.run
    monkeypatch.setattr(
        OnnxRuntimeRunner, "run", lambda self, call: (sizes.append(len(call.inputs["latent"])), run(self, call))[1]
    )
    for passes, seen in (("", {3, 1}), (CACHED, {10})):
        sizes.clear()
        program = Pipeline.parse(passes).run(captured)
        with running_for(CPU)(program) as runner:
            drawn(program, runner)
        assert set(sizes) == seen


@pytest.mark.parametrize(("target", "is_torch"), [("onnxruntime-cpu", False), ("onnx", False), ("torch", True)])
def test_a_quantized_program_runs_on_the_runtime_of_its_target(captured: Program, target: str, is_torch: bool) -> None:
    symmetric = "plan-quant{symmetric=true}" if target == "onnx" else "plan-quant"
    program = Pipeline.parse(QUANTIZED.replace("plan-quant", symmetric)).run(captured)
    with running_for(target_named(target))(program) as runner:
        assert isinstance(runner, TorchRunner) == is_torch


def test_a_large_model_runs_in_torch(captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MOST_BYTES", captured.constant_bytes - 1)
    with running_for(CPU)(captured) as runner:
        assert isinstance(runner, TorchRunner)
