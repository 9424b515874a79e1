"""The captured program is compared with its module, and models that are no functions of their inputs are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qcgraph
from qcgraph.capture.capture import capture
from qcgraph.capture.meaning import check_meaning, distance
from qcgraph.compiler.compilation import compile_model
from qcgraph.errors import CaptureError, UsageError
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.graph import output_node
from qcgraph.ir.program import Program
from qcgraph.models import LoadedModel
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.recipe import Calibration, Recipe

SPEC = ModelSpec.class_conditional("toy", (2, 4, 4), 3, 3, output_channels=2)
NAMES = ("x", "t", "y")
Forward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

aten = torch.ops.aten


def plan_of(spec: ModelSpec, guidance: float = 1.5) -> StepPlan:
    return make_step_plan("ddim", 4, guidance, spec.noise_schedule, "digest")


def toy(forward: Forward, rows: int = 4) -> nn.Module:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes = nn.Embedding(rows, 2)
            self.calls, self.kept = 0, None

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return forward(self, x + self.classes(y)[:, :, None, None], t, y)

    return Toy().eval().requires_grad_(False)


def check(module: nn.Module, guidance: float = 1.5) -> None:
    check_meaning(capture(module, SPEC, NAMES), module, NAMES, plan_of(SPEC, guidance))


def test_our_models_mean_what_they_are(captured: Program, tiny_model: LoadedModel) -> None:
    check_meaning(captured, tiny_model.module, tiny_model.input_names, captured.facts[StepPlan])


@pytest.mark.parametrize("change", [1e-3, -1.0])
def test_a_program_that_computes_something_else_is_refused(
    captured: Program, tiny_model: LoadedModel, change: float
) -> None:
    editor = GraphEditor(captured.variants["main"], captured.constants, "test")
    output = output_node(editor.graph)
    (prediction,) = output.all_input_nodes
    with editor.before(output):
        scaled = editor.call(aten.mul.Tensor, prediction, 1 + change, source=prediction)
    editor.set_outputs([scaled], editor.outputs)
    wrong = with_edits(captured, {"main": editor})
    with pytest.raises(CaptureError, match=rf"relative L2 distance {abs(change):g}, limit .* at timestep .* batch 1"):
        check_meaning(wrong, tiny_model.module, tiny_model.input_names, captured.facts[StepPlan])


def test_the_global_generator_stays_where_it_was(captured: Program, tiny_model: LoadedModel) -> None:
    before = torch.get_rng_state()
    check_meaning(captured, tiny_model.module, tiny_model.input_names, captured.facts[StepPlan])
    assert torch.equal(torch.get_rng_state(), before)


def one_is_special(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x * 2 if x.shape[0] == 1 else x


def tracing_is_special(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x * 2 if torch.compiler.is_compiling() else x


def counts(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    self.calls += 1
    return x * self.calls


def keeps(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    if self.kept is None or self.kept.shape != x.shape:
        self.kept = x
    return x + self.kept


def draws(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x * random.random()


def asks_for_gradients(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x * 2 if torch.is_grad_enabled() else x


def asks_for_inference(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x * 2 if torch.is_inference_mode_enabled() else x


def divides_by_zero(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x / t[:, None, None, None]  # the last timestep of the plan is 0


def null_class_is_infinite(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.where(y[:, None, None, None] == 3, float("inf"), x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (one_is_special, "computes something else than the model: .* batch 1"),
        (tracing_is_special, "computes something else than the model"),
        (counts, "another result each time"),
        (keeps, "another result each time|computes something else"),
        (draws, "another result each time"),
        (asks_for_gradients, "depends on whether gradients are recorded"),
        (asks_for_inference, "depends on whether gradients are recorded"),
        (divides_by_zero, "not finite at timestep 0"),
        (null_class_is_infinite, r"not finite at .*class_label \[3"),
        (lambda self, x, t, y: x.squeeze(0), r"gives \[1, 2, 4, 4\] and the model \[2, 4, 4\] at .* batch 1"),
    ],
)
def test_what_is_no_function_of_its_inputs_is_refused(forward: Forward, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        check(toy(forward))


def first_timestep(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x + torch.cos(t[:1].expand(t.shape[0]) / 100)[:, None, None, None]


def largest_timestep(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x * ((1 + t) / (1 + t.max()))[:, None, None, None]


def mean_of_the_batch(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x - x.mean(dim=0, keepdim=True) / 2


@pytest.mark.parametrize("forward", [first_timestep, largest_timestep, mean_of_the_batch])
@pytest.mark.parametrize("steps", [2, 4])
def test_samples_that_depend_on_their_batch_are_refused(forward: Forward, steps: int) -> None:
    """Hoisting, calibration and a cache of guidance put other samples beside them than the host does."""
    module, plan = toy(forward), make_step_plan("ddim", steps, 1.5, SPEC.noise_schedule, "digest")
    with pytest.raises(CaptureError, match=r"depends on the others in its batch: .* timestep 0, batch 1"):
        check_meaning(capture(module, SPEC, NAMES), module, NAMES, plan)


def test_a_null_class_without_a_row_is_said_under_guidance_only() -> None:
    module = toy(lambda self, x, t, y: x, rows=3)
    check(module, guidance=1.0)
    with pytest.raises(CaptureError, match=r"called at timestep .* class_label \[3\]: index out of range"):
        check(module)


def test_half_precision_is_said_to_be_that() -> None:
    module = toy(lambda self, x, t, y: F.conv2d(x, self.kernel))
    module.kernel = nn.Parameter(torch.ones(2, 2, 1, 1).half(), requires_grad=False)
    with pytest.raises(CaptureError, match="the model's parameters are float16") as caught:
        check(module)
    assert "model.float()" in str(caught.value.hint)


def test_a_result_of_zeros_is_no_difference() -> None:
    check(toy(lambda self, x, t, y: x * 0))


def test_distance_is_that_of_the_worst_sample() -> None:
    one = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert distance(one, one) == 0
    assert distance(one + torch.tensor([[0.0, 5.0], [0.0, 0.1]]), one) == pytest.approx(1.0)
    assert distance(torch.ones(1, 2), torch.zeros(1, 2)) == float("inf")
    assert distance(torch.full((1, 2), float("nan")), torch.ones(1, 2)) == float("inf")


def test_large_models_are_called_a_few_times(tiny_model: LoadedModel, captured: Program) -> None:
    calls = []
    handle = tiny_model.module.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qcgraph.capture.meaning.MACS", 1)
            check_meaning(captured, tiny_model.module, tiny_model.input_names, captured.facts[StepPlan])
    finally:
        handle.remove()
    assert sum(calls) <= 8


class Rotating(nn.Module):
    """A block of two streams whose projections are einsums, and which rotates by writing into slices."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(size) / 4) for size in ((16, 32), (32, 16)))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.einsum("btc,co->bto", x + c, self.up)
        turned = torch.zeros_like(wide)
        turned[..., 0::2] = wide[..., 1::2]
        turned[..., 1::2] = -wide[..., 0::2]
        moved = torch.einsum("btc,co->bto", torch.relu(turned), self.down).squeeze(1)
        return x + moved, c + moved.mean(dim=1, keepdim=True)


