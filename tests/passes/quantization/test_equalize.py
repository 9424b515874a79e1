"""equalize: the same function with other constants, and channels that share a range."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from qcgraph.errors import ContractError, UsageError
from qcgraph.facts import Equalization
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.graph import Variant, copy_graph
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.models import LoadedModel
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import sample_calibration
from qcgraph.sampling.loop import sample
from qcgraph.sampling.runner import Array, Call

Run = Callable[[str, Program], Program]
EQUALIZED = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1")]
COUNT = 2  # trajectories
TO_EACH_STRENGTH = pytest.mark.parametrize("options", ["", " strength=0", " strength=0.5", " strength=1"])
DEAD, CONSTANT, UNREAD, OUTLIER = 3, 5, 7, 4  # channels
GAIN, SHIFT = 32, 0  # the first rows of adaLN for the attention


def equalized(program: Program, run: Run, options: str = "") -> Program:
    return run(f"equalize{{trajectories={COUNT}{options}}}", program)


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


@dataclass(frozen=True)
class Channels:
    """What the channels of an activation held on the calibration trajectories."""

    low: Tensor
    high: Tensor
    values: Tensor

    @property
    def middle(self) -> Tensor:
        return (self.low + self.high) / 2

    @property
    def half_width(self) -> Tensor:
        return (self.high - self.low) / 2

    @property
    def power(self) -> Tensor:
        return ((self.values - self.middle) ** 2).mean(dim=0)


def observed(program: Program) -> Mapping[str, Channels]:
    """What enters every linear layer of the blocks, by site."""
    sites = {site.node: site.name for site in find_sites(program.variants["main"]) if not site.refusal}
    found: dict[str, list[Tensor]] = {name: [] for name in sites.values()}

    def observe(_: Call, node: fx.Node, value: Tensor) -> None:
        if node.name in sites:
            found[sites[node.name]].append(value.flatten(0, -2).clone())

    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    sample_calibration(TorchRunner(program, observe), plan, spec, COUNT, 0)
    joined = {name: torch.cat(values) for name, values in found.items()}
    return {name: Channels(values.amin(dim=0), values.amax(dim=0), values) for name, values in joined.items()}


@pytest.fixture(scope="module")
def seen(captured: Program) -> Mapping[str, Channels]:
    return observed(captured)


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


def test_at_strength_1_all_channels_have_one_range_about_zero(captured: Program, run: Run) -> None:
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


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_factors_are_those_of_the_formula(
    captured: Program, run: Run, seen: Mapping[str, Channels], strength: float
) -> None:
    """max|x - o|^a / max|W|^(1 - a) up to a common factor, their geometric mean 1."""
    found = equalized(captured, run, f" strength={strength}").facts[Equalization].inputs
    assert list(found) == EQUALIZED
    for site in EQUALIZED:
        weight = captured.constants[f"{site}.weight"].abs().amax(dim=0)
        factors = seen[site].half_width ** strength / weight ** (1 - strength)
        expected = factors / factors.log().mean().exp()
        torch.testing.assert_close(torch.tensor(found[site]), expected, rtol=1e-3, atol=0)


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


def expected_noise(channels: Channels, weight: Tensor, weight_bits: int, activation_bits: int) -> float:
    """D^2 / 12 of activations times the squared weight, plus that of every row times the power of the activation."""
    step = 2 * channels.half_width.max() / (2**activation_bits - 1)
    rows = weight.abs().amax(dim=1) / (2 ** (weight_bits - 1) - 1)
    return float(step**2 * weight.square().sum() + rows.square().sum() * channels.power.sum()) / 12


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (8, 4)])
def test_no_more_noise_is_expected_than_without(
    captured: Program, run: Run, seen: Mapping[str, Channels], weight_bits: int, activation_bits: int
) -> None:
    options = f" weight-bits={weight_bits} activation-bits={activation_bits}"
    program = equalized(captured, run, options)
    channels = observed(program)
    for site in EQUALIZED:
        if site.endswith("qkv"):
            continue  # its rows are divided as well
        before, after = (
            expected_noise(found[site], owner.constants[f"{site}.weight"], weight_bits, activation_bits)
            for found, owner in ((seen, captured), (channels, program))
        )
        assert after <= before * (1 + 1e-4)


def test_the_choice_follows_the_bits(captured: Program, run: Run) -> None:
    """Where weights are the coarser ones, their noise decides, and the other way round."""
    choices = [
        equalized(captured, run, f" weight-bits={weight} activation-bits={activation}").facts[Equalization]
        for weight, activation in ((2, 8), (8, 2))
    ]
    assert choices[0] != choices[1]


def test_what_cannot_be_equalized_is_refused(captured: Program, run: Run) -> None:
    program = equalized(captured, run)
    refusals = {refusal.where: refusal.reason for refusal in program.history[-1].refusals}
    assert set(refusals) == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
    assert all(reason.startswith("not equalized: it does not come from a linear") for reason in refusals.values())
    assert set(program.facts[Equalization].inputs) == set(EQUALIZED)


def test_variants_are_refused(cached: Program, run: Run) -> None:
    with pytest.raises(UsageError, match="takes the one graph") as caught:
        equalized(cached, run)
    assert "before insert-cache" in str(caught.value.hint)


def test_a_step_plan_is_needed(captured: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="needs StepPlan"):
        equalized(replace(captured, facts=captured.facts.without(StepPlan)), run)


@pytest.mark.parametrize("strength", ["-0.01", "1.01", "NaN", "Infinity"])
def test_bad_strengths(captured: Program, run: Run, strength: str) -> None:
    with pytest.raises(UsageError, match="strength") as caught:
        equalized(captured, run, f" strength={strength}")
    assert caught.value.hint


def test_it_needs_a_trajectory(captured: Program, run: Run) -> None:
    with pytest.raises(UsageError, match="trajectories -1"):
        run("equalize{trajectories=-1}", captured)


def with_channels(program: Program, gain: float | None, shift: float, channels: slice) -> Program:
    """The program with other adaLN rows of the first attention: norm * (1 + gain) + shift, whatever the condition."""
    name = "blocks.0.adaLN_modulation.1"
    weight, bias = (program.constants[f"{name}.{kind}"].clone() for kind in ("weight", "bias"))
    for start, value in ((GAIN, gain), (SHIFT, shift)):
        rows = slice(start + channels.start, start + channels.stop)
        if value is not None:
            weight[rows], bias[rows] = 0, value
    return replace(program, constants={**program.constants, f"{name}.weight": weight, f"{name}.bias": bias})


@TO_EACH_STRENGTH
def test_dead_and_constant_channels(captured: Program, run: Run, options: str) -> None:
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
def test_an_activation_that_never_varies(captured: Program, run: Run, options: str, shift: float) -> None:
    program = with_channels(captured, -1.0, shift, slice(0, 32))
    found = equalized(program, run, options)
    assert all(bool(torch.isfinite(value).all()) for value in found.constants.values())
    assert set(found.facts[Equalization].inputs["blocks.0.attn.qkv"]) == {1.0}
    assert relative_error(found, program) < 1e-5


def test_a_constant_channel_moves_into_the_bias(captured: Program, run: Run) -> None:
    program = with_channels(captured, -1.0, 2.5, slice(CONSTANT, CONSTANT + 1))
    found = equalized(program, run)
    values = observed(found)["blocks.0.attn.qkv"].values[:, CONSTANT]
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-6)


def test_activations_that_are_not_finite_are_left_alone(captured: Program, run: Run) -> None:
    weight = torch.full_like(captured.constants["x_embedder.proj.weight"], float("inf"))
    program = replace(captured, constants={**captured.constants, "x_embedder.proj.weight": weight})
    found = equalized(program, run)
    refusals = {refusal.where: refusal.reason for refusal in found.history[-1].refusals}
    assert {name for name, reason in refusals.items() if "its activation is not finite" in reason} == set(EQUALIZED)
    assert found.facts[Equalization] == Equalization({}, {})
    assert all(found.constants[name] is value for name, value in program.constants.items())


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
