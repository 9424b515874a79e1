"""Runners, which run the variants of a compiled denoiser on some backend, and the calls that they take. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qcgraph.plan.roles import VariantKind
from qcgraph.plan.spec import GROUP, ROW, TIMESTEP, ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.cache_state import State
from qcgraph.sampling.conditions import Conditions

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Call:
    """One run of a variant.

    Attributes:
        variant: the name of the variant.
        kind: the effect of the variant on the step.
        index: the index of the step in the plan; for a variant that prepares several steps, the first of them.
        inputs: by name, all inputs of the variant except cached values; other entries are ignored. They are NumPy
            arrays, or tensors of a device where the runner takes these.
        state: the cached values of the request; the variant reads its inputs from it, and stores its outputs in it (see
            `qcgraph.sampling.cache_state`).
    """

    variant: str
    kind: VariantKind
    index: int
    inputs: Mapping[str, Any]
    state: State

    @property
    def is_step(self) -> bool:
        """Whether the variant predicts the noise of a step, rather than preparing steps."""
        return self.kind is not VariantKind.PREPARES


class Runner(Protocol):
    """Runs the variants of one compiled denoiser on some backend."""

    def run(self, call: Call) -> Array:
        """Run one variant.

        Returns:
            The noise prediction f32[B,C_out,H,W]; from a variant that prepares steps, the modulation f32[B,M].
        """
        ...


def step_inputs(plan: StepPlan, spec: ModelSpec, index: int, latent: Array, conditions: Conditions) -> dict[str, Any]:
    """Return the inputs of a step except its cached values and its modulation.

    Args:
        plan: the step plan.
        spec: the specification of the denoiser.
        index: the index of the step.
        latent: the latent [B,C,H,W].
        conditions: the conditions of the B samples.
    """
    step = plan.steps[index]
    return {
        spec.latent.name: latent,
        TIMESTEP.name: np.full(len(latent), step.timestep, dtype=np.float32),
        **conditions.values,
        GROUP.name: np.asarray(step.group, dtype=np.int64),
        ROW.name: np.asarray(step.row, dtype=np.int64),
    }


def step_call(plan: StepPlan, index: int, inputs: Mapping[str, Any], state: State, variant: str | None = None) -> Call:
    """Return the call of a step, with the variant of the plan or with a given one."""
    name = variant or plan.steps[index].variant
    return Call(name, plan.roles[name].kind, index, inputs, state)
