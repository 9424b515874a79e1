"""Ranges of the channels of activations on calibration trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.calibration._extremes import Extremes
from qcgraph.passes.quantization._equalizable import EqualizableActivation
from qcgraph.pipeline.together import trajectories_together
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import sample_calibration
from qcgraph.sampling.runner import Call


class ChannelRanges:
    """Streaming ranges and power of the channels of an activation, the ranges as far as expected of more rows."""

    def __init__(self) -> None:
        self._lows, self._highs = Extremes(), Extremes()
        self._squares = torch.empty(0)
        self._count = 0

    def add(self, value: torch.Tensor) -> None:
        """Add the values of an activation [R,...,C]."""
        rows, flat = value.reshape(len(value), -1, value.shape[-1]), value.flatten(0, -2)
        self._lows.add(-rows.amin(dim=1))
        self._highs.add(rows.amax(dim=1))
        sums = torch.stack([flat.sum(dim=0), (flat**2).sum(dim=0)])
        self._squares = self._squares + sums if self._count else sums.double()
        self._count += len(flat)

    @property
    def _low(self) -> torch.Tensor:
        return -self._lows.expected

    @property
    def _high(self) -> torch.Tensor:
        return self._highs.expected

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite."""
        return bool(torch.isfinite(self._squares).all())

    @property
    def middle(self) -> torch.Tensor:
        """The middle of the range of every channel."""
        return (self._low + self._high) / 2

    @property
    def half_width(self) -> torch.Tensor:
        """Half the width of the range of every channel."""
        return (self._high - self._low) / 2

    @property
    def power(self) -> torch.Tensor:
        """The mean square of every channel about the middle of its range."""
        mean, square = (self._squares / self._count).float()
        return square - 2 * mean * self.middle + self.middle**2


def observe_channels(
    program: Program, activations: Sequence[EqualizableActivation], count: int, seed: int, progress: Progress
) -> Mapping[str, ChannelRanges]:
    """Return the channel ranges of activations, by node, on trajectories on which every step computes."""
    watched = {item.nodes[0]: item.name for item in activations}
    found = {item.name: ChannelRanges() for item in activations}

    def observe(_: Call, node: fx.Node, value: torch.Tensor) -> None:
        if node.name in watched:
            found[watched[node.name]].add(value)

    if activations:
        runner = TorchRunner(program, observe)
        plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
        together = trajectories_together(program)
        sample_calibration(runner, plan, spec, count, seed, batch=together, progress=progress)
    return found
