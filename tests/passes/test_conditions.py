"""Passes on models that are conditioned on nothing, and on two labels: each agrees with the captured program.

Settings are those at which the tests of a pass find it exact; what is approximate by nature is near.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcgraph.capture.capture import capture
from qcgraph.capture.meaning import check_meaning
from qcgraph.errors import ContractError, UsageError
from qcgraph.export.onnx.emit import emit_onnx
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.export.targets import TARGETS
from qcgraph.facts import CachePlan, CalibrationSet, Compensation, ForecastFit, SolverPlan
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.models import LoadedModel
from qcgraph.models.dit import DiT, initialize_random
from qcgraph.models.eager import EagerRunner
from qcgraph.models.geometry import DiTConfig
from qcgraph.passes.caching._forecast import table_name
from qcgraph.pipeline import Pipeline
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import Condition, ModelSpec, class_label
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.fitting import with_updates
from qcgraph.sampling.loop import sample

Run = Callable[[str, Program], Program]
CONFIG = DiTConfig(input_size=8, patch_size=2, channels=2, width=32, depth=2, heads=2, class_count=5)
STYLES = 3
STEPS, SAMPLES = 9, 4
CACHE = "plan-cache{interval=3 history=2},insert-cache"
CALIBRATE = "calibrate{trajectories=2 selection=uniform latents=8}"
pytestmark = pytest.mark.slow  # it plans and fits
QUANTIZE = "group-timesteps{groups=2},plan-quant,search-scales,round-weights,fit-requantization,insert-qdq"
ROUNDED = 1e-6  # relative L2


class Unconditioned(DiT):
    """A DiT that is told the timestep alone."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        initialize_random(self, torch.Generator().manual_seed(0))
        del self.y_embedder

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return self.denoised(x, self.t_embedder(t))

    def denoised(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, condition)
        return self.unpatchify(self.final_layer(x, condition))


