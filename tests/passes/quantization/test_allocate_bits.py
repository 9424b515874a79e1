"""allocate-bits, and what insert-qdq makes of bits that differ from group to group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from qcgraph.errors import QcgraphError
from qcgraph.export.check.verify import verify_export
from qcgraph.export.onnx.emit import emit_onnx
from qcgraph.export.targets import target_named
from qcgraph.facts import QuantPlan
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import clip_limits, rounded_activation
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.loop import sample
from qcgraph.sampling.runner import Array

Run = Callable[[str, Program], Program]
BEFORE = "calibrate{trajectories=4 selection=uniform latents=12},group-timesteps{groups=3},plan-quant"


@pytest.fixture(scope="module")
def planned(captured: Program, run: Run) -> Program:
    """The tiny denoiser with a plan of 8 bits everywhere, not quantized yet."""
    return run(BEFORE, captured)


def latents(program: Program) -> Array:
    return sample(TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], [0, 1, 2, 3], seed=5)


def average_bits(program: Program) -> float:
    """The root of bit operations over multiply-accumulates; all layers weighed by their size."""
    plan, steps = program.facts[QuantPlan], program.facts[StepPlan]
    spent = total = 0.0
    for name, site in plan.sites.items():
        size = program.constants[f"{name}.weight"].numel()
        weight = {7: 4, 31: 6, 127: 8}[site.weight.high]
        for step in steps.steps:
            codes = site.activation.at(step.group)
            spent += size * weight * (codes.high - codes.low + 1).bit_length() - size * weight
            total += size
    return float(np.sqrt(spent / total))


def test_allocate_bits_golden(planned: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("allocate-bits", planned, run("allocate-bits{budget=5.5}", planned))


def test_the_most_bits_are_the_plan_that_was_there(planned: Program, run: Run) -> None:
    found, given = (program.facts[QuantPlan] for program in (run("allocate-bits{budget=8}", planned), planned))
    for name, site in found.sites.items():
        assert site.weight == given.sites[name].weight
        assert site.activation.bits == ()
        np.testing.assert_allclose(site.activation.scales, given.sites[name].activation.scales, rtol=1e-3)


@pytest.mark.parametrize("budget", [4.5, 5.5, 6.5])
def test_the_budget_is_kept_and_used(planned: Program, run: Run, budget: float) -> None:
    spent = average_bits(run(f"allocate-bits{{budget={budget}}}", planned))
    assert budget - 0.5 < spent <= budget + 1e-9


@pytest.mark.parametrize("budget", [4.5, 5.5, 6.5])
def test_without_groups_an_activation_has_the_same_bits_at_every_step(
    planned: Program, run: Run, budget: float
) -> None:
    program = run(f"allocate-bits{{budget={budget} groups=false}}", planned)
    activations = [site.activation for site in program.facts[QuantPlan].sites.values()]
    assert all(not activation.bits and len(activation.scales) == 3 for activation in activations)
    assert budget - 0.7 < average_bits(program) <= budget + 1e-9


def test_more_bits_are_closer_to_full_precision(planned: Program, captured: Program, run: Run) -> None:
    exact = latents(captured)
    texts = [f"allocate-bits{{budget={budget}}},insert-qdq" for budget in (4, 5.5, 8)]
    errors = [float(np.square(latents(run(text, planned)) - exact).mean()) for text in texts]
    assert all(more < 0.5 * fewer for fewer, more in pairwise(errors))


def test_a_budget_below_the_fewest_bits_is_refused(planned: Program, run: Run) -> None:
    with pytest.raises(QcgraphError, match=r"budget 3\.0 is not a number from 4 to 8"):
        run("allocate-bits{budget=3}", planned)


@pytest.fixture(scope="module")
def mixed(planned: Program, run: Run) -> Program:
    """The tiny denoiser where one site has 4, 8 and 6 bits in its three groups."""
    plan = planned.facts[QuantPlan]
    name = "blocks.0.mlp.fc1"
    scale = max(plan.sites[name].activation.scales)
    activation = replace(
        plan.sites[name].activation,
        scales=(scale * 17, scale, scale * 4),
        zero_points=(8, 128, 32),
        bits=(4, 8, 6),
    )
    return planned.with_facts(QuantPlan({name: replace(plan.sites[name], activation=activation)}))


def test_every_group_has_as_many_codes_as_bits(mixed: Program) -> None:
    (site,) = mixed.facts[QuantPlan].sites.values()
    wide = torch.linspace(-100, 100, 100_001)
    for group, bits in enumerate(site.activation.bits):
        rounded = rounded_activation(wide[None], torch.tensor([group]), site.activation)
        assert len(rounded.unique()) == 2**bits
    least, largest = clip_limits(site.activation)
    assert torch.equal(
        largest - least, (2.0 ** torch.tensor(site.activation.bits) - 1) * torch.tensor(site.activation.scales)
    )


@pytest.mark.slow
def test_mixed_groups_are_exported_as_they_are(mixed: Program, run: Run, tmp_path: Path) -> None:
    program = run("insert-qdq,lower-linear", mixed)
    assert "clamp.Tensor" in program.text
    target = target_named("onnxruntime-cpu")
    emit_onnx(program, tmp_path, target.opset, Progress(), integer_products=True)
    checks = verify_export(program, tmp_path, target, program.interfaces, Progress())
    failed = [check for check in checks if not check.passed and check.name != "weight codes"]
    assert not failed
