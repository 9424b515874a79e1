"""What every source of models hands on. Importing it imports no torch."""

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
        module: the network, in evaluation mode, frozen, float32. It returns one tensor, [B, C_out, H, W]. Wrappers that
            compile it or spread it over devices are taken off.
        spec: what the host must know of it.
        input_names: names of the module's forward parameters in the order of the inputs of the spec: latent
            [B, C, H, W], timestep [B], and the conditions.
        judge: makes what samples are judged with (class accuracy, FID-small), or None where nothing can judge them. It
            is called on demand, because a judge may need data and libraries that compiling does not; a factory of
            your own may supply one for its model.
        notes: what the user should know of how the model was read: settings that are not followed, prefixes taken off.
    """

    module: nn.Module
    spec: ModelSpec
    input_names: tuple[str, ...]
    judge: Callable[[], Judge] | None = None
    notes: tuple[str, ...] = ()
