"""One ONNX model of a bundle: it samples what that samples, in the same kernels, on weights that stand once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest

from qcgraph.bundle import Bundle, write_plan, writing
from qcgraph.cli import run as command
from qcgraph.export.package.single_file import PLAN_KEY, write_single_file
from qcgraph.export.package.single_model import SingleModel, host_plan
from qcgraph.export.run.onnxruntime import OptimizedGraph
from qcgraph.export.run.open import runner_of
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.plan.roles import COMPUTES, REUSES, TensorRole
from qcgraph.plan.spec import GROUP, ROW, Interface, ModelSpec, TensorSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.recipe import Recipe
from qcgraph.sampling.loop import sample
from qcgraph.sampling.runner import Call

BundleOf = Callable[[Any], Bundle]
INT8 = "MatMulIntegerToFloat"


class SingleRunner:
    """Runs the one model as its metadata says, in the loop of qcgraph (see `qcgraph.sampling.runner.Runner`)."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.plan = json.loads(self.session.get_modelmeta().custom_metadata_map[PLAN_KEY])
        self._shapes = {item.name: item.shape[1:] for item in self.session.get_inputs()}

    def run(self, call: Call) -> Any:
        inputs, state = call.inputs, cast(dict[Any, Any], call.state)
        if not call.is_step:
            return np.zeros((len(inputs["timestep"]), 1), np.float32)  # each branch prepares itself
        step = self.plan["steps"][call.index]
        feeds = {name: np.array([step[name]]) for name in self.plan["numbers"]}
        feeds |= {name: inputs[name] for name in ("latent", "timestep", "class_label")}
        for taken in self.plan["cache"]:
            # What is there before the first step must not matter.
            feeds[taken] = state.get(taken, np.full((len(inputs["latent"]), *self._shapes[taken]), np.nan, np.float32))
        prediction, *caches = self.session.run(["noise_prediction", *self.plan["cache"].values()], feeds)
        state.update(zip(self.plan["cache"], caches, strict=True))
        return prediction


