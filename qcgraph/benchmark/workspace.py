"""Define where baselines are built: a folder, the bundle to compare with, and the model that it was compiled from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcgraph.bundle import Bundle
from qcgraph.models import LoadedModel

if TYPE_CHECKING:
    import torch
    from torch import nn

EXAMPLE_BATCH = 3  # any size but 1, which torch.export would treat as a constant


@dataclass(frozen=True)
class Workspace:
    """The inputs for building or opening a baseline; processes exchange them as JSON.

    Attributes:
        folder: the folder where files are built, and opened from.
        bundle_path: the path of the bundle.
        model_name: the name of the model; None means the name that the bundle recorded.
        threads: the number of threads of every candidate.
    """

    folder: Path
    bundle_path: Path
    model_name: str | None
    threads: int

    @classmethod
    def decode(cls, data: dict[str, Any]) -> Workspace:
        """Return a workspace from its JSON data."""
        return cls(Path(data["folder"]), Path(data["bundle_path"]), data["model_name"], data["threads"])

    def encode(self) -> dict[str, Any]:
        """Return the workspace as JSON data."""
        return {
            "folder": str(self.folder),
            "bundle_path": str(self.bundle_path),
            "model_name": self.model_name,
            "threads": self.threads,
        }

    @cached_property
    def bundle(self) -> Bundle:
        """The bundle; its files were checked before the first measurement."""
        return Bundle.open(self.bundle_path, check=False)

    @cached_property
    def model(self) -> LoadedModel:
        """The model, loaded once in each process."""
        from qcgraph.models.source import find_model

        return find_model(self.bundle, self.model_name)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the model's inputs, in the order of its graphs."""
        return tuple(tensor.name for tensor in self.model.spec.inputs)

    def example_inputs(self) -> tuple[torch.Tensor, ...]:
        """Return inputs for tracing the model, with the batch size `EXAMPLE_BATCH`."""
        from qcgraph.capture.capture import example_inputs

        return tuple(example_inputs(self.model.spec, EXAMPLE_BATCH).values())

    def positional_module(self) -> nn.Module:
        """Return the model as a module that takes its inputs in order, whatever their names."""
        import torch

        class Positional(torch.nn.Module):
            def __init__(self, model: LoadedModel) -> None:
                super().__init__()
                self.model = model.module
                self.names = model.input_names

            def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
                return self.model(**dict(zip(self.names, inputs, strict=True)))

        return Positional(self.model).eval()

    def dynamic_batch(self) -> tuple[tuple[dict[int, Any], ...]]:
        """Return the dynamic shapes of the one parameter of `positional_module`, its inputs: the batch axis of each."""
        import torch

        from qcgraph.capture.capture import MAX_BATCH

        batch = torch.export.Dim("B", min=1, max=MAX_BATCH)
        return (tuple({tensor.batch_axis or 0: batch} for tensor in self.model.spec.inputs),)
