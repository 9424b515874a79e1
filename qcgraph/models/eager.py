"""A loaded model as a sampling backend: PyTorch eager, without qcgraph. What everything else is compared with."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from qcgraph.models.loaded import LoadedModel
from qcgraph.plan.spec import TIMESTEP
from qcgraph.sampling.runner import Array, Call


class EagerRunner:
    """Runs the module of a model as it is (see `qcgraph.sampling.runner.Runner`), whatever variant is asked for."""

    def __init__(self, model: LoadedModel) -> None:
        self._module = model.module
        inputs = [tensor.name for tensor in model.spec.inputs]
        self._names = dict(zip(inputs, model.input_names, strict=True))

    def run(self, call: Call) -> Array:
        """Return the noise prediction, f32[B,C_out,H,W]; groups, rows and caches mean nothing here."""
        if not call.is_step:  # the module computes its own modulation
            return np.empty((len(call.inputs[TIMESTEP.name]), 0), dtype=np.float32)
        # Copies, because a module may write to its arguments.
        values = {theirs: torch.from_numpy(call.inputs[ours]).clone() for ours, theirs in self._names.items()}
        with torch.inference_mode():
            return cast(Array, self._module(**values).numpy())
