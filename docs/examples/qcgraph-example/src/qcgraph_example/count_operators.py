"""count-operators: count the operators of every variant, and point at one that is there often."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from qcgraph.errors import UsageError
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import option


@dataclass(frozen=True)
class OperatorCounts:
    """How many operators each variant has.

    Attributes:
        counts: by variant, the number of every operator.
    """

    counts: dict[str, dict[str, int]]

    def lines(self) -> list[str]:
        """Return the lines that printed programs have of it."""
        return [f"operators of {name}: {sum(counts.values())}" for name, counts in self.counts.items()]


@dataclass(frozen=True)
class CountOperators(Pass):
    """Count the operators of every variant.

    Attributes:
        most: an operator that a variant has more often than this is reported as refused.
    """

    name: ClassVar[str] = "count-operators"
    provides: ClassVar[tuple[type, ...]] = (OperatorCounts,)

    most: int = option(1000, least=1, hint="1000 operators of a kind are many")

    def check(self, captured: Program) -> None:
        """Refuse a model without operators, before anything is sampled."""
        if not any(_counts(captured).values()):
            raise UsageError("the model has no operators", hint="compile a model that computes something")

    def run(self, program: Program, context: PassContext) -> Program:
        counts = _counts(program)
        for variant, of in counts.items():
            for operator, count in of.items():
                if count > self.most:
                    context.refuse(f"{variant}, {operator}", f"it is there {count} times, {self.most} are allowed")
        return program.with_facts(OperatorCounts(counts))


def _counts(program: Program) -> dict[str, dict[str, int]]:
    return {
        name: dict(Counter(str(node.target) for node in variant.graph.nodes if node.op == "call_function"))
        for name, variant in program.variants.items()
    }
