"""Run baselines with OpenVINO: float32, and int8 by NNCF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcgraph.benchmark.inputs import read_calibration
from qcgraph.benchmark.onnxruntime_peers import CALIBRATION
from qcgraph.benchmark.workspace import Workspace
from qcgraph.sampling.runner import Array, Call

FLOAT = "openvino.xml"
QUANTIZED = "nncf.xml"


class OpenVinoPeer:
    """Runs one OpenVINO model for every step (see `qcgraph.sampling.runner.Runner`).

    The model is compiled at the first call with each batch size: static shapes made int8 a tenth faster than a dynamic
    batch on a DiT-S/2.
    """

    def __init__(self, path: Path, inputs: tuple[str, ...], threads: int) -> None:
        import openvino

        self._core = openvino.Core()
        self._path = path
        self._inputs = inputs
        self._settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # Without this option OpenVINO computes in bfloat16 if the CPU can: an error of 7 % on a DiT-S/2, which is
            # not float32, and twice the error of int8 at the same speed.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._requests: dict[tuple[int, ...], Any] = {}

    def run(self, call: Call) -> Array:
        """Return the noise prediction, f32[B,C_out,H,W]."""
        values = [call.inputs[name] for name in self._inputs]
        shape = values[0].shape
        if shape not in self._requests:
            model = self._core.read_model(self._path)
            model.reshape({index: list(value.shape) for index, value in enumerate(values)})
            self._requests[shape] = self._core.compile_model(model, "CPU", self._settings).create_infer_request()
        prediction: Array = self._requests[shape].infer(values)[0]
        return prediction


def convert(workspace: Workspace, path: Path) -> None:
    """Convert the model with `openvino.convert_model` from `torch.export`, as OpenVINO's documentation says."""
    import openvino
    import torch

    exported = torch.export.export(
        workspace.positional_module(),
        workspace.example_inputs(),
        dynamic_shapes=workspace.dynamic_batch(),
        strict=False,
    )
    openvino.save_model(openvino.convert_model(exported), path, compress_to_fp16=False)


def quantize(workspace: Workspace, path: Path) -> None:
    """Quantize the converted model with NNCF's settings for transformers, calibrated on real trajectories."""
    import nncf
    import openvino

    model = openvino.Core().read_model(workspace.folder / FLOAT)
    items = read_calibration(workspace.folder / CALIBRATION)
    dataset = nncf.Dataset(items, lambda item: [item[name] for name in workspace.inputs])
    quantized = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(items))
    openvino.save_model(quantized, path, compress_to_fp16=False)


def open_float(workspace: Workspace) -> OpenVinoPeer:
    """Open the converted model."""
    return OpenVinoPeer(workspace.folder / FLOAT, workspace.inputs, workspace.threads)


def open_quantized(workspace: Workspace) -> OpenVinoPeer:
    """Open the model that NNCF quantized."""
    return OpenVinoPeer(workspace.folder / QUANTIZED, workspace.inputs, workspace.threads)
