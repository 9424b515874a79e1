"""plan-cache: decide which steps compute and which reuse."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from qcgraph.errors import UsageError
from qcgraph.facts import CachePlan
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_blocks
from qcgraph.pipeline import Pass, PassContext
from qcgraph.steps import StepPlan

_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class PlanCache(Pass):
    """Decide which steps compute the block range and which reuse its cached change.

    Uniform schedule (FORA; CacheQuant's baseline): every ``interval``-th step computes, step 0 always.

    Attributes:
        interval: steps from one computing step to the next; 1 computes every step.
        blocks: the cached range, ``all`` or ``first..last`` (both inclusive, counted from 0).
    """

    name: ClassVar[str] = "plan-cache"
    requires: ClassVar[tuple[type, ...]] = (StepPlan,)
    provides: ClassVar[tuple[type, ...]] = (CachePlan,)

    interval: int = 3
    blocks: str = "all"

    def run(self, program: Program, context: PassContext) -> Program:
        if self.interval < 1:
            raise UsageError(f"interval {self.interval}", hint="1 computes every step, 3 every third")
        count = len(find_blocks(next(iter(program.variants.values()))))
        if count == 0:
            raise UsageError(
                "the model has no chain of blocks to cache: no module list passes one residual stream on",
                hint="compile with --cache off",
            )
        first, last = self._range(count)
        steps = len(program.facts[StepPlan])
        computes = tuple(index % self.interval == 0 for index in range(steps))
        return program.with_facts(CachePlan(first, last, computes))

    def _range(self, count: int) -> tuple[int, int]:
        if self.blocks == "all":
            return 0, count - 1
        match = _RANGE.fullmatch(self.blocks)
        if match is None:
            raise UsageError(f"block range {self.blocks!r}", hint="write all, or first..last such as 2..9")
        first, last = int(match[1]), int(match[2])
        if not first <= last < count:
            raise UsageError(f"block range {self.blocks} is outside the model", hint=f"its blocks are 0..{count - 1}")
        return first, last
