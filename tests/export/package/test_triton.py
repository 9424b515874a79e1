"""A model of Triton: its configuration in Triton's own schema, and its state, kept for it as Triton would."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format

from qcgraph.bundle import Bundle
from qcgraph.cli import run as command
from qcgraph.export.run.open import runner_of
from qcgraph.sampling.loop import TakenStep, sample
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Call

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "serving.md"
TYPES = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_BOOL": np.bool_}


def schema() -> Any:
    """Triton's ``model_config.proto`` as Python; the package around it would ask for gRPC."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.get(spec.name) or importlib.util.module_from_spec(spec)
    if spec.name not in sys.modules:
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return module


@dataclass
class Server:
    """What Triton does with the requests of a sequence; it runs no model but this.

    As documented under "Implicit State Management": a starting request gets the initial state, with 1 for every
    variable dimension, each other one what the request before it gave; START is sent by the server. As its sources
    have it: requests are refused unless their inputs are those of the configuration, in type and shape.
    """

    folder: Path
    sequences: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.types = schema().DataType
        self.config = text_format.Parse((self.folder / "config.pbtxt").read_text(), schema().ModelConfig())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        path = self.folder / "1" / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def infer(self, inputs: Mapping[str, np.ndarray], sequence: int, *, start: bool, end: bool) -> np.ndarray:
        batching = self.config.sequence_batching
        assert set(inputs) == {item.name for item in self.config.input}
        for item in self.config.input:
            self.check(inputs[item.name], item)
        assert start == (sequence not in self.sequences)
        if start:
            self.sequences[sequence] = {item.input_name: self.initial(item) for item in batching.state}
        state = self.sequences[sequence]
        controls = {item.name: np.array([start]) for item in batching.control_input}
        names = ["noise_prediction", *(item.output_name for item in batching.state)]
        prediction, *given = self.session.run(names, {**inputs, **controls, **state})
        for item, value in zip(batching.state, given, strict=True):
            self.check(value, item)
            state[item.input_name] = value
        if end:
            del self.sequences[sequence]
        return prediction

    def initial(self, item: Any) -> np.ndarray:
        (start,) = item.initial_state
        assert start.zero_data
        assert list(start.dims) == [max(dim, 1) for dim in item.dims]
        return np.zeros(start.dims, TYPES[self.types.Name(start.data_type)])

    def check(self, value: np.ndarray, item: Any) -> None:
        assert value.dtype == TYPES[self.types.Name(item.data_type)]
        assert len(value.shape) == len(item.dims) > 0
        assert all(dim in (-1, size) for dim, size in zip(item.dims, value.shape, strict=True))


class Client:
    """A `qcgraph.sampling.runner.Runner` that sends a trajectory's steps to the server, and keeps nothing itself."""

    def __init__(self, server: Server, bundle: Bundle, sequence: int) -> None:
        self.server, self.bundle, self.sequence = server, bundle, sequence

    def run(self, call: Call) -> Any:
        values = {**call.inputs, "variant": self.bundle.plan.variants.index(call.variant)}
        sent = {item.name: values[item.name] for item in self.server.config.input}
        sent = {name: np.atleast_1d(np.asarray(value)) for name, value in sent.items()}
        ends = {"start": call.index == 0, "end": call.index == len(self.bundle.plan) - 1}
        return self.server.infer(sent, self.sequence, **ends)


@pytest.fixture
def served(request: pytest.FixtureRequest, bundle_of: Callable[[Any], Bundle], tmp_path: Path) -> tuple[Server, Bundle]:
    """A bundle with groups and a cache, exported by the command."""
    bundle, folder = bundle_of(request.getfixturevalue(getattr(request, "param", "compiled"))), tmp_path / "m" / "tiny"
    assert command(["export", str(bundle.path), "--format", "triton", "-o", str(folder)]) == 0
    return Server(folder), bundle


