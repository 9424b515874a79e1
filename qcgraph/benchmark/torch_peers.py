"""Run baselines with PyTorch: eager, and torch.compile."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from qcgraph.benchmark.workspace import Workspace

if TYPE_CHECKING:
    from qcgraph.sampling.runner import Runner


def open_eager(workspace: Workspace) -> Runner:
    """Open the unchanged model, in float32."""
    import torch

    from qcgraph.models.eager import EagerRunner

    torch.set_num_threads(workspace.threads)
    return EagerRunner(workspace.model)


def open_compiled(workspace: Workspace) -> Runner:
    """Open the model under torch.compile, which compiles at the first call of every batch size.

    The default mode is used: freezing and max-autotune took the same time on a DiT-S/2 (229 ms, one AMD EPYC thread).
    """
    import torch

    from qcgraph.models.eager import EagerRunner

    torch.set_num_threads(workspace.threads)
    # By default PyTorch warns and falls back to eager after eight batch sizes.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled = torch.compile(workspace.model.module, dynamic=False)
    return EagerRunner(replace(workspace.model, module=cast(torch.nn.Module, compiled)))


def missing_compiler() -> str:
    """Return the reason why torch.compile cannot compile for this CPU; empty if it can."""
    from torch._inductor import config

    candidates = (config.cpp.cxx,) if isinstance(config.cpp.cxx, str) else config.cpp.cxx
    known = [name for name in candidates if name]
    if any(shutil.which(name) for name in known):
        return ""
    return f"needs a C++ compiler ({' or '.join(known)}), which is not on the PATH and does not come with pip"
