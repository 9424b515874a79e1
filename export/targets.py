"""Targets as data: the forms of graphs and quantization, and the runtime, that a program is compiled for. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qcgraph.bundle import Bundle
from qcgraph.errors import BundleError, UsageError, closest
from qcgraph.extensions import Extensions
from qcgraph.facts import decode
from qcgraph.files.folder import AGAIN

LARGEST_UINT8 = 2**8 - 1
LARGEST_INT16 = 2**15 - 1


@dataclass(frozen=True)
class Target:
    """The form of the graphs, the form of quantization, and the runtime that a program is compiled for.

    Attributes:
        name: the target's name in recipes and on the command line.
        description: a description in one line.
        opset: the ONNX opset of the exported graphs.
        legalize: the passes that rewrite operators which the target cannot express, as pipeline text.
        activation: ``asymmetric`` (uint8 codes with a zero point) or ``symmetric`` (int8 codes, zero point 0).
        emits_onnx: whether a bundle holds an ONNX graph of every variant.
        constant_scales: whether the scales of quantizers must be constants. Activations then have neither two regions
            nor bit widths that differ between timestep groups.
        integer_products: whether ONNX graphs multiply integers and scale the result, which brings biases into ONNX
            Runtime's int8 kernel; else they multiply dequantized values.
        heads_in_place: whether attention takes its heads at the place where the projection puts them, without
            transposes. ONNX Runtime is faster so; TensorRT-RTX then splits the weight of q, k and v, and multiplies in
            floating point.
        quantizers_apart: whether every product has its own quantizer. ONNX Runtime makes no integer kernels where
            several products share an int8 activation; TensorRT merges such products.
        multiplies_float8: whether the target runs products of 8-bit floating point.
        precision: the default type of values that are not quantized: ``float32``, or ``auto`` where 16 bits are faster.
        runtime: the name of its runtime (see `qcgraph.export.run.runtimes`).
        stand_in: the name of the runtime that checks, gates and measurements use by default; empty where it is the
            target's own. Engines are built apart from a bundle, and need their GPU.
        is_portable: whether its graphs may hold operators of ONNX alone, up to the opset.
        pair_high: the largest magnitude of the sum of two int8 codes that kernels multiply by neighbouring activations
            and add in 16 bits; None where they add in 32 bits, or sessions can be told to.
    """

    name: str
    description: str
    opset: int
    legalize: str
    activation: Literal["asymmetric", "symmetric"]
    emits_onnx: bool
    constant_scales: bool
    integer_products: bool
    heads_in_place: bool
    quantizers_apart: bool
    multiplies_float8: bool
    precision: Literal["float32", "auto"]
    runtime: str
    stand_in: str = ""
    is_portable: bool = False
    pair_high: int | None = None

    @property
    def forms(self) -> dict[str, bool]:
        """The options of `qcgraph.export.onnx.emit.emit_onnx` for this target."""
        return {
            "integer_products": self.integer_products,
            "heads_in_place": self.heads_in_place,
            "quantizers_apart": self.quantizers_apart,
        }

    @property
    def may_saturate(self) -> bool:
        """Whether the sum of two products of codes may exceed 16 bits on CPUs without VNNI.

        ONNX Runtime multiplies int8 activations as uint8.
        """
        return self.pair_high is None or LARGEST_UINT8 * self.pair_high > LARGEST_INT16

    @property
    def product_high(self) -> int | None:
        """The largest int8 code of a product whose operands are both made at run time; None for all codes of 8 bits."""
        return None if self.pair_high is None else self.pair_high // 2


_TORCH = Target(
    name="torch",
    description="the program as it is, run by PyTorch: the reference, not faster than the model",
    opset=23,
    legalize="",
    activation="asymmetric",
    emits_onnx=False,
    constant_scales=False,
    integer_products=False,
    heads_in_place=False,
    quantizers_apart=False,
    multiplies_float8=True,
    precision="float32",
    runtime="torch",
)

_ONNXRUNTIME_CPU = Target(
    name="onnxruntime-cpu",
    description="ONNX Runtime on the CPU: int8 linear layers, scales selected by timestep group at run time",
    opset=23,  # the first opset with Attention: fewer nodes than its parts, and a little faster
    legalize="lower-linear",
    activation="asymmetric",
    # CPUs without VNNI add two products of uint8 and int8 in 16 bits, those of the inputs 2k and 2k + 1, which saturate
    # at 32767. Where two codes are 128 together, the largest sum is 255 * 128 = 32640: exact on every CPU.
    pair_high=128,
    emits_onnx=True,
    constant_scales=False,
    integer_products=True,
    heads_in_place=True,
    quantizers_apart=False,
    multiplies_float8=False,
    precision="float32",
    runtime="onnxruntime",
)

_ONNX = Target(
    name="onnx",
    description="portable ONNX: Q/DQ with constant scales, symmetric int8, opset 23",
    opset=23,
    legalize="lower-linear,reference-scales",
    activation="symmetric",
    emits_onnx=True,
    constant_scales=True,
    integer_products=False,
    heads_in_place=False,
    quantizers_apart=True,
    multiplies_float8=False,  # ONNX Runtime takes float8 for int8 in float32 graphs, and then refuses them
    precision="float32",
    runtime="onnxruntime",
    is_portable=True,
)

_ONNX_OPSET21 = replace(
    _ONNX,
    name="onnx-opset21",
    description="portable ONNX for older consumers: as onnx, without the Attention operator, opset 21",
    opset=21,
)

_TENSORRT = replace(
    _ONNX,
    name="tensorrt",
    description="TensorRT, strongly typed: Q/DQ with constant scales, symmetric int8, the rest in 16 bits",
    quantizers_apart=False,
    multiplies_float8=True,
    precision="auto",
    runtime="tensorrt",
    is_portable=False,
    stand_in="onnxruntime",  # graphs are checked by running them on the CPU
)

_TENSORRT_RTX = replace(
    _TENSORRT,
    name="tensorrt-rtx",
    description="TensorRT-RTX, strongly typed: Q/DQ with constant scales, symmetric int8, the rest in 16 bits",
    runtime="tensorrt-rtx",
)

TARGETS: Mapping[str, Target] = {
    target.name: target for target in (_TORCH, _ONNXRUNTIME_CPU, _ONNX, _ONNX_OPSET21, _TENSORRT, _TENSORRT_RTX)
}


def _problem_of(name: str, found: Any) -> str:
    if not isinstance(found, Target):
        return f"is a {type(found).__name__}, not a qcgraph.export.targets.Target"
    return "" if found.name == name else f"is called {found.name!r}"


EXTENSIONS = Extensions("qcgraph.targets", "target", lambda: TARGETS, _problem_of)


def target_named(name: str) -> Target:
    """Return a target by its name, from qcgraph or another distribution.

    Raises:
        UsageError: there is no such target, or it is broken.
    """
    target = TARGETS.get(name) or EXTENSIONS.load(name)
    if target is None:
        raise UsageError(f"unknown target {name!r}", hint=closest(name, [*TARGETS, *EXTENSIONS.offers()]))
    return target


def record_of(target: Target) -> dict[str, Any] | None:
    """Return a target of another distribution as data for a bundle; None for one of qcgraph's own."""
    if target.name in TARGETS:
        return None
    return {name: value for name, value in asdict(target).items() if value is not None}


def target_of(bundle: Bundle) -> Target:
    """Return the target of a bundle; a target of another distribution is read from the bundle, not imported.

    Raises:
        UsageError: the bundle names a target that is not qcgraph's, and holds no data of it.
        BundleError: this data is not a target.
    """
    name, record = bundle.manifest.target, bundle.manifest.target_record
    if name in TARGETS:
        return TARGETS[name]
    if record is None:
        raise UsageError(f"unknown target {name!r}", where=str(bundle.path), hint=closest(name, TARGETS))
    try:
        return decode(Target, record)
    except ValueError as error:  # raised by pydantic
        raise BundleError("holds a target that cannot be read", where=str(bundle.path), hint=AGAIN) from error
