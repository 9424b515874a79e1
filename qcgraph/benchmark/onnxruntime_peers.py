"""Run baselines with ONNX Runtime: float32, and its own quantizers, dynamic and static."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcgraph.benchmark.inputs import read_calibration
from qcgraph.benchmark.machine import read_machine
from qcgraph.benchmark.workspace import Workspace
from qcgraph.export.run.onnxruntime import load_session, session_options
from qcgraph.plan.spec import PREDICTION_NAME
from qcgraph.sampling.runner import Array, Call

FLOAT = "model.onnx"
CALIBRATION = "calibration.npz"
DYNAMIC = "dynamic.onnx"
STATIC = "static.onnx"

OPSET = 23  # the first opset with Attention, which the graphs of qcgraph use: fewer nodes, and never slower
PRODUCTS = ["MatMul", "Gemm"]  # Attention is not quantized: the quantizer's result cannot be loaded


class OnnxRuntimePeer:
    """Runs one ONNX graph for every step (see `qcgraph.sampling.runner.Runner`)."""

    def __init__(self, path: Path, inputs: tuple[str, ...], threads: int) -> None:
        self._inputs = inputs
        self._session = load_session(path, session_options(threads))

    def run(self, call: Call) -> Array:
        """Return the noise prediction, f32[B,C_out,H,W]."""
        inputs = {name: call.inputs[name] for name in self._inputs}
        prediction: Array = self._session.run([PREDICTION_NAME], inputs)[0]
        return prediction


def export_float(workspace: Workspace, path: Path) -> None:
    """Export the model with `torch.onnx.export` and a dynamic batch, as PyTorch's documentation says."""
    import onnx
    import torch

    program = torch.onnx.export(
        workspace.positional_module(),
        workspace.example_inputs(),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=workspace.dynamic_batch(),
        input_names=list(workspace.inputs),
        output_names=[PREDICTION_NAME],
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=True)  # a graph file alone is limited to 2 GiB
    # The exporter records shapes from before its own optimizer transposed weights; the shape inference of ONNX
    # Runtime's quantizers refuses these shapes.
    proto = onnx.load(str(path), load_external_data=False)
    del proto.graph.value_info[:]
    onnx.save(proto, str(path))


def quantize_dynamically(workspace: Workspace, path: Path) -> None:
    """Quantize every product of activations and weights; each call computes its activation scales."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        workspace.folder / FLOAT,
        path,
        op_types_to_quantize=PRODUCTS,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=read_machine().saturates,
        use_external_data_format=True,
    )


def quantize_statically(workspace: Workspace, path: Path) -> None:
    """Quantize every product of activations and weights, with activation scales from real trajectories.

    Tried on a DiT-S/2: quantizing products of two activations, outputs, or all operators (the default) was no faster,
    and less accurate; preprocessing with ``quant_pre_process`` made no difference.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no annotations
        def __init__(self) -> None:
            self._items = iter(read_calibration(workspace.folder / CALIBRATION))

        def get_next(self) -> Any:
            return next(self._items, None)

    quantize_static(
        workspace.folder / FLOAT,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=PRODUCTS,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=read_machine().saturates,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": PRODUCTS},
    )


def open_float(workspace: Workspace) -> OnnxRuntimePeer:
    """Open the exported model."""
    return OnnxRuntimePeer(workspace.folder / FLOAT, workspace.inputs, workspace.threads)


def open_dynamic(workspace: Workspace) -> OnnxRuntimePeer:
    """Open the dynamically quantized model."""
    return OnnxRuntimePeer(workspace.folder / DYNAMIC, workspace.inputs, workspace.threads)


def open_static(workspace: Workspace) -> OnnxRuntimePeer:
    """Open the statically quantized model."""
    return OnnxRuntimePeer(workspace.folder / STATIC, workspace.inputs, workspace.threads)
