"""The floating-point types of values that passes reduce."""

from __future__ import annotations

import torch
from torch import fx


def is_float32(node: fx.Node) -> bool:
    """Return whether a node gives a tensor in float32."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
