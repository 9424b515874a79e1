"""onnx-float: a target on a runtime that qcgraph has."""

from __future__ import annotations

from dataclasses import replace

from qcgraph.export.targets import target_named

ONNX_FLOAT = replace(
    target_named("onnx"), name="onnx-float", description="portable ONNX at opset 21, in 32 bits", opset=21
)
