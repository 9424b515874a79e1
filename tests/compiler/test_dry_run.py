"""Dry runs: nothing is sampled or written, whatever the target, and what is said of the plan is what compiling does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qcgraph.compiler.compilation import compile_model
from qcgraph.compiler.estimate import passes_forwards
from qcgraph.export.targets import TARGETS
from qcgraph.ir.program import Program
from qcgraph.models import LoadedModel
from qcgraph.pipeline import Pipeline, registry
from qcgraph.plan.spec import ModelSpec
from qcgraph.progress import Progress
from qcgraph.recipe import Recipe

RECIPES = {
    "planned": {"bits": "w8a8", "cache": "budget=0.4", "forecast": "affine"},
    "dps": {"bits": "w4a8", "cache": "dps=3", "forecast": "dec"},
    "compensated": {"bits": "w8a8", "cache": "interval=2", "compensate": "vc", "hoist_adaln": True},
    "float": {"bits": "off", "cache": "budget=0.5", "compensate": "vc"},
    "fitted": {"bits": "w8a8", "solver": "fitted=3", "cache": "interval=2", "hoist_adaln": True},
    "followed": {"bits": "w6a6", "cache": "plan=900-300:FRRF"},
}


@pytest.fixture
def no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling any trajectory is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run samples")

    monkeypatch.setattr("qcgraph.sampling.loop.Sampler.__init__", refuse)
    for kind in registry().values():
        if kind.samples:
            monkeypatch.setattr(kind, "run", refuse)


@pytest.mark.slow
@pytest.mark.usefixtures("no_samples")
@pytest.mark.parametrize(
    ("name", "target"), [("planned", target) for target in TARGETS] + [(name, "tensorrt-rtx") for name in RECIPES]
)
def test_nothing_is_sampled_or_written(
    tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe().override(steps=8, target=target, **RECIPES[name])
    result = compile_model(tiny_model, recipe, tmp_path / "out", dry_run=True)
    assert result.bundle is None
    assert not list(tmp_path.iterdir())
    planned = 0 if name == "float" else 8  # four linear layers in each of two blocks
    assert result.report.planned_sites == planned
    assert result.report.quantized_sites == 0


@pytest.mark.slow
def test_what_is_planned_is_what_is_compiled(tiny_model: LoadedModel, tmp_path: Path) -> None:
    recipe = Recipe().override(steps=4, bits="w8a8", cache="interval=2", target="torch")
    planned = compile_model(tiny_model, recipe, None, dry_run=True).report
    made = compile_model(tiny_model, recipe, tmp_path / "out").report
    assert planned.planned_sites == made.planned_sites == made.quantized_sites
    assert planned.linear_sites == made.linear_sites
    assert planned.plan == made.plan
    assert planned.variants["full"].steps == made.variants["full"].steps


def test_work_after_a_fitted_solver_is_that_of_its_steps(captured: Program) -> None:
    """All nine steps are recorded for a solver that is fitted to them; what follows works on the three that stay."""
    text = "plan-solver{steps=3 target=run trajectories=4},calibrate{trajectories=5}"
    pipeline = Pipeline.parse(text)
    halves, recorded, tried = 2, 9 + 4, (2 + 1) * 3
    solving, calibrating = 4 * halves * (recorded + tried), 5 * halves * 3 * 2
    assert passes_forwards(captured, pipeline.foreseen(captured), pipeline) == solving + calibrating
    plain = Pipeline(pipeline.passes[1:])
    assert passes_forwards(captured, plain.foreseen(captured), plain) == 5 * halves * 9 * 2


def test_a_cache_is_drafted_on_the_steps_of_a_fitted_solver(tiny_model: LoadedModel) -> None:
    recipe = Recipe().override(steps=8, solver="fitted=4", cache="interval=2", bits="off", target="torch")
    report = compile_model(tiny_model, recipe, None, dry_run=True).report
    assert (report.variants["full"].steps, report.variants["reuse"].steps) == (2, 2)
    assert 2 / 8 < report.mac_ratio < 3 / 8


@pytest.mark.usefixtures("no_samples")
def test_the_fewest_bits_are_not_searched_for(tiny_model: LoadedModel) -> None:
    recipe = Recipe().override(steps=4, bits="auto", gate="psnr>=20")
    assert compile_model(tiny_model, recipe, None, dry_run=True).report.recipe.quantization.bits == "auto=8"


def test_bits_that_come_to_nothing_are_said(tiny_model: LoadedModel) -> None:
    class Listening(Progress):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    class Scaled(torch.nn.Module):
        def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return latent * timestep[:, None, None, None]

    model, progress = (
        LoadedModel(Scaled().eval(), ModelSpec("scaled", (1, 4, 4), 1, ()), ("latent", "timestep")),
        Listening(),
    )
    recipe = Recipe().override(steps=2, bits="w8a8", guidance=1, target="torch")
    result = compile_model(model, recipe, None, dry_run=True, progress=progress)
    (note,) = (note for note in result.report.notes if "nothing is quantized" in note)
    assert f"note: {note}" in progress.notes
    assert "w8a8 was asked for" in note
    assert "the model has no layer that multiplies by a constant" in note


def test_a_pipeline_without_quantization_plans_none(tiny_model: LoadedModel) -> None:
    recipe = Recipe.from_toml('[pipeline]\npasses = "plan-cache{interval=2},insert-cache"\n').override(steps=4)
    report = compile_model(tiny_model, recipe, None, dry_run=True).report
    assert report.planned_sites == 0
    assert not [note for note in report.notes if "was asked for" in note]