def assert_same_samples(bundle: Bundle, runner: SingleRunner) -> None:
    """Whole trajectories, relative to their largest value: random weights let latents grow."""
    got, expected = (sample(one, bundle.plan, bundle.spec, [0, 1, 4], seed=1) for one in (runner, runner_of(bundle)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture
def prepared(captured: Program, export_of: Callable[..., Any], tmp_path: Path) -> Any:
    """Three variants: one restores half of the guidance, and the modulation of all is hoisted."""
    pipeline = "plan-cache{interval=3 blocks=all+guidance},insert-cache,hoist-adaln"
    program = Pipeline.parse(pipeline).run(captured)
    variants = [name for name, role in program.facts[StepPlan].roles.items() if not role.of]
    schedule = [variants[index % len(variants)] for index in range(len(program.facts[StepPlan]))]
    program = program.with_facts(program.facts[StepPlan].with_variants(schedule))
    return export_of(program, tmp_path)


@pytest.mark.parametrize(
    "name", ["compiled", *(pytest.param(name, marks=pytest.mark.slow) for name in ("prepared", "forecasting"))]
)
def test_it_samples_what_the_bundle_samples(
    request: pytest.FixtureRequest, bundle_of: BundleOf, name: str, tmp_path: Path
) -> None:
    bundle, folder = bundle_of(request.getfixturevalue(name)), tmp_path / "single"
    folder.mkdir()
    write_single_file(bundle, folder)
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    runner = SingleRunner(folder / "model.onnx")
    assert runner.plan["variants"] == list(bundle.plan.variants)
    assert_same_samples(bundle, runner)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those in it."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield from graphs(attribute.g)


def test_branches_run_the_kernels_of_the_bundle(bundle_of: BundleOf, compiled: Any, tmp_path: Path) -> None:
    bundle = bundle_of(compiled)
    write_single_file(bundle, tmp_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    found = Counter(node.op_type for graph in graphs(optimized) for node in graph.node)
    kept = (INT8, "MatMul", "Gemm", "Attention")
    expected = [OptimizedGraph.of(bundle.file(f"{variant}.onnx")) for variant in bundle.plan.variants]
    assert [found[op] for op in kept] == [sum(graph.count(op) for graph in expected) for op in kept]
    assert found[INT8] > 0


def test_weights_stand_once_around_the_branches(bundle_of: BundleOf, compiled: Any, tmp_path: Path) -> None:
    bundle = bundle_of(compiled)
    write_single_file(bundle, tmp_path)
    outer, *inner = graphs(onnx.load(tmp_path / "model.onnx").graph)
    names = [tensor.name for graph in (outer, *inner) for tensor in graph.initializer]
    assert len(names) == len(set(names))
    assert sum(tensor.ByteSize() for graph in inner for tensor in graph.initializer) < 4096  # numbers
    stored = sum(bundle.file(f"{variant}.onnx").stat().st_size for variant in bundle.plan.variants)
    stored += bundle.file("weights.safetensors").stat().st_size
    assert (tmp_path / "model.onnx").stat().st_size < 1.1 * stored
    assert len([node for node in outer.node if node.op_type == "If"]) == 1


def test_weights_that_do_not_fit_stand_beside_it(bundle_of: BundleOf, unquantized: Any, tmp_path: Path) -> None:
    bundle = bundle_of(unquantized)
    write_single_file(bundle, tmp_path, largest=0)
    weights = bundle.file("weights.safetensors")
    assert (tmp_path / weights.name).read_bytes() == weights.read_bytes()
    assert (tmp_path / "model.onnx").stat().st_size < weights.stat().st_size
    assert_same_samples(bundle, SingleRunner(tmp_path / "model.onnx"))


def test_where_every_step_computes_there_is_nothing_to_choose(
    bundle_of: BundleOf, unquantized: Any, tmp_path: Path
) -> None:
    program = unquantized.program
    plan = program.facts[StepPlan].all_computing
    bundle = bundle_of(replace(unquantized, program=program.with_facts(plan)))
    single = write_single_file(bundle, tmp_path)
    assert (single.variants, single.cache, single.numbers) == (("full",), (), ("variant",))
    assert "If" not in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert_same_samples(bundle, SingleRunner(tmp_path / "model.onnx"))


def test_the_outside_of_the_model(captured: Program, tmp_path: Path) -> None:
    """Types of caches are those of the bundle, numbers are tensors of one element, and a chain of ages has no gap."""
    latent = captured.facts[ModelSpec].latent
    prediction = TensorSpec("noise_prediction", "f32", ("B", 4, 8, 8), TensorRole.PREDICTION)
    cache = [TensorSpec(f"any_{age}", "f16", ("B", 16), TensorRole.CACHE, "cache_0", age) for age in (0, 2)]
    unread = TensorSpec("cache_1", "bf16", ("B", 8), TensorRole.CACHE, "cache_1")
    interfaces = {
        "full": Interface((latent, GROUP), (prediction, cache[0], unread)),
        "reuse": Interface((latent, *cache, ROW), (prediction,)),
    }
    steps = captured.facts[StepPlan].steps
    steps = tuple(replace(step, variant="reuse" if index else "full") for index, step in enumerate(steps))
    plan = replace(captured.facts[StepPlan], steps=steps, roles={"full": COMPUTES, "reuse": REUSES})
    with writing(tmp_path / "bundle", model="tiny", target="tensorrt") as folder:
        write_plan(folder, captured.facts[ModelSpec], plan, interfaces)
        (folder / "recipe.lock.toml").write_text(Recipe().to_toml())
    bundle = Bundle.open(tmp_path / "bundle")
    single = SingleModel.of(bundle)
    numbers = [replace(GROUP, shape=(1,)), replace(ROW, shape=(1,)), TensorSpec("variant", "i64", (1,))]
    assert single.inputs == (latent, *numbers, TensorSpec("start", "bool", (1,)))
    names = ("cache_0", "cache_0_age1", "cache_0_age2")
    assert [spec.name for spec in single.all_inputs[-3:]] == [f"{name}_in" for name in names]
    assert [spec.name for spec in single.all_outputs] == ["noise_prediction", *(f"{name}_out" for name in names)]
    assert {item.spec.dtype for item in single.cache} == {"f16"}
    steps = host_plan(bundle, single)["steps"]
    assert [steps[0][name] for name in single.numbers] == [0, 0, 0, True]
    assert [steps[1][name] for name in single.numbers] == [0, plan.steps[1].row, 1, False]


def test_the_command_writes_in_one_piece(bundle_of: BundleOf, unquantized: Any, tmp_path: Path) -> None:
    bundle, output = bundle_of(unquantized), tmp_path / "out"
    arguments = ["export", str(bundle.path), "--format", "onnx-single", "-o", str(output)]
    assert [command(arguments), command(arguments), command([*arguments, "--force"])] == [0, 2, 0]
    assert sorted(path.name for path in output.iterdir()) == ["export.json", "model.onnx"]
    (output / "mine.txt").touch()
    assert command([*arguments, "--force"]) == 2
