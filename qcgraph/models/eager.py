"""Run a loaded model in PyTorch eager, without qcgraph, as the reference of every comparison."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from qcgraph.models.loaded import LoadedModel
from qcgraph.plan.spec import TIMESTEP
from qcgraph.sampling.runner import Array, Call


class EagerRunner:
    """Runs the unchanged module of a model (see `qcgraph.sampling.runner.Runner`), for every variant."""

    def __init__(self, model: LoadedModel) -> None:
        self._module = model.module
        inputs = [tensor.name for tensor in model.spec.inputs]
        self._names = dict(zip(inputs, model.input_names, strict=True))

    def run(self, call: Call) -> Array:
        """Return the noise prediction, f32[B,C_out,H,W]; groups, rows and caches have no effect."""
        if not call.is_step:  # the module computes its own modulation
            return np.empty((len(call.inputs[TIMESTEP.name]), 0), dtype=np.float32)
        # Copies are passed, because a module may write to its arguments.
        values = {theirs: torch.from_numpy(call.inputs[ours]).clone() for ours, theirs in self._names.items()}
        with torch.inference_mode():
            return cast(Array, self._module(**values).numpy())
