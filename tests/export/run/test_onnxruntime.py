"""The ONNX Runtime runner: parity over whole trajectories, requests that interleave, and that it needs no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcgraph.errors import BundleError
from qcgraph.export.onnx.emit import tensor_places
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner, OptimizedGraph
from qcgraph.facts import encode
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.serialize import WEIGHTS
from qcgraph.plan.roles import VariantKind
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Request, sample
from qcgraph.sampling.runner import Call

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.facts import decode
from qcgraph.sampling.loop import sample
from qcgraph.plan.spec import Interface, ModelSpec
from qcgraph.plan.steps import StepPlan
folder = Path(sys.argv[1])
data = json.loads((folder / "data.json").read_text())
interfaces = {name: decode(Interface, value) for name, value in data["interfaces"].items()}
runner = OnnxRuntimeRunner(folder, interfaces, threads=1)
latents = sample(runner, decode(StepPlan, data["plan"]), decode(ModelSpec, data["spec"]), [0, 1], seed=3)
np.save(folder / "latents.npy", latents)
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "onnx", "onnxscript")]
"""


def call(variant: str, given: Mapping[str, Any], state: Any) -> Call:
    """A call of the first step."""
    return Call(variant, VariantKind.COMPUTES if variant == "full" else VariantKind.REUSES, 0, given, state)


def inputs(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "latent": generator.standard_normal((3, 2, 8, 8), dtype=np.float32),
        "timestep": np.full(3, 900, dtype=np.float32),
        "class_label": np.array([0, 4, 5]),
        "group": np.asarray(0),
        "row": np.asarray(0),
    }


@pytest.mark.parametrize("name", ["unquantized", pytest.param("forecasting", marks=pytest.mark.slow)])
def test_trajectories_agree_with_torch(request: pytest.FixtureRequest, name: str) -> None:
    export = request.getfixturevalue(name)
    plan, spec = export.program.facts[StepPlan], export.program.facts[ModelSpec]
    latents = [
        sample(runner, plan, spec, [0, 1, 4], seed=1) for runner in (export.runner(), TorchRunner(export.program))
    ]
    assert np.linalg.norm(latents[0] - latents[1]) <= 1e-5 * np.linalg.norm(latents[1])


def test_interleaved_requests_equal_separate_ones(compiled: Any) -> None:
    plan, spec = compiled.program.facts[StepPlan], compiled.program.facts[ModelSpec]
    runner = compiled.runner()
    latents = [inputs(seed)["latent"] for seed in (1, 2)]
    conditions = Conditions(3, {"class_label": inputs(0)["class_label"]})

    def run(order: list[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
        requests = [Request(runner, plan, spec) for _ in latents]
        return {
            (which, step): requests[which].denoise(step, latents[which], conditions).copy() for which, step in order
        }

    separate = run([(which, step) for which in (0, 1) for step in range(len(plan))])
    interleaved = run([(which, step) for step in range(len(plan)) for which in (0, 1)])
    assert {step.variant for step in plan.steps} == {"full", "reuse"}
    for key, prediction in separate.items():
        np.testing.assert_array_equal(prediction, interleaved[key])


def test_a_cache_is_never_written_to_again(compiled: Any) -> None:
    runner = compiled.runner()
    state: dict[tuple[str, int], Any] = {}
    prediction = runner.run(call("full", inputs(1), state))
    first = state["cache_0", 0]
    kept, values = prediction.copy(), first.numpy().copy()
    runner.run(call("full", inputs(2), state))
    assert state["cache_0", 0] is not first
    np.testing.assert_array_equal(first.numpy(), values)
    np.testing.assert_array_equal(prediction, kept)


def test_reuse_before_compute_is_refused(compiled: Any) -> None:
    with pytest.raises(BundleError, match="variant 'reuse' reuses 'cache_0' before any step computed it\n\nhint: "):
        compiled.runner().run(call("reuse", inputs(1), {}))


def test_unknown_variant_is_refused(compiled: Any) -> None:
    with pytest.raises(BundleError, match="no variant 'ful'\n\nhint: did you mean 'full'"):
        compiled.runner().run(call("ful", inputs(1), {}))


def test_broken_graph_is_refused(compiled: Any, tmp_path: Path) -> None:
    (tmp_path / "full.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"full\.onnx: ONNX Runtime cannot load the graph"):
        OnnxRuntimeRunner(tmp_path, compiled.interfaces).run(call("full", inputs(1), {}))


def test_graphs_are_loaded_when_they_are_run(compiled: Any, tmp_path: Path) -> None:
    shutil.copytree(compiled.folder, tmp_path / "part")
    (tmp_path / "part" / "reuse.onnx").unlink()
    OnnxRuntimeRunner(tmp_path / "part", compiled.interfaces).run(call("full", inputs(1), {}))


def test_runs_where_it_is_moved_and_without_torch(compiled: Any, tmp_path: Path) -> None:
    folder = tmp_path / "else where"
    shutil.copytree(compiled.folder, folder)
    plan, spec = compiled.program.facts[StepPlan], compiled.program.facts[ModelSpec]
    data = {
        "interfaces": {name: encode(interface) for name, interface in compiled.interfaces.items()},
        "plan": encode(plan),
        "spec": encode(spec),
    }
    (folder / "data.json").write_text(json.dumps(data))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = sample(OnnxRuntimeRunner(compiled.folder, compiled.interfaces, 1), plan, spec, [0, 1], seed=3)
    np.testing.assert_array_equal(np.load(folder / "latents.npy"), expected)


@pytest.mark.parametrize("position", [3, 6], ids=["weight scale", "bias"])
def test_constants_take_the_place_of_those_in_the_weights_file(compiled: Any, tmp_path: Path, position: int) -> None:
    """Also where an int8 kernel has taken them in."""
    nodes = OptimizedGraph.of(compiled.folder / "full.onnx").nodes
    name = next(node.inputs[position] for node in nodes if "blocks.1.mlp.fc1.weight_codes_t" in node.inputs)
    folder = Path(shutil.copytree(compiled.folder, tmp_path / "changed"))
    value = compiled.program.constants[name].numpy() * np.float32(1.5) + np.float32(0.25)
    offset, _ = tensor_places(folder / WEIGHTS)[name]
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.seek(offset)
        stream.write(value.tobytes())
    given = OnnxRuntimeRunner(compiled.folder, compiled.interfaces, constants={name: value}).run(
        call("full", inputs(1), {})
    )
    stored = OnnxRuntimeRunner(folder, compiled.interfaces).run(call("full", inputs(1), {}))
    np.testing.assert_array_equal(given, stored)
    assert not np.array_equal(given, compiled.runner().run(call("full", inputs(1), {})))


def test_optimized_graph_counts_ops(compiled: Any) -> None:
    graph = OptimizedGraph.of(compiled.folder / "full.onnx")
    assert graph.count("MatMulIntegerToFloat") == 8
    assert graph.count("DequantizeLinear") == 0
    assert graph.count("Attention") == 2