class Streams(nn.Module):
    """Both streams leave every block: there is no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.classes, self.head = nn.Linear(2, 16), nn.Embedding(4, 16), nn.Linear(16, 2)
        self.blocks = nn.ModuleList(Rotating() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        z, c = self.embed(x.flatten(2).transpose(1, 2)), self.classes(y)[:, None] + torch.cos(t / 100)[:, None, None]
        for block in self.blocks:
            z, c = block(z, c)
        return self.head(z).transpose(1, 2).unflatten(2, (4, 4))


@pytest.fixture(scope="module")
def streams() -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel(Streams().eval().requires_grad_(False), SPEC, NAMES)


def recipe(**overrides: object) -> Recipe:
    few = Recipe(calibration=Calibration(trajectories=8, samples=64))
    return few.override(steps=4, target="onnxruntime-cpu", compensate="off", **overrides)


@pytest.mark.slow
def test_a_bundle_computes_what_the_model_computes(streams: LoadedModel, tmp_path: Path) -> None:
    """Written in place, with einsums and without a chain of blocks: all of it is quantized, in ONNX Runtime too."""
    with torch.inference_mode():
        bundle = qcgraph.compile(streams, recipe(bits="w8a8", cache="off"), output=tmp_path / "bundle")
    assert bundle.report.quantized_sites == 4
    latent = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    timestep, labels = torch.full((2,), bundle.plan.timesteps[0]), torch.tensor([0, 3])
    found = qcgraph.load(bundle.path)(latent, timestep, labels)
    found = getattr(found, "sample", found)
    assert (
        distance(torch.as_tensor(found), streams.module(latent, timestep, labels)) < 0.2
    )  # seven bits of random weights; what is lost is lost by 1


@pytest.mark.slow
def test_caching_without_a_chain_of_blocks_is_refused_in_words(streams: LoadedModel) -> None:
    with pytest.raises(UsageError, match="no chain of blocks to cache"):
        compile_model(streams, recipe(bits="w8a8", cache="interval=2"), None, dry_run=True)
