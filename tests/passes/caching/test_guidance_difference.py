"""The difference of the halves of guidance as a cached value: plan-cache{blocks=guidance} and what follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qcgraph.capture.capture import capture
from qcgraph.errors import BundleError, UsageError
from qcgraph.export.onnx.emit import emit_onnx
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.facts import CachePlan, SchedulePlan
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import load_program, save_program
from qcgraph.ir.structure import find_sites, total_macs
from qcgraph.models import load_model
from qcgraph.plan.roles import COMPUTES, HALF, REUSES
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Request, sample

Run = Callable[[str, Program], Program]


@pytest.fixture(scope="module")
def halved(captured: Program, run: Run) -> Program:
    """Every other step computes the conditional half alone."""
    return run("plan-cache{interval=2 blocks=guidance},insert-cache", captured)


def inputs(spec: ModelSpec, timestep: float = 500.0) -> dict[str, torch.Tensor]:
    """Both halves of guidance for three latents."""
    latent = torch.randn(3, *spec.latent_shape, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, 4])
    return {
        "latent": torch.cat([latent, latent]),
        "timestep": torch.full((6,), timestep),
        "class_label": torch.cat([labels, torch.full_like(labels, spec.conditions[0].null)]),
    }


def latents(program: Program) -> np.ndarray:
    return sample(TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], [0, 1, 2], seed=0)


def test_golden(captured: Program, run: Run, halved: Program, golden_diff: Callable[..., None]) -> None:
    golden_diff("guidance-difference", run("plan-cache{interval=2 blocks=guidance}", captured), halved)


def test_at_the_same_inputs_it_is_the_full_result(captured: Program, halved: Program) -> None:
    given = inputs(captured.facts[ModelSpec])
    full = halved.run("full", given)
    expected = captured.run("main", given)["noise_prediction"]
    assert torch.equal(full["noise_prediction"], expected)
    one, other = expected.movedim(1, -1).chunk(2)
    assert torch.equal(full["cache_0"], torch.cat([one - other, other - one]))
    found = halved.run("conditional", given | full)["noise_prediction"]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_unconditional_half_is_not_looked_at(halved: Program) -> None:
    given = inputs(halved.facts[ModelSpec])
    given |= {"cache_0": halved.run("full", given)["cache_0"]}
    found = halved.run("conditional", given)["noise_prediction"]
    for name in ("latent", "timestep", "class_label"):
        given[name] = given[name].clone()
        given[name][3:] = 0
    assert torch.equal(halved.run("conditional", given)["noise_prediction"], found)


def test_it_costs_half(halved: Program, captured: Program) -> None:
    macs = {name: total_macs(find_sites(variant)) for name, variant in halved.variants.items()}
    assert macs["full"] == 2 * macs["conditional"] == total_macs(find_sites(captured.variants["main"]))


def test_it_stands_beside_ranges(captured: Program, run: Run) -> None:
    program = run("plan-cache{interval=2 blocks=all+guidance},insert-cache", captured)
    assert program.facts[CachePlan].modes == {"reuse": ("cache_0",), "conditional": ("cache_1",)}
    assert program.facts[StepPlan].roles == {"full": COMPUTES, "reuse": REUSES, "conditional": HALF}
    assert program.facts[StepPlan].restores_half
    assert program.facts[StepPlan].variants == ("full", "reuse")
    dropped = run("drop-variants", program)
    assert list(dropped.variants) == ["full", "reuse"]
    assert dropped.facts[StepPlan].roles == {"full": COMPUTES, "reuse": REUSES}
    assert not dropped.facts[StepPlan].restores_half
    assert np.array_equal(latents(dropped), latents(run("plan-cache{interval=2},insert-cache", captured)))


def test_a_fitted_forecast_of_it_is_nearer_than_reuse(captured: Program, halved: Program, run: Run) -> None:
    forecast = run(
        "plan-cache{interval=2 blocks=guidance history=3},insert-cache,calibrate{trajectories=8},"
        "insert-forecast,fit-forecast",
        captured,
    )
    exact = latents(captured)
    error, reuse_error = (np.linalg.norm(latents(program) - exact) for program in (forecast, halved))
    assert 0 < error < reuse_error


@pytest.mark.slow
def test_the_planner_takes_it_where_it_pays(run: Run) -> None:
    """On a trained model: with it, the same budget leaves less error, by the planner's own measurement."""
    model = load_model("digits")
    digits = capture(model.module, model.spec, model.input_names)
    digits = digits.with_facts(make_step_plan("ddim", 10, 1.5, model.spec.noise_schedule, digits.constants_digest))
    found = {
        blocks: run(
            f"plan-cache{{budget=0.6 history=2 blocks={blocks}}},insert-cache,plan-steps{{budget=0.6 trajectories=4}}",
            digits,
        ).facts
        for blocks in ("all", "all+guidance")
    }
    errors = {blocks: facts[SchedulePlan].rehearsed_error for blocks, facts in found.items()}
    assert "conditional" in found["all+guidance"][StepPlan].variants
    assert 0 < errors["all+guidance"] < errors["all"]


def test_a_plan_that_takes_it_is_followed(captured: Program, run: Run) -> None:
    text = "plan-cache{interval=2 blocks=all+guidance},insert-cache,apply-plan{plan=888-111:FCRFRCFCR}"
    assert run(text, captured).facts[StepPlan].schedule().startswith("FCRFRCFCR ")
    with pytest.raises(UsageError, match="the mode conditional, which this compilation has not") as caught:
        run(text.replace("+guidance", ""), captured)
    assert "guidance for conditional" in str(caught.value.hint)


@pytest.mark.slow
def test_quantized_in_onnx_runtime(captured: Program, run: Run, tmp_path: Path) -> None:
    program = run(
        "plan-cache{interval=2 blocks=guidance},insert-cache,calibrate{trajectories=4},group-timesteps{groups=2},"
        "plan-quant,insert-qdq",
        captured,
    )
    save_program(program, tmp_path)
    assert np.array_equal(latents(load_program(tmp_path)), latents(program))
    emit_onnx(program, tmp_path, 21, Progress(), integer_products=True)
    spec, plan = program.facts[ModelSpec], program.facts[StepPlan]
    found = sample(OnnxRuntimeRunner(tmp_path, program.interfaces), plan, spec, [0, 1, 2], seed=0)
    assert np.linalg.norm(found - latents(program)) < 1e-2 * np.linalg.norm(found)
    assert not np.array_equal(found, latents(captured))


def test_a_batch_that_is_not_both_halves_is_refused(halved: Program) -> None:
    given, plan = inputs(halved.facts[ModelSpec]), halved.facts[StepPlan]
    latent, conditions = given["latent"].numpy(), Conditions(6, {"class_label": given["class_label"].numpy()})
    request = Request(TorchRunner(halved), plan, halved.facts[ModelSpec])
    for wrong in (slice(0, 3), slice(1, 5)):
        with pytest.raises(BundleError, match="does not hold the same latents in both halves") as caught:
            request.denoise(0, latent[wrong], conditions[wrong])
        assert "both halves of guidance in one batch" in str(caught.value.hint)
    assert request.denoise(0, latent, conditions).shape == (6, 4, 8, 8)


def test_without_guidance_there_is_none(captured: Program, run: Run) -> None:
    plan = captured.facts[StepPlan]
    alone = make_step_plan("ddim", 5, 1.0, captured.facts[ModelSpec].noise_schedule, plan.fingerprint.model)
    with pytest.raises(UsageError, match="without guidance there are no halves to differ"):
        run("plan-cache{blocks=guidance}", captured.with_facts(alone))
