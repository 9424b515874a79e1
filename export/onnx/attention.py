"""Attention in the form that ONNX Runtime runs: heads stay where the projection puts them, and masks have all axes.

Models split the projected values into heads and transpose them to [B,H,N,D] before the product, and back after it.
ONNX's Attention (opset 23) also takes [B,N,H*D] and a number of heads, which needs no transpose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcgraph.export.onnx.annotate import keep_place

if TYPE_CHECKING:
    from onnxscript import ir

TO_HEADS = (2, 0, 3, 1, 4)  # [B,N,3,H,D] -> [3,B,H,N,D]
FROM_HEADS = (0, 2, 1, 3)  # [B,H,N,D] -> [B,N,H,D]
PARTS = 3  # query, key and value, in this order


def keep_heads_in_place(model: ir.Model) -> int:
    """Rewrite every Attention between such transposes to one on parts of the packed projection.

    Args:
        model: the model, which is changed in place; remaining values keep their names.

    Returns:
        The number of rewritten ones. An Attention in any other form is left as it is.
    """
    from onnxscript.optimizer import remove_unused_nodes

    attentions = [node for node in model.graph if node.op_type == "Attention" and len(node.inputs) == PARTS]
    count = sum(_rewrite(model.graph, node) for node in attentions)
    if count:
        remove_unused_nodes(model)
    return count


def expand_masks(model: ir.Model) -> int:
    """Give the masks of every Attention the axes of queries and keys, and a rank that the operator takes.

    PyTorch broadcasts masks of any shape to [B,H,Q,L]; the operator takes ranks 2 to 4, and ONNX Runtime's kernel does
    not broadcast the axis of queries. Masks of rank 2 that have both axes are left as they are.

    Args:
        model: the model, which is changed in place.

    Returns:
        The number of expanded masks.
    """
    return sum(_expand_mask(model.graph, node) for node in list(model.graph) if node.op_type == "Attention")


def _expand_mask(graph: ir.Graph, attention: ir.Node) -> bool:
    from onnxscript import ir

    given = [*attention.inputs, None]  # the mask is optional
    query, key, mask = given[0], given[1], given[3]
    shapes = [value.shape if value is not None else None for value in (query, key, mask)]
    if any(shape is None for shape in shapes):
        return False
    (query_shape, key_shape, mask_shape) = (list(shape) for shape in shapes if shape is not None)
    if len(query_shape) != 4:
        return False
    wanted = [query_shape[2], key_shape[2]]
    if len(mask_shape) in (2, 4) and mask_shape[-2:] == wanted:
        return False
    if not all(isinstance(size, int) for size in wanted):
        return False
    lengths = ir.Value(
        name=f"{attention.name}_lengths", const_value=ir.tensor([1, 1, *wanted], dtype=ir.DataType.INT64)
    )
    expand = ir.node("Expand", [mask, lengths], name=f"{attention.name}_mask")
    expand.outputs[0].name = expand.name
    keep_place(attention, expand)
    graph.register_initializer(lengths)
    graph.insert_before(attention, expand)
    attention.replace_input_with(3, expand.outputs[0])
    return True


def _rewrite(graph: ir.Graph, attention: ir.Node) -> bool:
    from onnxscript import ir

    unpacked, last = _unpacked(attention), _flattening(attention)
    if unpacked is None or last is None:
        return False
    projection, heads = unpacked
    split = ir.node("Split", [projection], {"axis": -1, "num_outputs": PARTS}, num_outputs=PARTS)
    merged = ir.node("Attention", split.outputs, {"q_num_heads": heads, "kv_num_heads": heads})
    merged.attributes.update(attention.attributes)
    keep_place(attention, split, merged)
    ir.convenience.replace_nodes_and_values(
        graph, last, [last], [split, merged], [last.outputs[0]], [merged.outputs[0]]
    )
    return True


def _unpacked(attention: ir.Node) -> tuple[ir.Value, int] | None:
    """Return the packed projection [B,N,3*H*D] whose parts enter an Attention, and the number of heads."""
    parts = [_part(value) for value in attention.inputs]
    transposes = {part[0] for part in parts if part is not None}
    if len(transposes) != 1 or [part and part[1] for part in parts] != list(range(PARTS)):
        return None
    transpose = transposes.pop()
    split = _maker(transpose.inputs[0])
    if _permutation(transpose) != TO_HEADS or split is None or split.op_type != "Reshape":
        return None
    projection, shape = split.inputs[0], split.outputs[0].shape
    if projection is None or shape is None or len(shape) != len(TO_HEADS) or shape[2] != PARTS:
        return None
    heads = shape[3]
    return (projection, heads) if isinstance(heads, int) else None


def _part(value: ir.Value | None) -> tuple[ir.Node, int] | None:
    """Return the transpose that a value is a slice of, along the first axis, and the index of the slice."""
    from onnxscript import ir

    squeeze = _maker(value)
    cut = _maker(squeeze.inputs[0]) if squeeze is not None and squeeze.op_type == "Squeeze" else None
    transpose = _maker(cut.inputs[0]) if cut is not None and cut.op_type == "Slice" else None
    if cut is None or transpose is None or transpose.op_type != "Transpose":
        return None
    limits = [ir.convenience.get_const_tensor(limit) for limit in cut.inputs[1:4] if limit is not None]
    if len(limits) != 3 or any(limit is None or limit.size != 1 for limit in limits):
        return None
    start, end, axis = (int(limit.numpy().reshape(-1)[0]) for limit in limits if limit is not None)
    return (transpose, start) if (end, axis) == (start + 1, 0) else None


def _flattening(attention: ir.Node) -> ir.Node | None:
    """Return the reshape to [B,N,H*D] after an attention and its transpose, where neither has another user."""
    transpose = _only_user(attention.outputs[0])
    if transpose is None or transpose.op_type != "Transpose" or _permutation(transpose) != FROM_HEADS:
        return None
    reshape = _only_user(transpose.outputs[0])
    shape = reshape.outputs[0].shape if reshape is not None and reshape.op_type == "Reshape" else None
    return reshape if shape is not None and len(shape) == 3 else None


def _permutation(transpose: ir.Node) -> tuple[int, ...]:
    found = transpose.attributes.get("perm")
    return tuple(found.as_ints()) if found is not None else ()


def _maker(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _only_user(value: ir.Value) -> ir.Node | None:
    users = list(value.consumers())
    return users[0] if len(users) == 1 and not value.is_graph_output() else None
