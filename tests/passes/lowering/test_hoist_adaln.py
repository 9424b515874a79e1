"""hoist-adaln: what depends on timestep and class alone, computed ahead of the steps, is what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from qcgraph.capture.capture import capture
from qcgraph.errors import ContractError
from qcgraph.export.check.verify import verify_export
from qcgraph.export.onnx.emit import emit_onnx
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.export.targets import TARGETS
from qcgraph.facts import Facts
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import program_from_json, program_to_json
from qcgraph.ir.structure import find_sites, total_macs
from qcgraph.models import LoadedModel
from qcgraph.models.eager import EagerRunner
from qcgraph.plan.roles import COMPUTES, REUSES, prepares
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update
from qcgraph.progress import Progress
from qcgraph.sampling import modulation
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Request, sample
from qcgraph.sampling.runner import Array, Call, Runner

EXACT = 1e-6  # relative L2
TARGET = TARGETS["onnxruntime-cpu"]
Run = Callable[[str, Program], Program]


@pytest.fixture(scope="module")
def hoisted(cached: Program, run: Run) -> Program:
    return run("hoist-adaln", cached)


@pytest.fixture(scope="module")
def folder(hoisted: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hoisted")
    emit_onnx(hoisted, path, TARGET.opset, Progress(), integer_products=True)
    return path


@pytest.fixture(params=["torch", "onnxruntime"])
def runner(request: pytest.FixtureRequest, hoisted: Program, folder: Path) -> Runner:
    return TorchRunner(hoisted) if request.param == "torch" else OnnxRuntimeRunner(folder, hoisted.interfaces, 1)


class Watched:
    """Another runner, with the calls that prepare."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.prepared: list[tuple[str, list[float], list[int]]] = []

    def run(self, call: Call) -> Array:
        if not call.is_step:
            inputs = call.inputs
            self.prepared.append((call.variant, inputs["timestep"].tolist(), inputs["class_label"].tolist()))
        return self._runner.run(call)


def drawn(program: Program, runner: Runner | None = None, labels: tuple[int, ...] = (0, 1, 2), seed: int = 0) -> Array:
    return sample(runner or TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], labels, seed)


def distance(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def latent_at(index: int, rows: int) -> Array:
    return np.random.default_rng(index).standard_normal((rows, 2, 8, 8), dtype=np.float32)


def started(program: Program, runner: Runner | None = None) -> Request:
    return Request(runner or TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec])


def step(request: Request, index: int, labels: Sequence[int]) -> Array:
    """The prediction at a step for latents that are noise, and for these labels, null ones among them."""
    conditions = Conditions(len(labels), {"class_label": np.array(labels)})
    return request.denoise(index, latent_at(index, len(labels)), conditions)


def follow(program: Program, labels: Sequence[int], runner: Runner | None = None) -> list[Array]:
    """Predictions along a plan."""
    request = started(program, runner)
    return [step(request, index, labels) for index in range(len(program.facts[StepPlan]))]


def test_golden(cached: Program, hoisted: Program, golden_diff: Callable[..., None]) -> None:
    golden_diff("hoist-adaln", cached, hoisted)


def test_steps_take_the_latent_and_the_modulation(hoisted: Program) -> None:
    interfaces = hoisted.interfaces
    assert list(interfaces) == ["full", "reuse", "prepare_full", "prepare_reuse"]
    assert hoisted.facts[StepPlan].roles == {
        "full": COMPUTES,
        "reuse": REUSES,
        "prepare_full": prepares("full"),
        "prepare_reuse": prepares("reuse"),
    }
    assert interfaces["full"].input_names == ("latent", "modulation")
    assert interfaces["reuse"].input_names == ("latent", "cache_0", "modulation")
    for name in ("full", "reuse"):
        prepared = interfaces[hoisted.facts[StepPlan].preparing[name]]
        assert prepared.input_names == ("timestep", "class_label")
        assert prepared.output_names == ("modulation",)
        assert prepared.outputs[0] == interfaces[name].inputs[-1]
    # Two blocks of six values and the final layer's two; a step that skips the blocks needs the latter alone.
    assert interfaces["full"].inputs[-1].shape == ("B", (2 * 6 + 2) * 32)
    assert interfaces["reuse"].inputs[-1].shape == ("B", 2 * 32)


def test_no_arithmetic_is_added_or_lost(cached: Program, hoisted: Program) -> None:
    for name in ("full", "reuse"):
        parts = [total_macs(find_sites(hoisted.variants[part])) for part in (name, f"prepare_{name}")]
        assert sum(parts) == total_macs(find_sites(cached.variants[name]))
    refusals = {site.refusal for site in find_sites(hoisted.variants["prepare_full"])}
    assert refusals == {"depends on timestep and conditions only (embedder or adaLN modulation)"}


