"""The modulation of one request: what the denoiser needs of timestep and class alone, ahead of the steps. NumPy only.

The timesteps of a plan are known, and so are the classes from the first step on. One call of a preparing variant (see
`qcgraph.plan.spec.preparation`) therefore serves many steps: it reads the weights once, not once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcgraph.plan.spec import preparation
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.tensors import index_of

Array = npt.NDArray[np.float32]
Prepare = Callable[[str, Mapping[str, npt.NDArray[np.generic]]], Array]

# Rows of one call. With this many, a preparing variant spends its time on arithmetic and no longer on
# reading its weights, so more gain nothing; their rows take as much memory as a ninth of the projections that make
# them in a DiT-XL/2 (100 MB), a third in a DiT-S/2 (15 MB). It is enough for 50 steps of one sample with guidance.
TOGETHER = 128


class Modulation:
    """The rows of the steps that are still to come, for the classes of one trajectory.

    Args:
        plan: the step plan.
        prepare: runs a preparing variant on ``timestep`` f32[N] and ``class_label`` i64[N], which gives f32[N,M], or a
            tensor of a device; then rows are such tensors.
    """

    def __init__(self, plan: StepPlan, prepare: Prepare) -> None:
        self._plan = plan
        self._prepare = prepare
        self._labels = np.empty(0, dtype=np.int64)
        self._classes = np.empty(0, dtype=np.int64)
        self._places: Any = self._labels  # of the labels among the classes
        self._rows: dict[int, Array] = {}  # a step that is still to come -> f32[number of classes,M]

    def clear(self) -> None:
        """Forget everything: a new trajectory begins."""
        self._rows.clear()

    def at(self, index: int, class_label: npt.NDArray[np.int64]) -> Array:
        """The modulation f32[B,M] of a step; those before it are forgotten, this one stays in case the step is retried.

        Samples of one class share their rows, as the unconditional halves of guidance do. When the classes are others
        than at the step before, all that was prepared is prepared anew.
        """
        if not np.array_equal(class_label, self._labels):
            classes, places = np.unique(class_label, return_inverse=True)
            if not np.array_equal(classes, self._classes):
                self._rows.clear()
            self._labels, self._classes, self._places = class_label.copy(), classes, places
        for earlier in [step for step in self._rows if step < index]:
            del self._rows[earlier]
        if index not in self._rows:
            self._rows |= self._prepared(index)
        rows = self._rows[index]
        self._places = index_of(self._places, rows)
        return rows[self._places]

    def _prepared(self, index: int) -> dict[int, Array]:
        """The rows of this step and of the next ones that run its variant, as many as are worth a call."""
        variant, count = self._plan.steps[index].variant, len(self._classes)
        waiting = [later for later in range(index, len(self._plan)) if self._plan.steps[later].variant == variant]
        steps = waiting[: max(1, TOGETHER // count)]
        timesteps = np.array([self._plan.steps[step].timestep for step in steps], dtype=np.float32)
        inputs: dict[str, npt.NDArray[np.generic]] = {
            "timestep": np.repeat(timesteps, count),
            "class_label": np.tile(self._classes, len(steps)),
        }
        rows = self._prepare(preparation(variant), inputs)
        return dict(zip(steps, rows.reshape(len(steps), count, rows.shape[1]), strict=True))
