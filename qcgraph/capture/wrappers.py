"""Wrappers of modules that leave their results unchanged: of torch.compile, and of parallelism over devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside such wrappers, whose ``forward`` has the parameters of the model."""
    from torch import nn

    while True:
        inner = getattr(module, "_orig_mod", None)  # set by torch.compile
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner
