"""Measure the error of skipping a step, on recorded trajectories, by running the variants.

The functions take a program whose variants exist and whose reusing variants have cached values as inputs (after
insert-cache, before insert-forecast). It may be quantized: the errors are the errors of the program as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qcgraph.facts import CachePlan
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites, total_macs
from qcgraph.passes.caching._forecast import Products, log_signal_to_noise, taylor_gain
from qcgraph.passes.caching._trajectories import Trajectories
from qcgraph.passes.caching.forecasters import Forecaster, fit
from qcgraph.plan.roles import VariantKind
from qcgraph.plan.schedule import ReuseErrors
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import sample_calibration
from qcgraph.sampling.conditions import joined
from qcgraph.sampling.loop import Resumed, guided
from qcgraph.sampling.runner import Array, Call

ROWS = 512  # rows of the batch in which errors of one step are measured
BYTES = 2**26  # bytes that the forecasts of this batch may take
# Distances between two computing steps at which errors are measured; the rest is interpolated. Slow modes are
# measured at fewer distances, and at fewer distances from the last computing step to the skipped one.
DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16, 24)
FEW_DISTANCES = (1, 2, 4, 8, 16)
WINDOW = 24  # number of steps before a step whose products are computed in advance
SLOW_SHARE = 0.1  # share of a computing step's arithmetic above which a mode is slow
SLOW_VALUES = 4  # number of forecast values above which a mode is slow


class OpenLoop:
    """Forecasts of cached values with coefficients that are fitted open loop, on recorded trajectories.

    Args:
        program: the program.
        trajectories: the recorded trajectories.
        forecaster: the forecaster that fits the coefficients.
    """

    def __init__(self, program: Program, trajectories: Trajectories, forecaster: Forecaster) -> None:
        spec, plan = program.facts[ModelSpec], program.facts[StepPlan]
        self._values, self._forecaster = trajectories.values, forecaster
        self._times = log_signal_to_noise(spec.noise_schedule, plan.timesteps)
        count = len(trajectories.conditions)
        self._halves = [slice(half * count, (half + 1) * count) for half in range(plan.halves)]
        self._windows: dict[str, _Window] = {}

    def at(self, name: str, step: int, computed: Sequence[int], values: Sequence[Tensor]) -> Tensor:
        """Return the forecast of a cached value.

        Args:
                name: the name of the cached value.
                step: the step that the value is forecast for.
                computed: the last computing steps, the last one first.
                values: the cached values of these steps, both halves of guidance in a batch as in the trajectories.
        """
        gains = self._gains(name, step, computed)
        parts = []
        for half, rows in enumerate(self._halves):
            forecast = gains[half, -1] + gains[half, 0] * values[0][rows]
            for gain, value in zip(gains[half, 1:-1], values[1:], strict=True):
                forecast += gain * value[rows]
            parts.append(forecast)
        return torch.cat(parts)

    def _gains(self, name: str, step: int, computed: Sequence[int]) -> Tensor:
        """Return the coefficients of the values and the offset, f32[halves, terms + 1, C]."""
        window = self._window(name, step, min(computed))
        places, place = [index - window.first for index in computed], step - window.first
        taylor = taylor_gain(self._times, step, computed)
        moments = [products.moments(places, place) for products in window.halves]
        return torch.stack(
            [fit(self._forecaster, [half], taylor, values=len(computed)).gains.float() for half in moments]
        )

    def _window(self, name: str, step: int, first: int) -> _Window:
        """Return the products of a value at a step and the steps before; products of all steps would be too many."""
        known = self._windows.get(name)
        if known is None or known.step != step or known.first > first:
            first = max(0, min(first, step - WINDOW))
            values = self._values[name][first : step + 1]
            products = [Products([value[rows] for value in values]) for rows in self._halves]
            known = self._windows[name] = _Window(first, step, products)
        return known


@dataclass(frozen=True)
class _Window:
    """Inner products of a cached value at the steps from first to step, for each half of guidance."""

    first: int
    step: int
    halves: list[Products]


def reuse_errors(
    program: Program,
    trajectories: Trajectories,
    forecaster: OpenLoop,
    weight: npt.NDArray[np.float64],
    modes: Sequence[str],
    largest_gap: int,
    progress: Progress,
) -> ReuseErrors:
    """Return the error of every way to skip a step: by mode, and by the computing steps that forecasts look back to.

    At each recorded state the reusing variant runs on forecasts from the values recorded before it. The mean squared
    error of the guided noise prediction against full precision, less that of computing the step, is what skipping it
    adds, 0 at least; times the squared weight of the step, it is what the mean squared error of the final latent gains.
    Forecasts look back to two values here, whatever the history.

    Args:
        program: the program.
        trajectories: the recorded trajectories.
        forecaster: the forecasts on these trajectories.
        weight: the weights of the steps, f64[T], see `qcgraph.passes.caching._trajectories.weights`.
        modes: the reusing variants.
        largest_gap: the most steps from the last computing step to a skipped one.
        progress: reports the steps.
    """
    plan, slow = program.facts[StepPlan], [_is_slow(program, mode) for mode in modes]
    errors = np.full((len(modes), len(plan), largest_gap + 1, largest_gap + 1), np.inf)
    prober = _Prober(program, trajectories, forecaster)
    for index in progress.track(range(1, len(plan)), "skipped steps"):
        for number, mode in enumerate(modes):
            places = list(_places(index, largest_gap, sparse=slow[number]))
            squares = prober.squared_errors(mode, index, [_computed(index, *place) for place in places])
            for (gap, earlier), square in zip(places, squares, strict=True):
                errors[number, index, gap, earlier] = square * weight[index] ** 2
            _fill(errors[number, index], index)
    return ReuseErrors(errors)


def _is_slow(program: Program, mode: str) -> bool:
    reusing, computing = (total_macs(find_sites(program.variants[name])) for name in (mode, program.computing))
    return reusing > SLOW_SHARE * computing or len(program.facts[CachePlan].modes[mode]) > SLOW_VALUES


def _places(index: int, largest_gap: int, *, sparse: bool) -> Iterator[tuple[int, int]]:
    """Yield the pairs (gap, earlier) that are measured at a step."""
    if index <= largest_gap:
        yield index, 0  # from step 0 alone
    furthest = min(index - 1, largest_gap)
    for gap in _spaced(furthest, FEW_DISTANCES) if sparse else range(1, furthest + 1):
        reachable = min(index - gap, largest_gap)
        yield from ((gap, earlier) for earlier in _spaced(reachable, FEW_DISTANCES if sparse else DISTANCES))


def _spaced(last: int, distances: Sequence[int]) -> list[int]:
    """Return the distances below the last one, and the last one itself."""
    return sorted({distance for distance in distances if distance < last} | {last} - {0})


def _computed(index: int, gap: int, earlier: int) -> tuple[int, ...]:
    return (index - gap, index - gap - earlier) if earlier else (index - gap,)


def _fill(errors: npt.NDArray[np.float64], index: int) -> None:
    """Interpolate between the errors measured at a step, f64[G + 1, G + 1], over ``earlier`` and then over ``gap``."""
    largest = len(errors) - 1
    for gap in range(1, min(index - 1, largest) + 1):
        _interpolate(errors[gap, 1 : min(index - gap, largest) + 1])
    for earlier in range(1, min(index - 1, largest) + 1):
        _interpolate(errors[1 : min(index - earlier, largest) + 1, earlier])


def _interpolate(line: npt.NDArray[np.float64]) -> None:
    """Replace infinite values by interpolation, and beyond the outermost known values by the nearest one, in place."""
    known = np.flatnonzero(np.isfinite(line))
    if len(known):
        line[:] = np.interp(np.arange(len(line)), known, line[known])


class _Prober:
    """Runs reusing variants on forecasts, at recorded states."""

    def __init__(self, program: Program, trajectories: Trajectories, forecaster: OpenLoop) -> None:
        self._runner = TorchRunner(program)
        self._plan, self._spec = program.facts[StepPlan], program.facts[ModelSpec]
        self._cache = program.facts[CachePlan]
        self._trajectories, self._forecaster = trajectories, forecaster

    def squared_errors(self, mode: str, index: int, places: Sequence[tuple[int, ...]]) -> list[float]:
        """Return what skipping a step adds to the mean squared error of its guided prediction, for each choice."""
        size = sum(self._trajectories.values[name][index].nbytes for name in self._cache.modes[mode])
        together = max(1, min(ROWS // len(self._trajectories.conditions), BYTES // size))
        return [
            error
            for start in range(0, len(places), together)
            for error in self._together(mode, index, places[start : start + together])
        ]

    def _together(self, mode: str, index: int, places: Sequence[tuple[int, ...]]) -> list[float]:
        recorded = self._trajectories
        cached = {name: self._forecasts(name, index, places) for name in self._cache.modes[mode]}
        plan = self._plan.with_variants([mode] * len(self._plan))
        latents = np.concatenate([recorded.latents[index]] * len(places))
        conditions = joined([recorded.conditions] * len(places))
        resumed = Resumed(self._runner, plan, self._spec, cached)
        found = guided(resumed, index, latents, conditions, plan, self._spec)
        computed = recorded.predictions[index]
        exact = recorded.exact[index] if recorded.exact else computed
        errors = found.reshape(len(places), -1) - exact.reshape(1, -1)
        anyway = float(np.mean(np.square(computed - exact, dtype=np.float64)))
        return [max(0.0, float(value) - anyway) for value in np.mean(np.square(errors, dtype=np.float64), axis=1)]

    def _forecasts(self, name: str, index: int, places: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the forecasts with all conditional halves first, then all unconditional ones, as in a guided batch."""
        values, count = self._trajectories.values[name], len(self._trajectories.conditions)
        made = [self._forecaster.at(name, index, computed, [values[step] for step in computed]) for computed in places]
        return torch.cat([part for half in zip(*(value.split(count) for value in made), strict=True) for part in half])


