"""equalize: the same function with other constants, and channels that share a range."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qcgraph.errors import ContractError, UsageError
from qcgraph.facts import Equalization, EqualizationPlan, EqualizedActivation
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.graph import Variant, copy_graph
from qcgraph.ir.program import Program
from qcgraph.models import LoadedModel
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.loop import sample
from qcgraph.sampling.runner import Array

Run = Callable[[str, Program], Program]
EQUALIZED = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1")]
COUNT = 2  # trajectories
TO_EACH_STRENGTH = pytest.mark.parametrize("options", ["", " strength=0", " strength=0.5", " strength=1"])
DEAD, CONSTANT, UNREAD, OUTLIER = 3, 5, 7, 4  # channels
Changed = Callable[[Program, float, float, slice], Program]
Observed = Callable[[Program], Mapping[str, Any]]


def equalized(program: Program, run: Run, options: str = "") -> Program:
    return run(f"plan-equalization{{trajectories={COUNT}{options}}},equalize", program)


def prediction(program: Program) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latent": torch.randn(4, 2, 8, 8, generator=generator),
        "timestep": torch.tensor([1.0, 300.0, 700.0, 999.0]),
        "class_label": torch.tensor([0, 1, 4, 5]),
    }
    return program.run("main", inputs)["noise_prediction"]


def copied(variant: Variant) -> Variant:
    return replace(variant, graph=copy_graph(variant.graph))


def relative_error(program: Program, original: Program) -> float:
    exact = prediction(original)
    return float((prediction(program) - exact).abs().max() / exact.abs().max())


def test_equalize_golden(captured: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("equalize", captured, equalized(captured, run))


@TO_EACH_STRENGTH
def test_the_function_stays_the_same(captured: Program, run: Run, options: str) -> None:
    program = equalized(captured, run, options)
    assert program.history[-1].changed
    assert relative_error(program, captured) < 1e-5
    twice = equalized(program, run, options)
    assert relative_error(twice, captured) < 1e-5
    # What the fact says of a weight is what was done to it, by both.
    fact, name = twice.facts[Equalization], EQUALIZED[0]
    expected = captured.constants[f"{name}.weight"] * torch.tensor(fact.inputs[name])
    if name in fact.outputs:
        expected = expected / torch.tensor(fact.outputs[name])[:, None]
    torch.testing.assert_close(twice.constants[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_trajectories_stay_the_same(captured: Program, run: Run) -> None:
    plan, spec = captured.facts[StepPlan], captured.facts[ModelSpec]
    exact, found = (
        sample(TorchRunner(program), plan, spec, [0, 1, 2], 3) for program in (captured, equalized(captured, run))
    )
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())


def test_at_strength_1_all_channels_have_one_range_about_zero(captured: Program, run: Run, observed: Observed) -> None:
    channels = observed(equalized(captured, run, " strength=1"))
    for site in EQUALIZED:
        high = channels[site].high
        torch.testing.assert_close(high, high.mean().expand(len(high)), rtol=2e-4, atol=0)
        torch.testing.assert_close(channels[site].low, -high, rtol=2e-4, atol=0)


def test_at_strength_0_all_columns_of_the_weight_have_one_range(captured: Program, run: Run) -> None:
    """Of the layers whose rows make nothing that is equalized in its turn."""
    program = equalized(captured, run, " strength=0")
    for site in EQUALIZED[1:3]:
        columns = program.constants[f"{site}.weight"].abs().amax(dim=0)
        torch.testing.assert_close(columns, columns.mean().expand(len(columns)), rtol=1e-5, atol=0)


@TO_EACH_STRENGTH
def test_constants_are_moved_by_the_recorded_factors(captured: Program, run: Run, options: str) -> None:
    program = equalized(captured, run, options)
    fact = program.facts[Equalization]
    assert list(fact.outputs) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]  # rows that make values of attentions
    for site in EQUALIZED:
        factors = torch.tensor(fact.inputs[site])
        rows = torch.tensor(fact.outputs.get(site, (1.0,)))[:, None]
        weight = f"{site}.weight"
        torch.testing.assert_close(
            program.constants[weight], captured.constants[weight] * factors / rows, rtol=1e-6, atol=0
        )
    untouched = [name for name in captured.constants if program.constants[name] is captured.constants[name]]
    assert {"pos_embed", "final_layer.linear.weight", "blocks.0.mlp.fc2.weight", "blocks.1.mlp.fc2.bias"} <= set(
        untouched
    )


@TO_EACH_STRENGTH
def test_dead_and_constant_channels(captured: Program, run: Run, options: str, with_channels: Changed) -> None:
    program = with_channels(captured, -1.0, 0.0, slice(DEAD, DEAD + 1))
    program = with_channels(program, -1.0, 2.5, slice(CONSTANT, CONSTANT + 1))
    weight = program.constants["blocks.0.attn.qkv.weight"].clone()
    weight[:, UNREAD] = 0
    program = replace(program, constants={**program.constants, "blocks.0.attn.qkv.weight": weight})
    found = equalized(program, run, options)
    assert all(bool(torch.isfinite(value).all()) for value in found.constants.values())
    factors = found.facts[Equalization].inputs["blocks.0.attn.qkv"]
    assert [factors[channel] for channel in (DEAD, CONSTANT, UNREAD)] == [1.0] * 3
    assert relative_error(found, program) < 1e-5


@TO_EACH_STRENGTH
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_an_activation_that_never_varies(
    captured: Program, run: Run, options: str, shift: float, with_channels: Changed
) -> None:
    program = with_channels(captured, -1.0, shift, slice(0, 32))
    found = equalized(program, run, options)
    assert all(bool(torch.isfinite(value).all()) for value in found.constants.values())
    assert set(found.facts[Equalization].inputs["blocks.0.attn.qkv"]) == {1.0}
    assert relative_error(found, program) < 1e-5


def test_a_constant_channel_moves_into_the_bias(
    captured: Program, run: Run, with_channels: Changed, observed: Observed
) -> None:
    program = with_channels(captured, -1.0, 2.5, slice(CONSTANT, CONSTANT + 1))
    found = equalized(program, run)
    values = observed(found)["blocks.0.attn.qkv"].values[:, CONSTANT]
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-6)


def test_activations_that_are_not_finite_are_left_alone(captured: Program, run: Run) -> None:
    weight = torch.full_like(captured.constants["x_embedder.proj.weight"], float("inf"))
    program = replace(captured, constants={**captured.constants, "x_embedder.proj.weight": weight})
    found = equalized(program, run)
    refusals = {refusal.where: refusal.reason for refusal in found.history[-2].refusals}
    assert {name for name, reason in refusals.items() if "its activation is not finite" in reason} == set(EQUALIZED)
    assert found.facts[Equalization] == Equalization({}, {})
    assert all(found.constants[name] is value for name, value in program.constants.items())


@pytest.mark.parametrize(
    ("changed", "where", "says"),
    [
        ({"sites": ("blocks.0.mlp.fc2",)}, "blocks.0.mlp.fc2", "cannot be: it does not come from a linear layer"),
        ({"sites": ("blocks.9.attn.qkv",)}, "blocks.9.attn.qkv", "no such site"),
        (
            {"sites": (EQUALIZED[0], EQUALIZED[1])},
            EQUALIZED[0],
            f"{EQUALIZED[0]}, {EQUALIZED[1]}, and enters {EQUALIZED[0]}\n",
        ),
        ({"factors": (1.0,)}, EQUALIZED[0], "32 offsets and 1 factors, and has 32 channels"),
        ({"offsets": ()}, EQUALIZED[0], "0 offsets and 32 factors, and has 32 channels"),
    ],
    ids=["not linear", "unknown", "others", "factors", "offsets"],
)
def test_a_plan_that_does_not_fit_is_refused(
    captured: Program, run: Run, changed: dict[str, Any], where: str, says: str
) -> None:
    planned = replace(EqualizedActivation((EQUALIZED[0],), (0.0,) * 32, (1.0,) * 32), **changed)
    with pytest.raises(ContractError, match=says) as caught:
        run("equalize", captured.with_facts(EqualizationPlan((planned,))))
    assert str(caught.value.where).endswith(where)
    assert "plan-equalization" in str(caught.value.hint)


def test_a_plan_of_factors_1_and_offsets_0_is_exact(captured: Program, run: Run) -> None:
    planned = (EqualizedActivation((site,), (0.0,) * 32, (1.0,) * 32) for site in EQUALIZED)
    program = run("equalize", captured.with_facts(EqualizationPlan(tuple(planned))))
    assert all(torch.equal(program.constants[name], value) for name, value in captured.constants.items())


def test_a_plan_is_carried_out_once(captured: Program, run: Run) -> None:
    program = equalized(captured, run)
    assert EqualizationPlan not in program.facts
    with pytest.raises(ContractError, match="needs EqualizationPlan") as caught:
        run("equalize", program)
    assert caught.value.hint == "run plan-equalization before it"


def test_variants_are_refused(captured: Program, run: Run) -> None:
    program = run(f"plan-equalization{{trajectories={COUNT}}},plan-cache{{interval=3}},insert-cache", captured)
    with pytest.raises(UsageError, match="equalize takes the one graph"):
        run("equalize", program)


def test_the_tensors_of_the_model_are_not_written_to(captured: Program, run: Run, tiny_model: LoadedModel) -> None:
    before = {name: value.clone() for name, value in tiny_model.module.state_dict().items()}
    text = captured.text
    equalized(captured, run)
    assert captured.text == text
    for name, value in tiny_model.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_weights_that_it_replaces_are_not_held(captured: Program, run: Run) -> None:
    """Else both would take memory as long as the result is compiled on."""
    name = f"{EQUALIZED[0]}.weight"
    copies = {name: value.clone() for name, value in captured.constants.items()}
    original = Program({"main": copied(captured.variants["main"])}, copies, captured.facts)
    prediction(original)  # its graph refers to a module then
    held = StorageWeakRef(copies[name].untyped_storage())
    result = equalized(original, run)
    assert not held.expired()
    del original, copies
    gc.collect()
    assert held.expired()
    assert result.variants.keys() == {"main"}


def test_the_same_twice(captured: Program, run: Run) -> None:
    assert equalized(captured, run).digest == equalized(captured, run).digest


def with_outliers(program: Program, size: float) -> Program:
    """The same function, with one channel of every modulated activation as many times larger."""
    constants = dict(program.constants)
    for block in range(2):
        modulation = f"blocks.{block}.adaLN_modulation.1"
        weight, bias = (constants[f"{modulation}.{kind}"].clone() for kind in ("weight", "bias"))
        for layer, gain, shift in (("attn.qkv", 32, 0), ("mlp.fc1", 128, 96)):
            for row in (gain + OUTLIER, shift + OUTLIER):
                weight[row] *= size
                bias[row] *= size
            bias[gain + OUTLIER] += size - 1
            reading = constants[f"blocks.{block}.{layer}.weight"].clone()
            reading[:, OUTLIER] /= size
            constants[f"blocks.{block}.{layer}.weight"] = reading
        constants |= {f"{modulation}.weight": weight, f"{modulation}.bias": bias}
    return replace(program, constants=constants)


def test_an_outlier_channel_costs_less_at_6_bits(captured: Program, run: Run) -> None:
    program = with_outliers(captured, 30.0)
    assert relative_error(program, captured) < 1e-5
    quantize = "calibrate{trajectories=4},plan-quant{weight-bits=6 activation-bits=6},insert-qdq"
    bits = " weight-bits=6 activation-bits=6"

    def latents(of: Program) -> Array:
        return sample(TorchRunner(of), of.facts[StepPlan], of.facts[ModelSpec], [0, 1, 2, 3], 5)

    exact = latents(captured)
    plain, better, without_outliers = (
        float(np.square(latents(run(quantize, item)) - exact).mean())
        for item in (program, equalized(program, run, bits), equalized(captured, run, bits))
    )
    assert better < 0.1 * plain
    assert better < 1.1 * without_outliers
