"""Bundles of fitted solvers: everything that works on a bundle works on them, alone and with what else can be asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcgraph
from qcgraph.bundle import Bundle
from qcgraph.capture.capture import capture
from qcgraph.cli import run as command
from qcgraph.errors import UsageError
from qcgraph.export.package.single_file import PLAN_KEY
from qcgraph.export.run.open import runner_of
from qcgraph.facts import SolverFit, SolverPlan, SolverTargets, encode
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import load_program
from qcgraph.models import LoadedModel, load_model
from qcgraph.passes.solver import plan_solver
from qcgraph.pipeline import Pipeline
from qcgraph.plan.placement import place
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.recipe import Recipe
from qcgraph.sampling.loop import sample
from qcgraph.sampling.reference import CONVERGED_STEPS

QUICK = '[calibration]\ntrajectories = 4\n[quantization]\nscales = "range"\nrounding = "nearest"\ngroups = 2\n'
FITTED = Recipe.from_toml(QUICK).override(solver="fitted=5", steps=10)
FLOAT = FITTED.override(bits="off", target="torch")
LABELS = list(range(10))
pytestmark = pytest.mark.slow  # it compiles

Compile = Callable[..., Bundle]


@pytest.fixture(scope="module")
def compiled(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles two blocks of digits."""
    folder = tmp_path_factory.mktemp("fitted")
    return lambda name, recipe, **given: qcgraph.compile(small_digits, recipe, output=folder / name, **given)


@pytest.fixture(scope="module")
def bundle(compiled: Compile) -> Bundle:
    return compiled("bundle", FITTED)


def drawn(bundle: Bundle) -> np.ndarray:
    return sample(runner_of(bundle), bundle.plan, bundle.spec, LABELS, 3)


def test_half_of_the_steps_are_half_of_the_work(bundle: Bundle) -> None:
    opened = Bundle.open(bundle.path)
    assert opened.plan.describe() == "ddim, 5 fitted of 10 steps, guidance 1.5"
    assert opened.plan.is_fitted
    assert bundle.report.mac_ratio == pytest.approx(0.5)
    program = load_program(bundle.path)
    assert program.facts[StepPlan] == opened.plan
    assert len(program.facts[SolverFit].errors) == len(program.facts[SolverPlan].plain) == 5
    assert SolverTargets not in program.facts
    assert np.isfinite(drawn(opened)).all()


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify",),
        ("inspect",),
        *(("inspect", "--show", view) for view in ("schedule", "plan", "scales", "refused", "sites", "pipeline")),
        ("inspect", "--show", "solver"),
        ("inspect", "--after", "plan-solver"),
        ("inspect", "--json"),
    ],
    ids=" ".join,
)
def test_commands_take_it(bundle: Bundle, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    name, *rest = arguments
    assert command([name, str(bundle.path), *rest]) == 0
    assert capsys.readouterr().out


def test_it_is_sampled_exported_and_compared(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(bundle.path)
    assert command(["sample", path, "-o", str(tmp_path / "grid.png")]) == 0
    for form in ("onnx-single", "triton"):
        assert command(["export", path, "--format", form, "-o", str(tmp_path / form)]) == 0
        assert list((tmp_path / form).rglob("model.onnx"))
    properties = onnx.load(tmp_path / "onnx-single" / "model.onnx", load_external_data=False).metadata_props
    (text,) = (item.value for item in properties if item.key == PLAN_KEY)
    assert [step["update"] for step in json.loads(text)["steps"]] == [
        json.loads(json.dumps(encode(step.update))) for step in bundle.plan.steps
    ]
    assert command(["diff", path, path]) == 0
    assert "plan: same" in capsys.readouterr().out


def test_its_recipe_gives_the_same_bundle(bundle: Bundle, compiled: Compile) -> None:
    again = compiled("again", Recipe.load(bundle.path / "recipe.lock.toml"))
    for name in ("plan.json", "program.json", "weights.safetensors", "recipe.lock.toml"):
        assert again.manifest.files[name].sha256 == bundle.manifest.files[name].sha256, name


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "interval=2"},
        {"cache": "interval=2", "hoist_adaln": True, "compensate": "vc"},
        {"hoist_adaln": True},
        {"scheduler": "dpmsolver++"},
        {"guidance": 1.0},
        {"solver_target": "run"},
        {"cache": "auto", "guidance": 1.0},
    ],
    ids=str,
)
def test_what_else_can_be_asked_comes_on_top(compiled: Compile, options: dict[str, Any]) -> None:
    """Of five fitted steps, that the fit is made on."""
    found = compiled(str(sorted(options.items())), FLOAT.override(**options))
    plan = found.plan
    assert (len(plan), plan.is_fitted) == (5, True)
    assert (plan.modes.count(None) < 5) == (options.get("cache") == "interval=2")
    assert bool(plan.preparing) == ("hoist_adaln" in options)
    program = load_program(found.path)
    names = [entry.text.partition("{")[0] for entry in program.history]
    assert names[0] == "plan-solver"
    assert "fit-compensation" not in names
    assert names.index("fit-solver") > max(names.index(name) for name in names if name.startswith(("insert", "plan")))
    assert np.isfinite(drawn(found)).all()


