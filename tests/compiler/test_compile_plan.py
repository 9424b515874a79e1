"""Compiling with a plan from elsewhere: the same steps, others, another scheduler, and again from the recipe alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import qcgraph
from qcgraph.bundle import Bundle
from qcgraph.bundle.plan_file import plan_data, plan_toml
from qcgraph.errors import UsageError
from qcgraph.export.run.open import runner_of
from qcgraph.facts import ForecastFit
from qcgraph.models import LoadedModel
from qcgraph.models.dit import DiT, initialize_random
from qcgraph.recipe import Recipe
from qcgraph.sampling.loop import sample

BASE = Recipe().override(bits="off", steps=6, target="torch")
SAME = ("plan.json", "program.json", "weights.safetensors", "recipe.lock.toml")  # of two compilations that are one


@pytest.fixture(scope="module")
def source(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Every third of six steps computes."""
    path = tmp_path_factory.mktemp("plans") / "source"
    return qcgraph.compile(tiny_model, BASE.override(cache="interval=3"), output=path)


def modes(bundle: Bundle) -> list[str]:
    return [step.variant for step in bundle.plan.steps]


def digests(bundle: Bundle) -> list[str]:
    return [bundle.manifest.files[name].sha256 for name in SAME]


@pytest.mark.slow
def test_the_same_steps_give_the_same_plan(source: Bundle, tiny_model: LoadedModel, tmp_path: Path) -> None:
    given = (source.path, source.path / "plan.json", tmp_path / "my-plan.toml")
    given[2].write_text(plan_toml(plan_data(source.plan)))
    made = [
        qcgraph.compile(tiny_model, BASE, output=tmp_path / str(index), plan=path) for index, path in enumerate(given)
    ]
    assert modes(made[0]) == modes(source) == ["full", "reuse", "reuse", "full", "reuse", "reuse"]
    assert digests(made[0]) == digests(made[1]) == digests(made[2])
    followed = made[0].report.given_plan
    assert followed.source == "ddim, 6 steps, guidance 1.5"
    assert followed.is_retargeted is followed.other_guidance is False
    assert followed.error == followed.even_error > 0


@pytest.mark.slow
def test_a_bundle_compiles_again_from_its_recipe(source: Bundle, tiny_model: LoadedModel, tmp_path: Path) -> None:
    """Without the plan that it followed, which may be gone."""
    first = qcgraph.compile(tiny_model, BASE.override(steps=9), output=tmp_path / "first", plan=source.path)
    again = qcgraph.compile(tiny_model, str(first.file("recipe.lock.toml")), output=tmp_path / "again")
    assert digests(again) == digests(first)
    fields = {"schedule", "is_retargeted", "computing", "error", "even_error"}
    assert again.report.given_plan.model_dump(include=fields) == first.report.given_plan.model_dump(include=fields)
    assert not any(str(source.path) in path.read_text() for path in first.path.glob("*.*ml"))


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 9), ("ddpm", 6), ("dpmsolver++", 5)])
def test_other_steps(source: Bundle, tiny_model: LoadedModel, tmp_path: Path, scheduler: str, steps: int) -> None:
    recipe = BASE.override(scheduler=scheduler, steps=steps, guidance=2.0)
    bundle = qcgraph.compile(tiny_model, recipe, output=tmp_path / "out", plan=source.path)
    assert bundle.plan.fingerprint.scheduler == scheduler
    assert modes(bundle)[0] == "full"
    assert modes(bundle).count("full") == int(steps / 3 + 0.5)
    followed, fitted = bundle.report.given_plan, bundle.facts.get(ForecastFit)
    assert followed.is_retargeted is (steps != 6)
    assert followed.other_guidance is True
    assert min(followed.error, followed.even_error) > 0
    assert fitted is not None  # anew, for these steps
    assert {step.step for step in fitted.steps} == {row for row, mode in enumerate(modes(bundle)) if mode != "full"}
    assert np.isfinite(sample(runner_of(bundle), bundle.plan, bundle.spec, [0, 1], seed=0)).all()


@pytest.mark.slow
def test_an_edited_plan(source: Bundle, tiny_model: LoadedModel, tmp_path: Path) -> None:
    data = plan_data(source.plan)
    last = list(data["timesteps"])[-1]
    data["timesteps"][last] = "full"
    (tmp_path / "my-plan.toml").write_text(plan_toml(data))
    edited = qcgraph.compile(tiny_model, BASE, output=tmp_path / "out", plan=tmp_path / "my-plan.toml")
    assert modes(edited) == [*modes(source)[:-1], "full"]


def test_the_plan_of_another_model_is_refused(source: Bundle, tiny_model: LoadedModel, tmp_path: Path) -> None:
    module = DiT(tiny_model.module.config)
    initialize_random(module, torch.Generator().manual_seed(1))
    other = replace(tiny_model, module=module.eval().requires_grad_(False))
    with pytest.raises(UsageError, match="was made for another model") as caught:
        qcgraph.compile(other, BASE, output=tmp_path / "out", plan=source.path)
    assert caught.value.where == str(source.path / "plan.json")
    assert not list(tmp_path.iterdir())
