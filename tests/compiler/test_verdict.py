"""The verdict of a compilation: measured beside plain and fitted solvers, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qcgraph
from qcgraph.bundle.report import FITTED_RIVAL, ComparisonReport, CompileReport, RivalReport
from qcgraph.cli.verdict_view import verdict_text
from qcgraph.compiler import verdict
from qcgraph.compiler.verdict import Contest, comparable, stand_in_of
from qcgraph.export.targets import TARGETS
from qcgraph.facts import ComputeType
from qcgraph.ir.program import Program
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling import reference

RECIPE = {
    "sampling": {"steps": 8},
    "calibration": {"trajectories": 4, "samples": 16},
    "quantization": {"rounding": "nearest", "scales": "range", "groups": 2},
    "solver": {"mode": "fitted=4"},
}


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons are made, on two trajectories."""
    monkeypatch.setattr(verdict, "MACS", 1e13)
    monkeypatch.setattr(verdict, "TRAJECTORIES", (2, 2))


@pytest.mark.slow
@pytest.mark.usefixtures("allowed")
def test_a_compilation_is_compared(small_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fitted rival takes the runs that the compilation recorded."""
    recorded: list[int] = []
    walk = reference.walk

    def counted(*arguments: Any) -> reference.RecordedRun:
        run = walk(*arguments)
        recorded.append(len(run.latents[0]))
        return run

    monkeypatch.setattr(reference, "walk", counted)
    report = qcgraph.compile(str(small_digits), RECIPE, output=tmp_path / "bundle").report
    found = report.comparison
    assert found is not None
    assert found.trajectories == 2
    assert found.stand_in == ""
    assert found.seconds > 0
    assert {rival.name for rival in found.rivals} <= {"ddim", "dpmsolver++", FITTED_RIVAL}
    assert "ddim" in {rival.name for rival in found.rivals}
    for rival in found.rivals:
        assert 1 <= rival.steps <= 8
        assert rival.steps == 1 or rival.seconds <= found.seconds
    assert report.stages["comparison"] > 0
    assert FITTED_RIVAL in {rival.name for rival in found.rivals}
    assert recorded == [4, 4]
    assert verdict_text(report).startswith("verdict: ")


def test_what_is_not_compared(captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    assert comparable(captured) == 0  # no arithmetic is allowed in tests
    monkeypatch.setattr(verdict, "MACS", 1e13)
    assert comparable(captured) == verdict.TRAJECTORIES[1]
    spec, mark = captured.facts[ModelSpec], captured.facts[StepPlan].fingerprint
    noisy = make_step_plan("ddpm", 9, mark.guidance, spec.noise_schedule, mark.model)
    assert comparable(captured.with_facts(noisy)) == 0


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> CompileReport:
    from qcgraph.compiler.compilation import compile_model
    from qcgraph.recipe import Recipe

    recipe = Recipe.of({"sampling": {"steps": 20, "guidance": 2.0}, "quantization": {"bits": "off"}})
    return compile_model("digits", recipe, None, dry_run=True).report


def text_of(report: CompileReport, psnr: float | None, *rivals: RivalReport) -> str:
    comparison = ComparisonReport(trajectories=4, seconds=0.25, psnr=psnr, rivals=rivals)
    return verdict_text(report.with_fields(source="digits", comparison=comparison))


def test_the_text_of_a_win(report: CompileReport) -> None:
    weak, best = (
        RivalReport(name=name, steps=steps, seconds=0.0123, psnr=psnr)
        for name, steps, psnr in (("ddim", 8, 25.0), ("dpmsolver++", 1, 29.96))
    )
    assert text_of(report, 41.94, weak, best) == (
        "verdict: 41.9 dB to the converged run in 0.25 s an image; the best free rival in that time, dpmsolver++ with "
        "1 step in full precision, 12.3 ms, has 30.0 dB (4 trajectories)"
    )
    assert text_of(report, 41.94) == "verdict: 41.9 dB to the converged run in 0.25 s an image"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("dpmsolver++", "--steps 8 --guidance 2 --bits off --scheduler dpmsolver++"),
        (FITTED_RIVAL, "--steps 20 --guidance 2 --solver fitted=8 --bits off"),
    ],
)
def test_the_text_of_a_loss_names_the_command(report: CompileReport, name: str, command: str) -> None:
    rival = RivalReport(name=name, steps=8, seconds=0.2, psnr=35.0)
    found = text_of(report, 30.0, rival)
    assert "a free rival is better" in found
    assert found.endswith(f"Take it: qcgraph compile digits {command} -o FOLDER")


def test_the_command_keeps_scheduler_and_target(report: CompileReport) -> None:
    recipe = report.recipe.override(scheduler="dpmsolver++", target="tensorrt")
    other = report.with_fields(recipe=recipe, target="tensorrt")
    fitted, plain = (RivalReport(name=name, steps=8, seconds=0.2, psnr=35.0) for name in (FITTED_RIVAL, "ddim"))
    assert text_of(other, 30.0, fitted).endswith(
        "--steps 20 --guidance 2 --solver fitted=8 --bits off --scheduler dpmsolver++ --target tensorrt -o FOLDER"
    )
    assert text_of(other, 30.0, plain).endswith(
        "--steps 8 --guidance 2 --bits off --scheduler ddim --target tensorrt -o FOLDER"
    )


@pytest.mark.parametrize("psnr", [41.0, 20.0])
def test_the_text_says_where_seconds_of_another_runtime_were_measured(report: CompileReport, psnr: float) -> None:
    rival = RivalReport(name="ddim", steps=8, seconds=0.2, psnr=30.0)
    comparison = ComparisonReport(
        trajectories=4, seconds=0.25, psnr=psnr, rivals=(rival,), stand_in="ONNX Runtime on the CPU"
    )
    text = verdict_text(report.with_fields(comparison=comparison, target="tensorrt"))
    assert "(4 trajectories); seconds were measured on ONNX Runtime on the CPU, not on tensorrt" in text


@pytest.mark.parametrize(
    ("target", "dtype", "stand_in"),
    [
        ("onnxruntime-cpu", "f32", ""),
        ("tensorrt", "f16", "ONNX Runtime on the CPU"),
        ("tensorrt", "bf16", "PyTorch on the CPU for the bundle, ONNX Runtime on the CPU for its rivals"),
    ],
)
def test_the_runtime_that_stands_in(captured: Program, target: str, dtype: str, stand_in: str) -> None:
    program = captured.with_facts(ComputeType(dtype))
    contest = Contest(captured, program, Path(), TARGETS[target], 0, reference.RunStore(), Progress())
    assert stand_in_of(contest) == stand_in


def test_nothing_is_said_of_what_was_not_measured(report: CompileReport) -> None:
    assert verdict_text(report) == ""
    assert text_of(report, None) == ""
