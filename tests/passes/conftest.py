"""Programs at the stages that passes start from."""

from __future__ import annotations

import pytest

from qcgraph.facts import ActivationQuant, QuantPlan, Ranges, SiteQuant, SiteRange, WeightQuant
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.plan.steps import StepPlan


@pytest.fixture(scope="session")
def ranged(cached: Program) -> Program:
    """The cached program with hand-written ranges: at the i-th computing step every site sees [-1, 1 + i]."""
    steps = tuple(index for index in range(9) if cached.facts[StepPlan].computes(index))
    site = SiteRange(
        steps=steps,
        lows=(-1.0,) * len(steps),
        highs=tuple(1.0 + index for index in range(len(steps))),
        mean_squares=(1.0,) * len(steps),
    )
    sites = {site.name: site for site in find_sites(cached.variants["full"])}
    names = [name for name, found in sites.items() if not found.refusal]
    return cached.with_facts(Ranges(dict.fromkeys(names, site), dict.fromkeys(names, site), 4))


@pytest.fixture(scope="session")
def planned(cached: Program) -> Program:
    """The cached program with a hand-written plan: one site in three groups, one static."""
    grouped = ActivationQuant((0.02, 0.03, 0.04), (100, 110, 120), 0, 255, "uint8")
    static = ActivationQuant((0.05,), (128,), 0, 255, "uint8")
    weight = WeightQuant(64)
    plan = QuantPlan({"blocks.0.attn.qkv": SiteQuant(grouped, weight), "blocks.1.mlp.fc1": SiteQuant(static, weight)})
    steps = cached.facts[StepPlan]
    groups = [index // 3 for index in range(len(steps))]
    return cached.with_facts(plan, steps.with_groups(groups))