def test_the_configuration_names_what_the_model_has(served: tuple[Server, Bundle]) -> None:
    server, _ = served
    config, batching = server.config, server.config.sequence_batching
    assert (config.backend, config.max_batch_size, config.name) == ("onnxruntime", 0, "")
    inputs = {item.name: item for item in server.session.get_inputs()}
    assert set(inputs) == {
        *(item.name for item in config.input),
        *(item.name for item in batching.control_input),
        *(item.input_name for item in batching.state),
    }
    outputs = {item.name for item in server.session.get_outputs()}
    assert outputs == {"noise_prediction", *(item.output_name for item in batching.state)}
    kinds = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)"}
    for item in config.input:
        assert [dim if isinstance(dim, int) else -1 for dim in inputs[item.name].shape] == list(item.dims)
        assert inputs[item.name].type == kinds[server.types.Name(item.data_type)]
    # Else Triton would take the first dimension of all tensors for its own batch.
    assert any(item.dims[0] != -1 for item in config.input)
    assert batching.state


@pytest.mark.parametrize("served", ["compiled", pytest.param("forecasting", marks=pytest.mark.slow)], indirect=True)
def test_two_sequences_in_turn_draw_the_images_of_the_bundle(served: tuple[Server, Bundle]) -> None:
    server, bundle = served
    labels = [[0, 4], [1]]
    expected = [sample(runner_of(bundle), bundle.plan, bundle.spec, given, seed=5) for given in labels]
    # The second trajectory runs in the middle of the first; then a third has the number of the first.
    drawn: dict[int, np.ndarray] = {}

    def interrupt(taken: TakenStep) -> None:
        if taken.index == 4:
            drawn[1] = sample(Client(server, bundle, 12), bundle.plan, bundle.spec, labels[1], seed=5)

    for number in (0, 2):
        drawn[number] = sample(
            Client(server, bundle, 7), bundle.plan, bundle.spec, labels[0], seed=5, observe=interrupt
        )
    for number, latents in drawn.items():
        reference = expected[number % 2]
        np.testing.assert_allclose(latents, reference, rtol=0, atol=1e-5 * np.abs(reference).max())
    assert server.sequences == {}


def test_the_client_of_the_guide_draws_them_too(served: tuple[Server, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's own text, with a package of gRPC that passes its calls on to the server above."""
    server, bundle = served

    class InferInput:
        def __init__(self, name: str, shape: Any, kind: str) -> None:
            self.name, self.kind = name, kind

        def set_data_from_numpy(self, value: np.ndarray) -> None:
            self.value = value

    class InferenceServerClient:
        def __init__(self, address: str) -> None:
            pass

        def get_model_config(self, name: str, *, as_json: bool) -> Any:
            parameters = {key: {"string_value": value.string_value} for key, value in server.config.parameters.items()}
            return {"config": {"parameters": parameters}}

        def infer(self, name: str, inputs: Any, *, sequence_id: int, sequence_start: bool, sequence_end: bool) -> Any:
            values = {item.name: item.value for item in inputs}
            prediction = server.infer(values, sequence_id, start=sequence_start, end=sequence_end)
            result = ModuleType("result")
            result.as_numpy = lambda name: prediction  # type: ignore[attr-defined]
            return result

    package = ModuleType("tritonclient.grpc")
    package.__dict__.update(InferInput=InferInput, InferenceServerClient=InferenceServerClient)
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", package)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    (text,) = (block for block in blocks if "tritonclient" in block)
    # The plan's classes and qcgraph's noise, for the same images.
    text = text.replace("labels = np.array([3, 7])", "")
    names: dict[str, Any] = {}
    exec(compile(text.rpartition("latents = ")[0], GUIDE.name, "exec"), names)
    noise = Noise(5, range(2), bundle.spec.latent_shape)

    class Generator:
        def standard_normal(self, shape: Any, dtype: Any = None) -> np.ndarray:
            return noise.initial() if dtype else np.zeros(shape)

    latents = names["draw"](np.array([0, 4]), 1, Generator())
    expected = sample(runner_of(bundle), bundle.plan, bundle.spec, [0, 4], seed=5)
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
