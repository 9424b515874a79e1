"""Define the model that every source of models returns; imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcgraph.models.judge import Judge
from qcgraph.plan.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LoadedModel:
    """A denoiser that is ready to be captured.

    Attributes:
        module: the network, frozen, in evaluation mode and float32. It returns one tensor, [B, C_out, H, W]. It has no
            wrappers that compile it or spread it over devices.
        spec: the denoiser's inputs, shapes and noise schedule, as the host needs them.
        input_names: names of the module's forward parameters in the order of the inputs of the spec: latent
            [B, C, H, W], timestep [B], and the conditions.
        judge: makes the judge of samples (class accuracy, FID-small), or None if there is none. It is called on demand,
            because a judge may need data and libraries that compiling does not; your own factory may supply one for
            its model.
        notes: messages for the user on how the model was read, such as ignored settings and removed prefixes.
    """

    module: nn.Module
    spec: ModelSpec
    input_names: tuple[str, ...]
    judge: Callable[[], Judge] | None = None
    notes: tuple[str, ...] = ()
