"""Quantized products in the form that ONNX Runtime fuses best: with their bias inside the int8 kernel.

ONNX Runtime turns a MatMul of dequantized operands into the kernel MatMulIntegerToFloat, and leaves the bias outside,
which costs one more pass over the result. The same product can be written as a product of integers times a product of
scales, plus the bias. ONNX Runtime turns this form into the same kernel with the bias in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcgraph.export.onnx.annotate import keep_place

if TYPE_CHECKING:
    from onnxscript import ir


def multiply_integers(model: ir.Model) -> int:
    """Rewrite products of a dequantized activation [...,in] and dequantized weight codes [in,out].

    ::

        MatMul(DequantizeLinear(a, sa, za), DequantizeLinear(b, sb, zb))
        Mul(Cast(MatMulInteger(a, b, za, zb)), Mul(sa, sb))

    Codes of the activation are uint8, for which ONNX Runtime has fast kernels, and their scale is a scalar that is
    selected at run time. The scale of the weight is a constant of one value, or of one value for each output channel. A
    zero point of the weight that is 0 is left out, which saves the kernel a little work. The kernel takes a bias of the
    shape [out], with or without ones before it, so a bias needs no change.

    Args:
        model: the model, which is changed in place; remaining values keep their names.

    Returns:
        The number of rewritten products. A product in any other form is left as it is.
    """
    from onnxscript.optimizer import remove_unused_nodes

    scaled: set[tuple[ir.Value | None, bytes]] = set()
    for product in [node for node in model.graph if node.op_type == "MatMul"]:
        activation, weight = (_dequantized(value) for value in product.inputs)
        if activation is None or weight is None or not _is_selected(activation) or not _is_by_output(weight):
            continue
        # ONNX Runtime computes equal products of scales once, and then does not recognize the second user of the
        # result. Weights of zeros have equal scales.
        scales = (activation.inputs[1], _constant(weight.inputs[1]).tobytes())
        if scales not in scaled:
            scaled.add(scales)
            _rewrite(model.graph, product, activation, weight)
    if scaled:
        remove_unused_nodes(model)
    return len(scaled)


def _rewrite(graph: ir.Graph, product: ir.Node, activation: ir.Node, weight: ir.Node) -> None:
    from onnxscript import ir

    (codes, scale, zero), (weight_codes, weight_scale, weight_zero) = activation.inputs, weight.inputs
    zeros = (zero, weight_zero) if np.any(_constant(weight_zero)) else (zero,)
    integers = ir.node("MatMulInteger", [codes, weight_codes, *zeros])
    cast = ir.node("Cast", integers.outputs, {"to": ir.DataType.FLOAT})
    scales = ir.node("Mul", [scale, weight_scale])  # the kernel takes the first scale as the activation's
    result = ir.node("Mul", [cast.outputs[0], scales.outputs[0]])
    made = [integers, cast, scales, result]
    keep_place(product, *made)
    ir.convenience.replace_nodes_and_values(graph, product, [product], made, product.outputs, result.outputs)


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    """Return the dequantize that computes a value, if it has a zero point."""
    maker = value.producer() if value is not None else None
    if maker is None or maker.op_type != "DequantizeLinear" or len(maker.inputs) != 3:
        return None
    return maker


def _is_selected(activation: ir.Node) -> bool:
    """Tell whether the codes are uint8, and their scale is one number that is unknown before run time.

    ONNX Runtime computes a product of known scales when it loads the graph, and then does not recognize the product of
    integers.
    """
    from onnxscript import ir

    codes, scale = activation.inputs[:2]
    is_uint8 = codes is not None and codes.dtype == ir.DataType.UINT8
    return is_uint8 and _rank(scale) == 0 and _constant(scale).size == 0


def _is_by_output(weight: ir.Node) -> bool:
    """Tell whether the codes are a matrix [in,out] with known parameters, of one value or of one for each output."""
    codes, scale, zero_point = weight.inputs
    if _rank(codes) != 2 or _constant(scale).size == 0 or _constant(zero_point).size == 0:
        return False
    axis = weight.attributes.get("axis")
    return _rank(scale) == 0 or axis is None or axis.as_int() in (1, -1)


def _rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def _constant(value: ir.Value | None) -> npt.NDArray[Any]:
    """Return the known content of a value; empty where the value is computed."""
    from onnxscript import ir

    known = ir.convenience.get_const_tensor(value) if value is not None else None
    return known.numpy() if known is not None else np.empty(0)
