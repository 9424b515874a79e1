"""Targets: what a program is compiled for, as data. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qcgraph.errors import UsageError, closest


@dataclass(frozen=True)
class Target:
    """What a program is compiled for.

    Attributes:
        name: its name in recipes and on the command line.
        description: one line on what it is.
        opset: the ONNX opset of the exported graphs.
        legalize: the passes that rewrite what the target cannot express, as pipeline text.
        activation: ``asymmetric`` (uint8 codes with a zero point) or ``symmetric`` (int8 codes, zero point 0).
        weight_high: the largest weight code at 8 bits; codes are int8 in ``[-weight_high, weight_high]``.
        emits_onnx: whether a bundle holds an ONNX graph of every variant.
        integer_products: whether ONNX graphs multiply integers and scale the result, which brings biases into ONNX
            Runtime's int8 kernel; else they multiply dequantized values.
        backend: what runs the bundle unless it is told otherwise.
    """

    name: str
    description: str
    opset: int
    legalize: str
    activation: Literal["asymmetric", "symmetric"]
    weight_high: int
    emits_onnx: bool
    integer_products: bool
    backend: str


_TORCH = Target(
    name="torch",
    description="the program as it is, run by PyTorch: the reference, not faster than the model",
    opset=23,
    legalize="",
    activation="asymmetric",
    weight_high=127,
    emits_onnx=False,
    integer_products=False,
    backend="torch",
)

_ONNXRUNTIME_CPU = Target(
    name="onnxruntime-cpu",
    description="ONNX Runtime on the CPU: int8 linear layers, scales selected by timestep group at run time",
    opset=23,  # the first with Attention: fewer nodes than its parts, and a little faster
    legalize="lower-linear",
    activation="asymmetric",
    # CPUs without VNNI add two products of uint8 and int8 in 16 bits, which saturate at 32767. With codes up to 64 the
    # largest sum, 2 * 255 * 64 = 32640, fits: the result is exact on every CPU, for one bit of the weights.
    weight_high=64,
    emits_onnx=True,
    integer_products=True,
    backend="onnxruntime",
)

TARGETS: Mapping[str, Target] = {target.name: target for target in (_TORCH, _ONNXRUNTIME_CPU)}


def target_named(name: str) -> Target:
    """A target by its name.

    Raises:
        UsageError: there is no such target.
    """
    target = TARGETS.get(name)
    if target is None:
        raise UsageError(f"unknown target {name!r}", hint=closest(name, TARGETS))
    return target