@pytest.mark.usefixtures("refinement")
@pytest.mark.parametrize(
    "options", [{"target": "torch", "bits": "off"}, {"target": "torch", "bits": "w2a2"}, {}], ids=str
)
def test_steps_of_one_half_of_guidance(
    compiled: Compile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: dict[str, str]
) -> None:
    """More steps for the work of five, whatever the contest says: the bundle samples what its program does."""
    monkeypatch.setattr(plan_solver, "place", lambda *args: tuple(one for one in place(*args) if not all(one.whole)))
    monkeypatch.setattr(plan_solver, "FEWEST_MEASURED", 2)
    arithmetic = Recipe.from_toml(QUICK + '[cache]\ncost = "macs"\n').override(
        solver="fitted=5", steps=10, cache="auto"
    )
    found = compiled(f"halves-{options.get('bits')}", arithmetic.override(**options))
    plan, program = found.plan, load_program(found.path)
    assert len(plan) > 5
    assert set(plan.modes) == {None, "conditional"}
    assert plan.modes == program.facts[SolverPlan].modes
    assert plan.describe() == f"ddim, {len(plan)} fitted of 10 steps, guidance 1.5"
    assert found.report.solver.halves == plan.modes.count("conditional")
    assert found.manifest.overrides == ()
    if options.get("bits") == "w2a2":  # more noise than change, which no contest of final latents minds
        assert all(edge.snr < 0 for edge in found.report.cached_edges)
    images = drawn(found)
    np.testing.assert_allclose(sample(TorchRunner(program), plan, found.spec, LABELS, 3), images, atol=2e-2)
    assert command(["inspect", str(found.path), "--show", "solver"]) == 0
    shown = capsys.readouterr().out
    assert "of one half of guidance" in shown
    assert "before all coefficients were refined together" in shown


def test_a_plan_of_a_fitted_bundle_is_followed(bundle: Bundle, compiled: Compile) -> None:
    """By another fitted one, at the same timesteps; without a fit, its share of computing steps, which is all."""
    again = compiled("followed", FLOAT, plan=compiled("cached", FLOAT.override(cache="interval=2")).path)
    assert [step.variant for step in again.plan.steps] == ["full", "reuse", "full", "reuse", "full"]
    assert again.plan.describe() == "ddim, 5 fitted of 10 steps, guidance 1.5"
    plain = compiled("plain", FLOAT.override(solver="as-is"), plan=bundle.path)
    assert (len(plain.plan), plain.plan.is_fitted) == (10, False)
    assert plain.plan.modes == (None,) * 10


def test_a_scheduler_that_adds_noise_is_refused_first(
    tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any pass runs."""
    monkeypatch.setattr(Pipeline, "run", lambda *_, **__: pytest.fail("a pass ran"))
    with pytest.raises(UsageError, match="ddpm adds fresh noise at every step") as caught:
        qcgraph.compile(tiny_model, FLOAT.override(scheduler="ddpm"), output=tmp_path / "out")
    assert "--solver as-is" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def digits() -> Program:
    model = load_model("digits")
    program = capture(model.module, model.spec, model.input_names)
    return program.with_facts(make_step_plan("ddim", 50, 1.5, model.spec.noise_schedule, program.constants_digest))


def test_few_fitted_steps_are_closer_to_the_converged_run(
    digits: Program, run: Callable[[str, Program], Program]
) -> None:
    """By 8 dB than as many of DPM-Solver++, on other noise than they were fitted to."""
    spec, runner = digits.facts[ModelSpec], TorchRunner(digits)
    fitted = run("plan-solver{steps=8 trajectories=6}", digits).facts[StepPlan]
    schedule = spec.noise_schedule
    plain, converged = (
        make_step_plan(name, steps, 1.5, schedule, digits.constants_digest)
        for name, steps in (("dpmsolver++", 8), ("ddim", CONVERGED_STEPS))
    )
    ours, theirs, truth = (sample(runner, plan, spec, LABELS[:4], 0) for plan in (fitted, plain, converged))
    errors = [float(np.square(latents - truth).mean()) for latents in (ours, theirs)]
    assert 10 * np.log10(errors[1] / errors[0]) > 8


def test_a_cache_of_the_solver_needs_one(small_digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="planned with the steps of a fitted solver") as caught:
        qcgraph.compile(small_digits, FLOAT.override(solver="as-is", cache="auto"), output=tmp_path / "out")
    assert "--solver fitted" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())
