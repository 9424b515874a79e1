"""Wrappers of modules that do not change what they compute: of torch.compile, and those that spread over devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that is inside of these wrappers, which has the parameters of its own ``forward``."""
    from torch import nn

    while True:
        inner = getattr(module, "_orig_mod", None)  # of torch.compile
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner
