"""The runner of engines, on ONNX Runtime bound to fixed addresses: what it does on a GPU but for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from qcgraph.bundle.engines import Batch
from qcgraph.errors import BundleError, UsageError
from qcgraph.export.run import engines as run_engines
from qcgraph.export.run.engines import EngineRunner
from qcgraph.export.run.open import samples_at_once
from qcgraph.ir.graph import DTYPES
from qcgraph.plan.roles import TensorRole, VariantKind
from qcgraph.plan.spec import Interface, ModelSpec, TensorSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.conditions import of_labels
from qcgraph.sampling.denoiser import Denoiser
from qcgraph.sampling.loop import Request, sample
from qcgraph.sampling.runner import Call

NUMPY = {torch.float32: np.float32, torch.int64: np.int64}


@dataclass
class BoundCall:
    """Something that runs on the tensors it was bound to."""

    tensors: Mapping[str, torch.Tensor]
    work: Callable[[], None]
    runs: int = 0

    def run(self) -> None:
        self.runs += 1
        self.work()


@dataclass
class GraphEngines:
    """The exported graphs of a folder, run by ONNX Runtime in place."""

    folder: Path
    interfaces: Mapping[str, Interface]
    settled: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self._sessions = {
            name: onnxruntime.InferenceSession(self.folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            for name in self.interfaces
        }

    def inputs(self, variant: str) -> frozenset[str]:
        return frozenset(item.name for item in self._sessions[variant].get_inputs())

    def batch(self, variant: str) -> Batch:
        return Batch(minimum=1, optimum=2, maximum=8)

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def settle(self) -> None:
        self.settled += 1

    def bind(self, variant: str, tensors: Mapping[str, torch.Tensor]) -> BoundCall:
        session, inputs = self._sessions[variant], self.inputs(variant)
        binding = session.io_binding()
        for name, tensor in tensors.items():
            bind = binding.bind_input if name in inputs else binding.bind_output
            bind(name, "cpu", 0, NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        return BoundCall(tensors, lambda: session.run_with_iobinding(binding))


def call(variant: str, given: Mapping[str, Any], state: Any) -> Call:
    """A call of the first step."""
    return Call(variant, VariantKind.COMPUTES if variant == "full" else VariantKind.REUSES, 0, given, state)


def engine_runner(export: Any) -> EngineRunner:
    return EngineRunner(GraphEngines(export.folder, export.interfaces), export.interfaces)


def inputs(seed: int, batch: int = 2) -> dict[str, np.ndarray]:
    latent = np.random.default_rng(seed).standard_normal((batch, 2, 8, 8), dtype=np.float32)
    timestep, labels = np.full(batch, 900, dtype=np.float32), np.arange(batch) % 5
    return {"latent": latent, "timestep": timestep, "class_label": labels, "group": np.asarray(0), "row": np.asarray(0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unquantized", pytest.param("forecasting", marks=pytest.mark.slow)])
def test_trajectories_are_those_of_the_graphs(request: pytest.FixtureRequest, name: str) -> None:
    export = request.getfixturevalue(name)
    plan, spec = export.program.facts[StepPlan], export.program.facts[ModelSpec]
    runner = engine_runner(export)
    latents = [sample(each, plan, spec, [0, 1, 4], seed=1) for each in (export.runner(), runner)]
    np.testing.assert_allclose(latents[1], latents[0], rtol=1e-5, atol=1e-5)
    count = len(runner.calls)
    sample(runner, plan, spec, [3, 2, 1], seed=2)
    assert len(runner.calls) == count  # a trajectory after another is at the same addresses
    assert max(call.runs for call in runner.calls if isinstance(call, BoundCall)) > 2


@pytest.mark.parametrize("name", ["unquantized", pytest.param("forecasting", marks=pytest.mark.slow)])
def test_requests_that_interleave_stay_apart(request: pytest.FixtureRequest, name: str) -> None:
    export = request.getfixturevalue(name)
    plan, spec, runner = export.program.facts[StepPlan], export.program.facts[ModelSpec], engine_runner(export)
    latents, conditions = [inputs(seed)["latent"] for seed in (1, 2)], of_labels([0, 3], spec)

    def run(order: list[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
        requests = [Request(runner, plan, spec) for _ in latents]
        return {(which, step): requests[which].denoise(step, latents[which], conditions) for which, step in order}

    separate = run([(which, step) for which in (0, 1) for step in range(len(plan))])
    interleaved = run([(which, step) for step in range(len(plan)) for which in (0, 1)])
    for key, prediction in separate.items():
        np.testing.assert_array_equal(prediction, interleaved[key])


def test_threads_take_turns(unquantized: Any) -> None:
    plan, spec = unquantized.program.facts[StepPlan], unquantized.program.facts[ModelSpec]
    runner, conditions = engine_runner(unquantized), of_labels([0, 3], spec)

    def walk(seed: int) -> list[np.ndarray]:
        request, latent = Request(runner, plan, spec), inputs(seed)["latent"]
        return [request.denoise(step, latent, conditions) for step in range(len(plan))]

    alone = [walk(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for found, expected in zip(pool.map(walk, range(6)), alone, strict=True):
            assert all(map(np.array_equal, found, expected))


def test_one_buffer_is_enough_for_one_request(unquantized: Any) -> None:
    runner = engine_runner(unquantized)
    state: dict[tuple[str, int], Any] = {}
    addresses = set()
    for seed in range(3):
        runner.run(call("full", inputs(seed), state))
        addresses.add(state["cache_0", 0].tensor.data_ptr())
        runner.run(call("reuse", inputs(seed), state))
    assert len(addresses) == 1
    assert len(runner.calls) == 2


def test_a_cache_that_is_held_is_not_written_to(unquantized: Any) -> None:
    runner = engine_runner(unquantized)
    state: dict[tuple[str, int], Any] = {}
    prediction = runner.run(call("full", inputs(1), state))
    kept = dict(state)
    values, before = kept["cache_0", 0].tensor.clone(), prediction.copy()
    runner.run(call("full", inputs(2), state))
    assert torch.equal(kept["cache_0", 0].tensor, values)
    np.testing.assert_array_equal(prediction, before)
    np.testing.assert_array_equal(
        runner.run(call("reuse", inputs(3), kept)), engine_runner(unquantized).run(call("reuse", inputs(3), kept))
    )


def test_tensors_go_in_and_out(unquantized: Any) -> None:
    runner = engine_runner(unquantized)
    arrays = inputs(1)
    expected = runner.run(call("full", arrays, {}))
    tensors = arrays | {"latent": torch.from_numpy(arrays["latent"]).double(), "row": torch.tensor(0)}
    result = runner.run_tensors(call("full", tensors, {}))
    assert result.dtype == torch.float32
    np.testing.assert_array_equal(result.numpy(), expected)
    again = runner.run_tensors(call("full", inputs(2), {}))
    assert result.data_ptr() != again.data_ptr()


def test_what_is_refused(unquantized: Any) -> None:
    runner = engine_runner(unquantized)
    with pytest.raises(BundleError, match="no variant 'ful'\n\nhint: did you mean 'full'"):
        runner.run(call("ful", inputs(1), {}))
    with pytest.raises(BundleError, match="variant 'reuse' reuses 'cache_0' before any step computed it"):
        runner.run(call("reuse", inputs(1), {}))
    with pytest.raises(UsageError, match="the engine of full takes batches of 1 to 8, not 9") as raised:
        runner.run(call("full", inputs(1, 9), {}))
    assert "qcgraph build --batch MIN,OPT,MAX" in str(raised.value.hint)
    with pytest.raises(UsageError, match=r"timestep has shape \(1,\)\n\nhint: it takes \(2,\)"):
        runner.run(call("full", inputs(1) | {"timestep": np.zeros(1, np.float32)}, {}))


def test_a_call_that_fails_is_repeated(unquantized: Any) -> None:
    runner = engine_runner(unquantized)
    state: dict[tuple[str, int], Any] = {}
    expected = runner.run(call("full", inputs(1), state))
    with pytest.raises(UsageError, match="timestep has shape"):
        runner.run(call("full", inputs(2) | {"timestep": np.zeros(1, np.float32)}, state))
    np.testing.assert_array_equal(runner.run(call("full", inputs(1), state)), expected)


def test_calls_are_forgotten_the_oldest_first(unquantized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_engines, "MOST_CALLS", 2)
    engines = GraphEngines(unquantized.folder, unquantized.interfaces)
    runner = EngineRunner(engines, unquantized.interfaces)
    for batch in (1, 2, 1, 3):
        runner.run(call("full", inputs(0, batch), {}))
    assert engines.settled == 1
    batches = [len(call.tensors["latent"]) for call in runner.calls if isinstance(call, BoundCall)]
    assert batches == [1, 3]


def test_samples_together_are_as_many_as_engines_take(unquantized: Any) -> None:
    plan = unquantized.program.facts[StepPlan]
    assert samples_at_once(engine_runner(unquantized), plan) == 4  # both halves of guidance
    assert samples_at_once(unquantized.runner(), plan) == 64


@dataclass
class DoublingEngines:
    """Engines with a cache in half precision: full doubles the latent, reuse gives that back."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def inputs(self, variant: str) -> frozenset[str]:
        return frozenset({"latent"} if variant == "full" else {"cache", "modulation"})

    def batch(self, variant: str) -> Batch:
        return Batch(minimum=1, optimum=1, maximum=2)

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def settle(self) -> None:
        pass

    def bind(self, variant: str, tensors: Mapping[str, torch.Tensor]) -> BoundCall:
        def full() -> None:
            torch.mul(tensors["latent"], 2, out=tensors["cache"])
            tensors["noise_prediction"].zero_()

        def reuse() -> None:
            torch.mul(tensors["cache"], tensors["modulation"], out=tensors["noise_prediction"])

        return BoundCall(tensors, full if variant == "full" else reuse)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_caches_and_modulation_have_the_type_of_the_plan(dtype: str) -> None:
    latent, prediction = (
        TensorSpec("latent", "f32", ("B", 3), TensorRole.STATE),
        TensorSpec("noise_prediction", dtype, ("B", 3), TensorRole.PREDICTION),
    )
    cache, modulation = (
        TensorSpec("cache", dtype, ("B", 3), TensorRole.CACHE, "cache"),
        TensorSpec("modulation", dtype, ("B", 3), TensorRole.MODULATION),
    )
    interfaces = {
        "full": Interface((latent,), (prediction, cache)),
        "reuse": Interface((latent, cache, modulation), (prediction,)),
    }
    runner, state = EngineRunner(DoublingEngines(), interfaces), {}
    runner.run(call("full", {"latent": np.full((1, 3), 1.5, np.float32)}, state))
    assert state["cache", 0].tensor.dtype == DTYPES[dtype]
    given = {"latent": np.zeros((1, 3), np.float32), "modulation": np.full((1, 3), 0.5, np.float32)}
    result = runner.run(call("reuse", given, state))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.full((1, 3), 1.5))


def test_a_denoiser_passes_tensors_on(unquantized: Any) -> None:
    plan, spec = unquantized.program.facts[StepPlan], unquantized.program.facts[ModelSpec]
    ours, theirs = (Denoiser(runner, plan, spec) for runner in (engine_runner(unquantized), unquantized.runner()))
    assert ours.device == torch.device("cpu")
    latent, labels = torch.from_numpy(inputs(4)["latent"]), torch.tensor([0, 1])
    for timestep in plan.timesteps:
        predictions = [each(latent, torch.tensor(timestep), labels).sample for each in (ours, theirs)]
        torch.testing.assert_close(predictions[0], predictions[1], rtol=1e-5, atol=1e-5)
    with_numpy = ours(latent.numpy(), plan.timesteps[0], [0, 1]).sample
    assert isinstance(with_numpy, np.ndarray)
