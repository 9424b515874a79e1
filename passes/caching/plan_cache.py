"""plan-cache: decide which values are cached, which variants reuse them, and the first cache schedule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import ClassVar, Literal

from qcgraph.errors import ContractError, UsageError
from qcgraph.facts import NO_BLOCK, CachedValue, CachePlan, SolverPlan
from qcgraph.ir.graph import Variant, spec_of
from qcgraph.ir.program import Program
from qcgraph.ir.structure import Block, cached_node, find_blocks, find_branches
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import SHOWN, option
from qcgraph.plan.schedule import CONDITIONAL, spread, uniform
from qcgraph.plan.steps import StepPlan

_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
GUIDANCE = "guidance"  # stands for the difference of its halves among block ranges
FLOAT_BYTES = 4
MOST_BYTES = 2**63 - 1


@dataclass(frozen=True)
class PlanCache(Pass):
    """Decide what computing steps cache, which variants reuse it, and a cache schedule to begin with.

    Cached is the change of the residual stream over a range of blocks, or the output of every branch in it before its
    gate (FORA, Learning-to-Cache), or, with ``guidance`` in the place of a range, the difference of the noise
    predictions of both halves of guidance. Each range has a variant of its own; a step takes one of them or computes.
    The cache schedule is uniform (FORA; CacheQuant's baseline) or, for a budget, has as many evenly spread computing
    steps as it allows; plan-steps can find a better one once the variants exist.

    Attributes:
        interval: steps from one computing step to the next; 1 computes every step.
        budget: the cost of sampling relative to computing every step, instead of an interval; 0 for no budget.
        solver: take the schedule that plan-solver decided, instead of an interval or a budget.
        blocks: the cached range, ``all`` or ``first..last`` (both inclusive, counted from 0), or ``guidance``; several
            with ``+``.
        what: ``range`` or ``branches``.
        history: how many computed values a forecast may look back to, 1 to 3; 1 is plain reuse.
        memory: the bytes that cached tensors may take for one image, both halves of guidance; 0 for any number. A
            history that needs more is shortened.
    """

    name: ClassVar[str] = "plan-cache"
    requires: ClassVar[tuple[type, ...]] = (StepPlan,)
    provides: ClassVar[tuple[type, ...]] = (CachePlan,)

    interval: int = option(3, least=1, hint="1 computes every step, 3 every third")
    budget: float = option(0.0, most=1, hint="0.3 is 30 % of what computing every step costs")
    solver: bool = False
    blocks: str = "all"
    what: Literal["range", "branches"] = "range"
    history: int = option(1, least=1, most=3, hint="1 is plain reuse, 3 is the most")
    memory: int = option(0, most=MOST_BYTES, hint="it is a number of bytes; 0 allows any")

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.blocks.split("+"):
            _bounds(part, blocks=1)

    def check(self, captured: Program) -> None:
        """Refuse ranges that the model does not have, and a memory that is insufficient; planning takes no samples."""
        self.run(captured, PassContext())

    def run(self, program: Program, context: PassContext) -> Program:
        if len(program.variants) > 1:
            raise ContractError(
                "the program is split already, after another plan", hint="run plan-cache once, before insert-cache"
            )
        (variant,), plan = program.variants.values(), program.facts[StepPlan]
        blocks = find_blocks(variant)
        if not blocks and self.blocks != GUIDANCE:
            raise UsageError(
                "the model has no chain of blocks to cache: no module list passes one residual stream on",
                hint="compile with --cache off",
            )
        modes = [self._reused(variant, blocks, *bounds) for bounds in self._ranges(len(blocks), plan)]
        # Overlapping ranges share the branches of their blocks.
        names = {value: f"cache_{index}" for index, value in enumerate(dict.fromkeys(chain(*modes)))}
        values = tuple(replace(value, name=name) for value, name in names.items())
        variants = ["reuse" if not index else f"reuse_{index}" for index in range(len(modes))]
        variants = [CONDITIONAL if mode[0].is_guidance else name for mode, name in zip(modes, variants, strict=True)]
        draft = self._draft(program, variants, context)
        return program.with_facts(
            CachePlan(
                values=values,
                modes={name: tuple(names[value] for value in mode) for name, mode in zip(variants, modes, strict=True)},
                history=self._affordable(variant, blocks, values, plan, context),
                draft=draft,
            )
        )

    def _draft(self, program: Program, variants: Sequence[str], context: PassContext) -> tuple[str | None, ...]:
        """Return the first schedule."""
        steps = len(program.facts[StepPlan])
        if self.solver:
            planned = program.facts.get(SolverPlan)
            if planned is None:
                context.refuse("schedule", "no solver is planned, so every step computes")
            return planned.modes if planned and planned.modes else (None,) * steps
        computes = spread(steps, max(1, int(self.budget * steps))) if self.budget else uniform(steps, self.interval)
        return tuple(None if computing else variants[0] for computing in computes)

    def _ranges(self, blocks: int, plan: StepPlan) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for part in self.blocks.split("+"):
            first, last = _bounds(part, blocks)
            if first == NO_BLOCK and plan.halves == 1:
                raise UsageError("without guidance there are no halves to differ", hint="leave guidance out of blocks")
            if not NO_BLOCK <= first <= last < blocks:
                raise UsageError(f"block range {part} is outside the model", hint=f"its blocks are 0..{blocks - 1}")
            if (first, last) in found:
                raise UsageError(f"block range {part} is there twice", hint="each range is a variant; name it once")
            found.append((first, last))
        return found

    def _reused(self, variant: Variant, blocks: Sequence[Block], first: int, last: int) -> tuple[CachedValue, ...]:
        """Return the values that a mode reuses, still without names."""
        if self.what == "range" or first == NO_BLOCK:
            return (CachedValue("", first, last),)
        counts = {index: len(find_branches(variant, blocks[index])) for index in range(first, last + 1)}
        if empty := [index for index, branches in counts.items() if not branches]:
            raise UsageError(
                f"block {empty[0]} is not a residual stream that branches are added to",
                hint="cache the change over a range instead: what=range",
            )
        return tuple(CachedValue("", index, index, branch) for index in counts for branch in range(counts[index]))

    def _affordable(
        self,
        variant: Variant,
        blocks: Sequence[Block],
        values: Sequence[CachedValue],
        plan: StepPlan,
        context: PassContext,
    ) -> int:
        """Return the longest history that the memory allows."""
        once = plan.halves * sum(_bytes(variant, blocks, value) for value in values)
        if not self.memory or once * self.history <= self.memory:
            return self.history
        if once > self.memory:
            raise UsageError(
                f"the cache takes {once} bytes an image, {self.memory} are allowed",
                hint=f"allow at least {once}, or cache fewer blocks",
            )
        history = self.memory // once
        context.refuse("cache", f"a history of {self.history} takes {once * self.history} bytes; it is {history}")
        return history


def _bounds(part: str, blocks: int) -> tuple[int, int]:
    """Return the first and last block of a range, which may be outside the model."""
    words = {"all": (0, blocks - 1), GUIDANCE: (NO_BLOCK, NO_BLOCK)}
    match = _RANGE.fullmatch(part)
    if match is None and part not in words:
        raise UsageError(
            f"block range {part[:SHOWN]!r}",
            where="pass plan-cache, option blocks",
            hint="write all, guidance, or first..last such as 2..9",
        )
    return (int(match[1]), int(match[2])) if match else words[part]


def _bytes(variant: Variant, blocks: Sequence[Block], value: CachedValue) -> int:
    """Return the size in bytes of a cached value for a batch of one."""
    nodes = {node.name: node for node in variant.graph.nodes}
    shape = spec_of(value.name, nodes[cached_node(variant, blocks, value)].meta["val"]).shape
    return FLOAT_BYTES * prod(dim for dim in shape if isinstance(dim, int))
