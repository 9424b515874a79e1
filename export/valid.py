"""Whether a file is valid ONNX, and the ONNX type of a tensor of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxscript import ir


def problem_of(path: Path) -> str | None:
    """What the full check of onnx says against a graph file; None where it is valid."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error)
    return None


def tensor_type(dtype: str) -> ir.TensorType:
    """The ONNX type of tensors of a type as `qcgraph.spec.TensorSpec` names it."""
    from onnxscript import ir

    types = {"bf16": ir.DataType.BFLOAT16, "bool": ir.DataType.BOOL, "f16": ir.DataType.FLOAT16}
    types |= {"f32": ir.DataType.FLOAT, "i64": ir.DataType.INT64}
    return ir.TensorType(types[dtype])
