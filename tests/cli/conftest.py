"""Bundles made by hand, and the command line called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qcgraph.bundle import write_plan, writing
from qcgraph.cli import run
from qcgraph.compiler.compilation import compile_model
from qcgraph.export.run import open as runtime
from qcgraph.facts import (
    ActivationQuant,
    CachedValue,
    CachePlan,
    Fact,
    Facts,
    ForecastFit,
    ForecastStep,
    QuantPlan,
    SchedulePlan,
    SiteQuant,
    WeightQuant,
)
from qcgraph.plan.roles import COMPUTES, REUSES, TensorRole
from qcgraph.plan.spec import Interface, ModelSpec, TensorSpec
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update
from qcgraph.recipe import Recipe
from qcgraph.sampling.runner import Call

MAIN = """\
model toy: latent 1x8x8, 10 classes, predicts epsilon
steps ddim, 3 steps, guidance 1.5, timesteps 981 .. 1

graph main(%latent: f32[B,1,8,8], %timestep: f32[B], %class_label: i64[B]) {
  ; x_embedder.proj
  %conv2d: f32[B,32,4,4] = conv2d(%latent, @x_embedder.proj.weight: f32[32,1,2,2], [2, 2])
  ; blocks.0.attn.qkv
  %linear: f32[B,16,96] = linear(%conv2d, @blocks.0.attn.qkv.weight: f32[96,32])
  ; blocks.0.attn
  %unbind: (f32[B,4], f32[B,4]) = unbind.int(%linear)
  %getitem: f32[B,4] = getitem(%unbind, 0)
  ; top level
  %add: f32[B,1,8,8] = add.Tensor(%getitem, %latent)
  return noise_prediction = %add
}
"""
PLANNED = MAIN.replace("981 .. 1\n", "981 .. 1\ncache cache_0: change over blocks 0..0\n")
SPLIT = PLANNED.replace("graph main(", "graph full(").replace(
    "  return noise_prediction = %add\n",
    "  %sub: f32[B,4] = sub.Tensor(%add, %getitem)   ; insert-cache, from add\n"
    "  return noise_prediction = %add, cache = %sub\n",
)
REUSE = """
graph reuse(%latent: f32[B,1,8,8], %timestep: f32[B], %class_label: i64[B], %cache: f32[B,4]) {
  ; top level
  %add: f32[B,1,8,8] = add.Tensor(%latent, %cache)   ; insert-cache, from add
  return noise_prediction = %add
}
"""
LATENT = TensorSpec("latent", "f32", ("B", 1, 8, 8), TensorRole.STATE)
REFUSAL = {"where": "x_embedder.proj", "reason": "conv2d is not a linear layer"}


def interfaces() -> dict[str, Interface]:
    prediction = TensorSpec("noise_prediction", "f32", ("B", 1, 8, 8), TensorRole.PREDICTION)
    cache = TensorSpec("cache", "f32", ("B", 4), TensorRole.CACHE, "cache")
    return {"full": Interface((LATENT,), (prediction, cache)), "reuse": Interface((LATENT, cache), (prediction,))}


def make_bundle(
    path: Path,
    *,
    guidance: float = 1.5,
    is_image: bool = True,
    history: tuple[Earlier, ...] = (),
    more_facts: tuple[Fact, ...] = (),
) -> Path:
    """A bundle as a compilation would write it, without graphs that could run."""
    spec = ModelSpec.class_conditional("toy", (1, 8, 8), 10, 10, 1, is_image=is_image)
    plan = StepPlan(
        Fingerprint("0123456789abcdef", "ddim", 3, guidance),
        (
            Step(981.0, Update(1.01, -0.1), "full", 0, 0),
            Step(961.0, Update(1.1, -0.2, 0.0, history), "reuse", 0, 1),
            Step(1.0, Update(1.2, -0.3, 0.25), "full", 1, 2),
        ),
        {"full": COMPUTES, "reuse": REUSES},
    )
    cache = CachePlan((CachedValue("cache", 0, 0),), {"reuse": ("cache",)}, 1, (None, "reuse", None))
    site = SiteQuant(ActivationQuant((0.02, 0.03), (100, 110), 0, 255, "uint8"), WeightQuant(64))
    schedule = SchedulePlan("joint", "onnxruntime", 0.7, 0.01, 0.02)
    forecast = ForecastFit("affine", (ForecastStep("cache", 1, 0.2, 0.05),))
    facts = Facts([spec, plan, cache, schedule, QuantPlan({"blocks.0.attn.qkv": site}), forecast, *more_facts])
    history = [
        {"text": "plan-cache{interval=2}", "changed": True, "refusals": []},
        {"text": "plan-quant", "changed": True, "refusals": [REFUSAL, REFUSAL]},
        {"text": "insert-cache", "changed": True, "refusals": []},
        {"text": "lower-linear", "changed": False, "refusals": []},
    ]
    texts = {"capture": MAIN, "plan-cache": PLANNED, "plan-quant": PLANNED, "insert-cache": SPLIT + REUSE}
    texts["lower-linear"] = texts["insert-cache"]
    with writing(path, model="toy", target="onnxruntime-cpu", force=True) as folder:
        write_plan(folder, spec, plan, interfaces())
        (folder / "recipe.lock.toml").write_text(Recipe().override(guidance=guidance).to_toml())
        (folder / "program.json").write_text(json.dumps({"facts": facts.encode(), "history": history}))
        (folder / "ir").mkdir()
        for index, (name, text) in enumerate(texts.items()):
            (folder / "ir" / f"{index:03d}_{name}.txt").write_text(text)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "toy")


@pytest.fixture(scope="session")
def fitted_bundle(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of four fitted steps."""
    folder = tmp_path_factory.mktemp("fitted")
    asked = Recipe().override(solver="fitted=4", steps=8, bits="off")
    recipe = asked.model_copy(update={"calibration": asked.calibration.model_copy(update={"trajectories": 4})})
    result = compile_model(str(small_digits), recipe, folder / "out")
    assert result.bundle is not None
    return result.bundle.path


@pytest.fixture(name="make_bundle")
def _make_bundle() -> Callable[..., Path]:
    return make_bundle


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def qcgraph(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command of the command line in this process."""

    def call(*arguments: object) -> Done:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@dataclass(frozen=True)
class PatternRunner:
    """A backend whose noise prediction is made of the class labels."""

    gain: float = 0.1

    def run(self, call: Call) -> npt.NDArray[np.float32]:
        labels, shape = call.inputs["class_label"].astype(np.float32), call.inputs["latent"].shape
        return np.broadcast_to(self.gain * labels[:, None, None, None], shape).astype(np.float32)


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run bundles on a `PatternRunner`."""
    return lambda gain=0.1: monkeypatch.setattr(runtime, "runner_of", lambda *_, **__: PatternRunner(gain))
