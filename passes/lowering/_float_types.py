"""Floating-point types of values, for passes that reduce them."""

from __future__ import annotations

import torch
from torch import fx


def is_float32(node: fx.Node) -> bool:
    """Return whether a node gives a float32 tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