class Styled(Unconditioned):
    """A DiT that is told a class and a style."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.styles = nn.Embedding(6, CONFIG.width), nn.Embedding(STYLES + 1, CONFIG.width)
        for seed, table in enumerate((self.classes, self.styles)):
            nn.init.normal_(table.weight, std=0.5, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, style: Tensor) -> Tensor:  # type: ignore[override]
        return self.denoised(x, self.t_embedder(t) + self.classes(y) + self.styles(style))


def spec_of(*conditions: Condition) -> ModelSpec:
    return ModelSpec("told", (2, 8, 8), output_channels=4, conditions=conditions)


def loaded(name: str) -> tuple[LoadedModel, float]:
    """A model, and the guidance that it is sampled with."""
    if name == "nothing":
        return LoadedModel(Unconditioned().eval().requires_grad_(False), spec_of(), ("x", "t")), 1.0
    spec = spec_of(class_label(5), class_label(STYLES, name="style"))
    return LoadedModel(Styled().eval().requires_grad_(False), spec, ("x", "t", "y", "style")), 1.5


def captured_of(model: LoadedModel, guidance: float) -> Program:
    program = capture(model.module, model.spec, model.input_names)
    return program.with_facts(
        make_step_plan("ddim", STEPS, guidance, model.spec.noise_schedule, program.constants_digest),
    )


@pytest.fixture(scope="module", params=["nothing", "two labels"])
def told(request: pytest.FixtureRequest) -> Program:
    """A captured program, told nothing or two labels."""
    return captured_of(*loaded(request.param))


@pytest.fixture(scope="module")
def styled() -> Program:
    return captured_of(*loaded("two labels"))


@pytest.fixture(scope="module")
def reusing(told: Program, run: Run) -> Program:
    """The same with a cache over all blocks, every third step computing."""
    return run(CACHE, told)


def latents(program: Program, plan: StepPlan | None = None) -> np.ndarray:
    spec = program.facts[ModelSpec]
    return sample(TorchRunner(program), plan or program.facts[StepPlan], spec, in_turn(SAMPLES, spec), seed=0)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def random_tables(program: Program) -> Program:
    """The program with other forecasts at every step, in both halves and every channel."""
    generator = torch.Generator().manual_seed(0)
    names = [table_name(value.name) for value in program.facts[CachePlan].values]
    tables = {name: torch.randn(program.constants[name].shape, generator=generator) for name in names}
    return replace(program, constants=dict(program.constants) | tables)


@pytest.mark.parametrize("name", ["nothing", "two labels"])
def test_the_captured_program_is_the_model(name: str) -> None:
    model, guidance = loaded(name)
    program = captured_of(model, guidance)
    plan, conditions = program.facts[StepPlan], in_turn(SAMPLES, model.spec)
    assert program.variants["main"].interface.inputs == model.spec.inputs
    expected = sample(EagerRunner(model), plan, model.spec, conditions, seed=0)
    assert distance(latents(program), expected) < ROUNDED
    check_meaning(program, model.module, model.input_names, plan)


def test_every_condition_counts(styled: Program) -> None:
    spec, plan = styled.facts[ModelSpec], styled.facts[StepPlan]
    first = in_turn(1, spec)
    for name in first.values:
        other = replace(first, values={**first.values, name: first.values[name] + 1})
        one, two = (sample(TorchRunner(styled), plan, spec, conditions, seed=0) for conditions in (first, other))
        assert distance(one, two) > 1e-2


def test_interval_one_is_the_captured_program(told: Program, run: Run) -> None:
    program = run("plan-cache{interval=1},insert-cache,insert-forecast,drop-variants", told)
    assert np.array_equal(latents(program), latents(told))


def test_computing_every_step_is_the_captured_program(told: Program, reusing: Program, run: Run) -> None:
    for program in (reusing, random_tables(run("insert-forecast", reusing))):
        assert np.array_equal(latents(program, program.facts[StepPlan].all_computing), latents(told))
    assert distance(latents(reusing), latents(told)) > 1e-4


def test_neutral_forecasts_are_plain_reuse_to_the_bit(reusing: Program, run: Run) -> None:
    program = run(f"{CALIBRATE},insert-forecast", reusing)
    assert np.array_equal(latents(program), latents(reusing))
    fitted = run("fit-forecast{kind=reuse}", program)
    assert np.array_equal(latents(fitted), latents(reusing))
    assert not np.array_equal(latents(random_tables(program)), latents(reusing))


def test_fitted_forecasts_are_nearer_than_reuse(told: Program, reusing: Program, run: Run) -> None:
    """Where they were fitted, step by step, in each half that there is."""
    program = run("calibrate{trajectories=6},insert-forecast,fit-forecast", reusing)
    steps = program.facts[ForecastFit].steps
    assert [step.step for step in steps] == [1, 2, 4, 5, 7, 8]
    assert sum(step.forecast for step in steps) < 0.9 * sum(step.reuse for step in steps)
    table = program.constants[table_name("cache_0")]
    neutral = torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, CONFIG.width)
    halves = [not torch.equal(table[1, :, half], neutral) for half in range(2)]
    assert halves == [True, program.facts[StepPlan].halves == 2]
    assert torch.isfinite(torch.from_numpy(latents(program))).all()


def test_a_planned_schedule_is_kept_within_its_budget(reusing: Program, run: Run) -> None:
    text = "plan-steps{budget=0.5 trajectories=2},rehearse-steps{trajectories=2}"
    plan = run(text, reusing).facts[StepPlan]
    assert plan.computes(0)
    assert 1 < plan.modes.count(None) < STEPS


def test_gain_one_is_bit_identical(told: Program, run: Run) -> None:
    program = run("calibrate{trajectories=2},fit-compensation{clamp=0},insert-compensation", told)
    assert set(np.ravel(program.facts[Compensation].gains)) == {1.0}
    assert np.array_equal(latents(program), latents(told))


def test_the_masked_form_of_what_has_not_drifted_is_neutral(told: Program) -> None:
    passes = Pipeline.parse("calibrate{trajectories=2},fit-compensation{form=masked}")
    program = passes.run(told, origin=told)
    np.testing.assert_allclose(program.facts[Compensation].gains, 1.0, rtol=0, atol=1e-6)


def test_a_solver_of_all_steps_is_the_captured_program(told: Program, run: Run) -> None:
    program = run(f"plan-solver{{steps={STEPS} target=run trajectories=2}},fit-solver", told)
    assert program.facts[StepPlan].steps == told.facts[StepPlan].steps
    assert np.array_equal(latents(program), latents(told))


def test_fitted_steps_are_nearer_than_plain_ones(told: Program, run: Run) -> None:
    """With reused values among them, too: every second of six steps."""
    planned = run("plan-solver{steps=6 target=run trajectories=6}", told)
    for cache in ("", "plan-cache{interval=2},insert-cache,"):
        program = run(f"{cache}fit-solver", planned)
        plan = program.facts[StepPlan]
        plain = with_updates(plan, program.facts[SolverPlan].plain)
        assert distance(latents(program), latents(told)) < distance(latents(program, plain), latents(told))


@pytest.mark.parametrize("text", ["plan-equalization{trajectories=2},equalize", "split-attention"])
def test_rewritten_it_is_the_same_function(told: Program, run: Run, text: str) -> None:
    program = run(text, told)
    assert program.history[-1].changed
    assert distance(latents(program), latents(told)) < 1e-5


def test_hoisted_it_is_the_same_function(told: Program, reusing: Program, run: Run) -> None:
    for plain in (told, reusing, random_tables(run("insert-forecast", reusing))):
        hoisted = run("hoist-adaln", plain)
        computing = hoisted.variants[hoisted.computing].interface
        assert [spec.role for spec in computing.inputs] == [TensorRole.STATE, TensorRole.MODULATION]
        assert distance(latents(hoisted), latents(plain)) < ROUNDED


def test_the_calibration_set_holds_every_condition(told: Program, run: Run) -> None:
    found, spec = run(CALIBRATE, told).facts[CalibrationSet], told.facts[ModelSpec]
    assert {name: len(values) for name, values in found.conditions.items()} == {
        condition.name: 8 for condition in spec.conditions
    }
    for condition in spec.conditions:
        assert set(found.conditions[condition.name]) <= set(range(condition.count or 0))


def test_quantized_it_is_near(told: Program, run: Run) -> None:
    program = run(f"{CALIBRATE},{QUANTIZE}", told)
    assert "qcgraph.quantize" in program.text
    assert 0 < distance(latents(program), latents(told)) < 0.1
    assert distance(latents(run("hoist-adaln,lower-linear", program)), latents(program)) < 1e-4


def test_all_together(told: Program, run: Run) -> None:
    """Every pass takes what those before it made, and the last ones change nothing."""
    chain = f"{CACHE},{CALIBRATE},{QUANTIZE},insert-forecast,fit-forecast,fit-compensation,insert-compensation"
    program = run(chain, told)
    assert 0 < distance(latents(program), latents(told)) < 0.3
    last = run("drop-variants,hoist-adaln,lower-linear", program)
    assert distance(latents(last), latents(program)) < 1e-4


def test_in_onnx_runtime_it_is_the_same_function(told: Program, reusing: Program, run: Run, tmp_path: Path) -> None:
    """Also what tells halves apart, which a model without conditions does not have."""
    program = run("hoist-adaln", random_tables(run("insert-forecast", reusing)))
    emit_onnx(program, tmp_path, TARGETS["onnxruntime-cpu"].opset, Progress(), integer_products=True)
    spec, plan = program.facts[ModelSpec], program.facts[StepPlan]
    runner = OnnxRuntimeRunner(tmp_path, program.interfaces, 1)
    assert distance(sample(runner, plan, spec, in_turn(SAMPLES, spec), seed=0), latents(program)) < 1e-5


def test_a_sample_is_unconditional_where_all_of_its_conditions_are_null(styled: Program, run: Run) -> None:
    """Forecasts of each half are told apart by that: one null condition alone does not make a half."""
    plain = run("plan-cache{interval=3},insert-cache", styled)
    program = random_tables(run("insert-forecast", plain))
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "latent": torch.randn(4, 2, 8, 8, generator=generator),
        "timestep": torch.full((4,), 500.0),
        "class_label": torch.tensor([1, 5, 1, 5]),
        "style": torch.tensor([2, 2, STYLES, STYLES]),
        "row": torch.tensor(4),
        "cache_0": torch.randn(4, 16, 32, generator=generator),
    }
    table = program.constants[table_name("cache_0")][4]  # [2, 2, 32]
    halves = [0, 0, 0, 1]
    change = torch.stack([table[0, half] * inputs["cache_0"][i] + table[1, half] for i, half in enumerate(halves)])
    found = program.run("reuse", inputs)["noise_prediction"]
    expected = plain.run("reuse", inputs | {"cache_0": change})["noise_prediction"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_condition_without_a_null_value_does_not_count(run: Run) -> None:
    model, guidance = loaded("two labels")
    spec = spec_of(class_label(5), replace(class_label(STYLES, name="style"), null=None))
    plain = run(CACHE, captured_of(replace(model, spec=spec), guidance))
    program = run("insert-forecast", plain)
    assert {"class_label", "row"} <= set(program.variants["reuse"].interface.input_names)
    nodes = program.variants["reuse"].graph.nodes
    assert [node.args[1] for node in nodes if node.target is torch.ops.aten.eq.Scalar] == [5]
    assert np.array_equal(latents(program), latents(plain))


def test_halves_are_told_apart_by_numbers(run: Run) -> None:
    vector = Condition("style", "f32", (2,), count=3, null=0.0)

    class Directed(Styled):
        def forward(self, x: Tensor, t: Tensor, y: Tensor, style: Tensor) -> Tensor:
            return self.denoised(x, self.t_embedder(t) + self.classes(y) + style.repeat(1, 16))

    model = LoadedModel(
        Directed().eval().requires_grad_(False), spec_of(class_label(5), vector), ("x", "t", "y", "style")
    )
    program = run(CACHE, captured_of(model, 1.5))
    assert np.isfinite(latents(program)).all()
    with pytest.raises(ContractError, match="style is no number"):
        run("insert-forecast", program)


def test_the_difference_of_halves_restores_the_other_half(styled: Program, run: Run) -> None:
    halved = run("plan-cache{interval=2 blocks=guidance},insert-cache", styled)
    inputs = {
        "latent": torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3)).repeat(2, 1, 1, 1),
        "timestep": torch.full((4,), 500.0),
        "class_label": torch.tensor([0, 4, 5, 5]),
        "style": torch.tensor([1, 2, STYLES, STYLES]),
    }
    full = halved.run("full", inputs)
    expected = styled.run("main", inputs)["noise_prediction"]
    assert torch.equal(full["noise_prediction"], expected)
    found = halved.run("conditional", inputs | full)["noise_prediction"]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert 0 < distance(latents(halved), latents(styled)) < 0.5


def test_what_is_told_nothing_has_no_halves(run: Run) -> None:
    with pytest.raises(UsageError, match="without guidance there are no halves to differ"):
        run("plan-cache{blocks=guidance}", captured_of(*loaded("nothing")))