def test_samples_are_the_same(cached: Program, hoisted: Program, runner: Runner) -> None:
    expected = drawn(cached)
    assert distance(drawn(hoisted), expected) < EXACT
    assert distance(drawn(hoisted, runner), expected) < EXACT


def test_every_exported_graph_computes_what_the_program_computes(hoisted: Program, folder: Path) -> None:
    checks = verify_export(hoisted, folder, TARGET, hoisted.interfaces, Progress())
    assert {check.variant for check in checks} == set(hoisted.variants)
    assert all(check.passed for check in checks), checks
    assert any(check.name == "parity of modulation" for check in checks)


def test_one_call_prepares_all_steps_of_a_variant(hoisted: Program) -> None:
    plan, watched = hoisted.facts[StepPlan], Watched(TorchRunner(hoisted))
    drawn(hoisted, watched, labels=(3, 1, 1))
    assert [name for name, _, _ in watched.prepared] == ["prepare_full", "prepare_reuse"]
    for name, timesteps, classes in watched.prepared:
        expected = [step.timestep for step in plan.steps if plan.preparing[step.variant] == name]
        assert timesteps == [timestep for timestep in expected for _ in range(3)]
        assert classes == [1, 3, 5] * len(expected)  # each once, the null class of all samples among them


def test_chunks_are_the_same(hoisted: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drawn(hoisted)
    monkeypatch.setattr(modulation, "TOGETHER", 9)  # two steps of four classes
    watched = Watched(TorchRunner(hoisted))
    assert distance(drawn(hoisted, watched), expected) < EXACT
    assert [len(timesteps) for _, timesteps, _ in watched.prepared] == [8, 8, 8, 4, 8]
    monkeypatch.setattr(modulation, "TOGETHER", 1)
    assert distance(drawn(hoisted), expected) < EXACT


def test_a_new_trajectory_takes_its_own_labels(cached: Program, hoisted: Program, runner: Runner) -> None:
    request = started(hoisted, runner)
    for labels in ([0, 1], [4, 1], [0, 1]):
        for index, expected in enumerate(follow(cached, labels)):
            assert distance(step(request, index, labels), expected) < EXACT


def test_an_aborted_trajectory_leaves_nothing_behind(hoisted: Program) -> None:
    watched = Watched(TorchRunner(hoisted))
    request = started(hoisted, watched)
    for _ in range(2):
        for index in range(2):
            step(request, index, [2])
    assert [name for name, _, _ in watched.prepared] == ["prepare_full", "prepare_reuse"] * 2


def test_labels_may_change_from_one_trajectory_to_the_next(cached: Program, hoisted: Program, runner: Runner) -> None:
    """What was prepared for the labels of the trajectory before is not used."""
    request, plain = started(hoisted, runner), started(cached)
    for labels in ([0, 1], [1, 0], [3, 3]):
        for index in range(len(hoisted.facts[StepPlan])):
            found, expected = (step(one, index, labels) for one in (request, plain))
            assert distance(found, expected) < EXACT


def test_interleaved_requests(hoisted: Program, runner: Runner) -> None:
    classes = ([0, 5], [3, 5, 2])
    expected = [follow(hoisted, labels, runner) for labels in classes]
    requests = [started(hoisted, runner) for _ in classes]
    for index in range(len(hoisted.facts[StepPlan])):
        for request, labels, apart in zip(requests, classes, expected, strict=True):
            assert distance(step(request, index, labels), apart[index]) < EXACT


def test_without_a_cache_the_only_variant_is_prepared(captured: Program, run: Run) -> None:
    program = run("hoist-adaln", captured)
    assert list(program.variants) == ["main", "prepare_main"]
    assert distance(drawn(program), drawn(captured)) < EXACT


def test_the_model_itself_needs_no_preparation(hoisted: Program, tiny_model: LoadedModel, captured: Program) -> None:
    """Whatever runs a plan of a compilation for comparison computes the modulation where it is used."""
    every = hoisted.facts[StepPlan].all_computing
    found = sample(EagerRunner(tiny_model), every, tiny_model.spec, [0, 1, 2], seed=0)
    assert distance(found, drawn(captured)) < EXACT


def test_everything_before_and_after(captured: Program, run: Run) -> None:
    """Quantized, compensated and lowered: hoisted last it changes no value; hoisted first, only roundings may flip."""
    cache = "plan-cache{interval=3},insert-cache"
    rest = "calibrate{trajectories=2},group-timesteps{groups=3},plan-quant,insert-qdq,fit-compensation"
    rest = f"{rest},insert-compensation,lower-linear"
    plain = run(f"{cache},{rest}", captured)
    assert distance(drawn(run("hoist-adaln", plain)), drawn(plain)) < EXACT
    first = run(f"{cache},hoist-adaln,{rest}", captured)
    assert distance(drawn(first), drawn(plain)) < 1e-2


@pytest.mark.slow
def test_round_trips(hoisted: Program) -> None:
    assert Facts.decode(hoisted.facts.encode())[StepPlan] == hoisted.facts[StepPlan]
    assert program_from_json(program_to_json(hoisted), hoisted.constants).digest == hoisted.digest


def test_twice_is_an_error(hoisted: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="hoisted already"):
        run("hoist-adaln", hoisted)


def test_a_plan_that_does_not_prepare_is_illegal(hoisted: Program, run: Run) -> None:
    plan = hoisted.facts[StepPlan]
    with pytest.raises(ContractError, match="modulation is taken by"):
        run("lower-linear", hoisted.with_facts(replace(plan, roles=plan.roles | {"prepare_reuse": REUSES})))


class Odd(nn.Module):
    """Takes timestep and class in ways that a DiT does not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(6, 4)

    def forward(self, latent: Tensor, timestep: Tensor, class_label: Tensor) -> Tensor:
        if self.kind == "unconditional":
            return latent * 2
        if self.kind == "expanded":  # over as many samples and positions as the latent has
            value = self.embedding(class_label).sum(1)[:, None, None, None].expand(latent.shape[0], 2, 8, 8)
            return latent * value
        if self.kind == "sized":
            return latent * (timestep * 0.5).reshape(latent.shape[0], 1, 1, 1)
        null = (class_label == 5)[:, None, None, None]  # not a number
        return torch.where(null, latent, latent * self.embedding(class_label)[:, :1, None, None])


def odd(kind: str) -> Program:
    spec = ModelSpec.class_conditional("odd", (2, 8, 8), 5, 5, output_channels=2)
    torch.manual_seed(0)
    module = Odd(kind).eval().requires_grad_(False)
    program = capture(module, spec, ("latent", "timestep", "class_label"))
    return program.with_facts(
        StepPlan(Fingerprint("", "ddim", 2, 1.5), (Step(9.0, Update(0.5, 0.5)), Step(1.0, Update(1, 1))))
    )


def test_a_model_without_such_values_is_refused(run: Run) -> None:
    program = run("hoist-adaln", odd("unconditional"))
    assert not program.history[-1].changed
    assert "no value that depends on timestep and conditions alone" in program.history[-1].refusals[0].reason


@pytest.mark.parametrize(
    ("kind", "width", "inputs"),
    [
        ("expanded", 1, ("latent", "modulation")),
        ("sized", 1, ("latent", "modulation")),
        ("boolean", 1, ("latent", "class_label", "modulation")),
    ],
)
def test_other_structures(run: Run, kind: str, width: int, inputs: tuple[str, ...]) -> None:
    plain = odd(kind)
    program = run("hoist-adaln", plain)
    assert program.interfaces["main"].input_names == inputs
    assert program.interfaces["main"].inputs[-1].shape == ("B", width)
    assert distance(drawn(program), drawn(plain)) < EXACT
    refusals = program.history[-1].refusals
    assert [refusal.reason for refusal in refusals] == (
        ["its value is bool[B], not float32 with the batch first"] if kind == "boolean" else []
    )


@pytest.mark.slow
def test_a_diffusers_model(run: Run) -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8}
    module: Any = DiTTransformer2DModel(
        **sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=10, norm_num_groups=4
    )

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
            found = self.module(hidden_states, timestep, class_labels, return_dict=False)[0]
            assert isinstance(found, Tensor)
            return found

    spec = ModelSpec.class_conditional("folder", (4, 8, 8), 10, 10, output_channels=8)
    captured = capture(Plain().eval(), spec, ("hidden_states", "timestep", "class_labels"))
    captured = captured.with_facts(make_step_plan("ddim", 6, 1.5, spec.noise_schedule, "folder"))
    plain = run("plan-cache{interval=2},insert-cache", captured)
    program = run("hoist-adaln", plain)
    assert program.interfaces["full"].inputs[-1].shape == ("B", (3 * 6 + 2) * 16)
    assert distance(drawn(program), drawn(plain)) < EXACT


@pytest.mark.slow
def test_what_is_decided_on_samples_can_be_decided_after_hoisting(captured: Program, run: Run) -> None:
    """Their timesteps differ within a batch, and so does the modulation that is prepared for them."""
    rest = (
        "calibrate{selection=uniform latents=8 trajectories=1},group-timesteps{groups=2},plan-quant,search-scales,"
        "round-weights,fit-requantization,insert-qdq"
    )
    apart, hoisted = drawn(run(rest, captured)), drawn(run(f"hoist-adaln,{rest}", captured))
    original = drawn(captured)
    assert distance(hoisted, apart) < distance(apart, original) < 0.1