class Rehearsal:
    """Samples the recorded trajectories again under other schedules, and compares the final latents.

    Args:
        program: the program.
        trajectories: the recorded trajectories.
        forecaster: the forecasts on these trajectories.
    """

    def __init__(self, program: Program, trajectories: Trajectories, forecaster: OpenLoop) -> None:
        self._program, self._trajectories, self._forecaster = program, trajectories, forecaster

    def final_error(self, schedule: Sequence[str | None]) -> float:
        """Return the mean squared error of the final latents under a schedule, in which None computes."""
        recorded, spec = self._trajectories, self._program.facts[ModelSpec]
        plan = self._program.facts[StepPlan].with_modes(schedule)
        runner = _Forecasting(self._program, self._forecaster)
        final = sample_calibration(runner, plan, spec, len(recorded.conditions), recorded.seed)
        error = float(np.mean(np.square(final - recorded.latents[-1], dtype=np.float64)))
        return error if np.isfinite(error) else float("inf")


class _Forecasting:
    """Runs a plan, with forecasts as the cached values of reusing steps."""

    def __init__(self, program: Program, forecaster: OpenLoop) -> None:
        self._runner, self._forecaster = TorchRunner(program), forecaster
        self._cache = program.facts[CachePlan]
        self._computed: list[int] = []
        self._values: list[Mapping[str, Tensor]] = []

    def run(self, call: Call) -> Array:
        if call.kind is VariantKind.COMPUTES:
            made: dict[tuple[str, int], object] = {}
            prediction = self._runner.run(replace(call, state=made))
            self._computed = [call.index, *self._computed][: self._cache.history]
            new = {name: value for (name, age), value in made.items() if not age and isinstance(value, Tensor)}
            self._values = [new, *self._values][: self._cache.history]
            return prediction
        forecasts: dict[tuple[str, int], object] = {
            (name, 0): self._forecaster.at(name, call.index, self._computed, [values[name] for values in self._values])
            for name in self._cache.modes[call.variant]
        }
        return self._runner.run(replace(call, state=forecasts))
