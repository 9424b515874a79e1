"""Running a program in PyTorch as a sampling backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from qcgraph.errors import BundleError
from qcgraph.ir.program import Program
from qcgraph.sampling import Array, State

OUTPUT = "noise_prediction"


class TorchRunner:
    """The reference backend: runs the graphs of a program as they are (see `qcgraph.sampling.Runner`)."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def run(self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: State) -> Array:
        """Run one variant; cache tensors in ``state`` are torch tensors."""
        interface = self._program.variants[variant].interface
        tensors = {name: torch.from_numpy(inputs[name]) for name in interface.input_names if name in inputs}
        for name in interface.input_names:
            if name not in tensors:
                tensors[name] = cached(name, variant, state)
        outputs = self._program.run(variant, tensors)
        prediction = outputs.pop(OUTPUT)
        state.update(outputs)
        return cast(Array, prediction.numpy())


def cached(name: str, variant: str, state: State) -> torch.Tensor:
    """A cached tensor of the request.

    Raises:
        BundleError: no computing step has written it.
    """
    if name not in state:
        raise BundleError(
            f"variant {variant!r} reuses {name!r} before any step computed it",
            hint="start the trajectory with the first timestep of the plan",
        )
    return cast(torch.Tensor, state[name])
