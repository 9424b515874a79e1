"""Checks that a file is valid ONNX, and the ONNX types of tensors of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcgraph.errors import BundleError
from qcgraph.files.folder import AGAIN, name_problem, path_problem

if TYPE_CHECKING:
    from onnxscript import ir


def problem_of(path: Path) -> str | None:
    """Return the error that the full check of onnx finds in a graph file, or None for a valid one."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error)
    return None


def load_graph(path: Path) -> ir.Model:
    """Read a graph file; its weights stay in the files beside it until they are read.

    Raises:
        BundleError: the file is not an ONNX graph, or takes weights from outside its folder.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnxscript import ir

    try:
        model = ir.load(path)
        outside = _outside(model, path.parent)
    except (DecodeError, ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(f"is no graph that can be read: {reason}", where=str(path), hint=AGAIN) from error
    if outside:
        raise BundleError(f"takes weights from {outside}", where=str(path), hint=AGAIN)
    return model


def _outside(model: ir.Model, folder: Path) -> str:
    """Return a file outside its folder that a graph takes weights from, with the reason; empty without one."""
    from onnxscript import ir

    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    for node in model.graph.all_nodes():
        tensors += [item.value for item in node.attributes.values() if item.type == ir.AttributeType.TENSOR]
    for name in {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}:
        if problem := name_problem(name) or path_problem(folder, name):
            return f"{name!r}, which {problem}"
    return ""


def tensor_type(dtype: str) -> ir.TensorType:
    """Return the ONNX type of tensors of a type that `qcgraph.plan.spec.TensorSpec` names."""
    from onnxscript import ir

    types = {"bf16": ir.DataType.BFLOAT16, "bool": ir.DataType.BOOL, "f16": ir.DataType.FLOAT16}
    types |= {"f32": ir.DataType.FLOAT, "i64": ir.DataType.INT64}
    return ir.TensorType(types[dtype])
