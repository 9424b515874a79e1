"""Measure how well activation scales fit the quantized activations, on trajectories of the compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from qcgraph.evaluation.ablation import Quantizer, activation_quantizers
from qcgraph.evaluation.settings import Subject
from qcgraph.ir.execute import TorchRunner
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import sample
from qcgraph.sampling.runner import Call

SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class ScaleFit:
    """The fit of one activation scale, for one site and timestep group.

    Attributes:
        site: the site.
        group: the timestep group.
        snr: signal-to-quantization-noise with the compiled scale, dB.
        attainable: signal-to-quantization-noise with the scale from the range observed here, dB.
        clipped: share of values outside of the range of codes.
    """

    site: str
    group: int
    snr: float
    attainable: float
    clipped: float


@dataclass
class _Sums:
    """Sums over the activation that enters one quantizer in one timestep group."""

    low: float = 0.0  # zero is always a code
    high: float = 0.0
    count: int = 0
    signal: float = 0.0
    noise: float = 0.0
    attainable: float = 0.0
    clipped: float = 0.0


def fit_scales(subject: Subject, conditions: Conditions, seed: int, progress: Progress) -> tuple[ScaleFit, ...]:
    """Measure the fit of every activation scale, on trajectories of the compiled program.

    The trajectories run twice: first to find the ranges, then to find the errors of the compiled scales and of the
    scales from these ranges.

    Args:
        subject: the compilation.
        conditions: the conditions of the trajectories.
        seed: the seed of the noise.
        progress: receives progress messages.
    """
    watch = _Watch(activation_quantizers(subject.program), subject.plan)
    runner = TorchRunner(subject.program, watch)
    plan = subject.plan

    for watch.measures_errors in (False, True):
        progress.note(f"  scales: {len(conditions)} trajectories, {'errors' if watch.measures_errors else 'ranges'}")
        sample(
            runner,
            plan,
            subject.spec,
            conditions,
            seed,
            batch=len(conditions),
            progress=progress,
        )
    return tuple(watch.fits())


class _Watch:
    """Observes the input of every quantizer (see `qcgraph.ir.execute.Observe`)."""

    def __init__(self, quantizers: Sequence[Quantizer], plan: StepPlan) -> None:
        self._quantizers = {(item.variant, item.node): item for item in quantizers}
        self._sums: dict[tuple[tuple[str, ...], int], _Sums] = {}
        self._plan = plan
        self.measures_errors = False

    def __call__(self, call: Call, node: fx.Node, value: torch.Tensor) -> None:
        quantizer = self._quantizers.get((call.variant, node.name))
        if quantizer is None:
            return
        group = self._plan.steps[call.index].group
        sums = self._sums.setdefault((quantizer.sites, group), _Sums())
        if self.measures_errors:
            _add_errors(sums, quantizer, value, group)
        else:
            sums.low, sums.high = min(sums.low, value.min().item()), max(sums.high, value.max().item())

    def fits(self) -> list[ScaleFit]:
        """Return the fit of every site in every timestep group that ran it."""
        return [
            ScaleFit(
                site,
                group,
                snr=decibels(sums.signal, sums.noise),
                attainable=decibels(sums.signal, sums.attainable),
                clipped=sums.clipped / sums.count,
            )
            for (sites, group), sums in self._sums.items()
            for site in sites
        ]


def _add_errors(sums: _Sums, quantizer: Quantizer, value: torch.Tensor, group: int) -> None:
    low, high = quantizer.low, quantizer.high
    scale, zero_point = quantizer.parameters(group)
    codes = torch.round(value / scale) + zero_point
    sums.count += value.numel()
    sums.signal += torch.linalg.vector_norm(value).item() ** 2
    sums.clipped += int(((codes < low) | (codes > high)).sum())
    sums.noise += _noise(value, scale, zero_point, low, high, quantizer.shift)
    # With two regions, some codes are unused.
    high = high if not quantizer.shift else low + 2 * (zero_point - low)
    ideal = max((sums.high - sums.low) / (high - low), SMALLEST)
    sums.attainable += _noise(value, ideal, round(low - sums.low / ideal), low, high)


def _noise(value: torch.Tensor, scale: float, zero_point: int, low: int, high: int, shift: int = 0) -> float:
    """Return the summed squared error of quantizing a tensor."""
    step = torch.where(value > 0, scale * 2.0**shift, scale)
    rounded = (torch.round(value / step) * step).clamp((low - zero_point) * scale, (high - zero_point) * scale)
    return torch.linalg.vector_norm(value - rounded).item() ** 2


def decibels(signal: float, noise: float) -> float:
    """Return the signal-to-noise ratio in dB; without noise 300, which float64 cannot resolve."""
    if noise <= 0:
        return 300.0
    return float(10 * np.log10(max(signal, SMALLEST) / noise))
