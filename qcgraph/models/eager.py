"""A loaded model as a sampling backend: PyTorch eager, without qcgraph. What everything else is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from qcgraph.models.loaded import LoadedModel
from qcgraph.plan.spec import is_preparation
from qcgraph.sampling.cache_state import State
from qcgraph.sampling.loop import Array

_INPUTS = ("latent", "timestep", "class_label")


class EagerRunner:
    """Runs the module of a model as it is (see `qcgraph.sampling.loop.Runner`), whatever variant is asked for."""

    def __init__(self, model: LoadedModel) -> None:
        self._module = model.module
        self._names = dict(zip(_INPUTS, model.input_names, strict=True))

    def run(self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: State) -> Array:
        """The noise prediction, f32[B,C_out,H,W]; groups, rows and caches mean nothing here."""
        if is_preparation(variant):
            return np.empty((len(inputs["timestep"]), 0), dtype=np.float32)  # the module computes its own modulation
        # Copies, because a module may write to its arguments.
        values = {self._names[name]: torch.from_numpy(inputs[name]).clone() for name in _INPUTS}
        with torch.inference_mode():
            return cast(Array, self._module(**values).numpy())
