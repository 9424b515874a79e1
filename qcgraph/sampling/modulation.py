"""The modulation of one request, computed from timestep and conditions alone, ahead of the steps. NumPy.

The timesteps of a plan are known, and the conditions are known from the first step on. One call of a preparing variant
(see `qcgraph.plan.roles`) therefore serves many steps: it reads the weights once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qcgraph.plan.roles import VariantKind
from qcgraph.plan.spec import TIMESTEP
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.runner import Array, Call
from qcgraph.sampling.tensors import index_of

# Rows of one call. With this many, a preparing variant spends its time on arithmetic and no longer on reading its
# weights, so more rows gain nothing. Their memory is a ninth of the projections that compute them in a DiT-XL/2
# (100 MB), a third in a DiT-S/2 (15 MB). It is enough for 50 steps of one sample with guidance.
TOGETHER = 128


class Modulation:
    """The modulation rows of the remaining steps, for the conditions of one trajectory.

    Args:
        plan: the step plan.
        run: runs a preparing variant, and returns f32[N,M] or a tensor of a device; then rows are such tensors.
    """

    def __init__(self, plan: StepPlan, run: Callable[[Call], Array]) -> None:
        self._plan = plan
        self._preparing = plan.preparing
        self._run = run
        self._conditions = self._kinds = Conditions(0, {})
        self._places: Any = np.empty(0, dtype=np.int64)  # index of the kind of each sample
        self._rows: dict[int, Array] = {}  # a remaining step -> f32[number of kinds,M]

    def clear(self) -> None:
        """Forget all rows and conditions, because a new trajectory begins."""
        self._rows.clear()

    def at(self, index: int, conditions: Conditions) -> Array:
        """Return the modulation f32[B,M] of a step.

        The rows of earlier steps are dropped; the rows of this step stay in case it is retried. Samples of equal
        conditions share their rows, as the unconditional halves of guidance do. If the conditions differ from those of
        the step before, all rows are computed anew.
        """
        if conditions != self._conditions:
            kinds, places = conditions.distinct()
            if kinds != self._kinds:
                self._rows.clear()
            self._conditions, self._kinds, self._places = conditions.copy(), kinds, places
        for earlier in [step for step in self._rows if step < index]:
            del self._rows[earlier]
        if index not in self._rows:
            self._rows |= self._prepared(index)
        rows = self._rows[index]
        self._places = index_of(self._places, rows)
        return rows[self._places]

    def _prepared(self, index: int) -> dict[int, Array]:
        """Return the rows of this step and of the next steps that run its variant, as many as fill a call."""
        variant, count = self._plan.steps[index].variant, len(self._kinds)
        waiting = [later for later in range(index, len(self._plan)) if self._plan.steps[later].variant == variant]
        steps = waiting[: max(1, TOGETHER // count)]
        timesteps = np.array([self._plan.steps[step].timestep for step in steps], dtype=np.float32)
        inputs = {TIMESTEP.name: np.repeat(timesteps, count), **self._kinds.repeated(len(steps)).values}
        rows = self._run(Call(self._preparing[variant], VariantKind.PREPARES, index, inputs, {}))
        return dict(zip(steps, rows.reshape(len(steps), count, rows.shape[1]), strict=True))
