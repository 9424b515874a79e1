"""fit-forecast: fit the coefficients of the forecasts on the quantized, cached trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import torch

from qcgraph.errors import ContractError
from qcgraph.facts import CachePlan, Compensation, ForecastFit, ForecastStep, Precision, Reference
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.ops import HALVES
from qcgraph.ir.program import Program
from qcgraph.passes.caching._forecast import log_signal_to_noise, taylor_gain
from qcgraph.passes.caching.forecasters import Forecaster, Moments, fit, forecaster_named, known_forecasters
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.roles import VariantKind
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import sample_calibration
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.runner import Array, Call, step_call

ops = torch.ops.qcgraph
FOLDS = 2
SLOWNESS = 3.0  # time of a step while its forecasts are fitted, relative to sampling, about


@dataclass(frozen=True)
class FitForecast(Pass):
    """Fit the forecasts of cached values closed loop, in the order of the steps.

    The trajectory is the one that the plan takes, quantized and cached, with all earlier steps fitted. At a reusing
    step, the computing variant runs on the same state, and the forecast is fitted to its cached values. The regression
    so includes the noise of quantization, which an extrapolation amplifies, and the errors of earlier steps. The two
    halves of guidance have coefficients of their own.

    Attributes:
        kind: the forecaster.
    """

    name: ClassVar[str] = "fit-forecast"
    requires: ClassVar[tuple[type, ...]] = (CachePlan, ModelSpec, Reference, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (Compensation, Precision)
    provides: ClassVar[tuple[type, ...]] = (ForecastFit,)
    samples: ClassVar[bool] = True

    kind: str = option("affine", among=known_forecasters)

    def forwards(self, work: Workload) -> float:
        return work.trajectories * work.trajectory * work.share * SLOWNESS

    def run(self, program: Program, context: PassContext) -> Program:
        plan, spec, reference = program.facts[StepPlan], program.facts[ModelSpec], program.facts[Reference]
        names, forecaster = _table_names(program), forecaster_named(self.kind)
        if not names:
            context.refuse("program", "it holds no forecasts")
            return program.with_facts(ForecastFit(self.kind, ()))
        tables = {value: program.constants[name].clone() for value, name in names.items()}
        new = {names[value]: table for value, table in tables.items()}
        fitted = replace(program, constants=dict(program.constants) | new)
        runner = _ForecastFitting(fitted, tables, forecaster)
        count = reference.trajectories
        context.progress.note(f"  fit-forecast: {count} trajectories")
        sample_calibration(runner, plan, spec, count, reference.seed, progress=context.progress)
        return fitted.with_facts(ForecastFit(self.kind, tuple(runner.steps)))


def _table_names(program: Program) -> dict[str, str]:
    """Return the name of the constant with the coefficients of each forecast, by its cached value."""
    found: dict[str, str] = {}
    for variant in program.variants.values():
        for node in variant.graph.nodes:
            if node.target is ops.forecast.default:
                values, coefficients = node.args[0], node.args[1]
                found[str(values[0].target)] = str(coefficients.args[0].target)
    return found


class _ForecastFitting:
    """Runs a plan; at each reusing step it first computes the step, and fits the forecasts to the computed values."""

    def __init__(self, program: Program, tables: Mapping[str, torch.Tensor], forecaster: Forecaster) -> None:
        self.steps: list[ForecastStep] = []
        self._runner = TorchRunner(program)
        self._plan, self._forecaster, self._tables = program.facts[StepPlan], forecaster, tables
        self._cache, self._spec = program.facts[CachePlan], program.facts[ModelSpec]
        self._times = log_signal_to_noise(self._spec.noise_schedule, self._plan.timesteps)
        self._computed: list[int] = []

    def run(self, call: Call) -> Array:
        if call.kind is VariantKind.COMPUTES:
            self._computed.insert(0, call.index)
        else:
            computed: dict[tuple[str, int], object] = {}
            self._runner.run(step_call(self._plan, call.index, call.inputs, computed, self._plan.computing))
            null = self._is_null(call)
            for name in self._cache.modes[call.variant]:
                if name not in self._tables:
                    raise ContractError(
                        "is reused without a forecast, and others have one",
                        where=f"{call.variant}, {name}",
                        hint="run insert-forecast after insert-cache, on all variants",
                    )
                self._fit(name, call, null, cast(torch.Tensor, computed[name, 0]))
        return self._runner.run(call)

    def _is_null(self, call: Call) -> torch.Tensor:
        """Return which samples of a call are unconditional, bool[B]."""
        values = {item.name: call.inputs[item.name] for item in self._spec.conditions}
        batch = len(call.inputs[self._spec.latent.name])
        return torch.from_numpy(Conditions(batch, values).is_null(self._spec))

    def _fit(self, name: str, call: Call, null: torch.Tensor, target: torch.Tensor) -> None:
        index = call.index
        values = [cast(torch.Tensor, call.state[name, age]) for age in range(self._cache.history)]
        table = self._tables[name][self._plan.steps[index].row]  # [history + 1, 2, C], written in place
        taylor = taylor_gain(self._times, index, self._computed)
        errors, reuse_errors = 0.0, 0.0
        for half in range(HALVES):
            members = torch.nonzero(null == bool(half)).flatten()
            if not len(members):
                continue
            folds = []
            for part in range(min(FOLDS, len(members))):
                chosen = members[part::FOLDS]
                moments = Moments(len(values), target.shape[-1])
                moments.add([value[chosen] for value in values], target[chosen])
                folds.append(moments)
            found = fit(self._forecaster, folds, taylor, values=min(len(self._computed), len(values)))
            table[:, half] = found.gains.float()
            errors, reuse_errors = errors + found.error, reuse_errors + found.reuse_error
        power = float(target.double().square().sum())
        reuse, forecast = (float(np.sqrt(value / power)) if power else 0.0 for value in (reuse_errors, errors))
        self.steps.append(ForecastStep(name, index, reuse, forecast))
