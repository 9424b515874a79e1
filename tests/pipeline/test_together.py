"""Rows and trajectories that run together: as many as the widest activation leaves room for."""

from __future__ import annotations

import pytest

from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.pipeline import together
from qcgraph.pipeline.together import rows_together, tokens, trajectories_together

SITES = {"blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.attn.proj"}


def test_rows_that_fit_together(captured: Program) -> None:
    sites = [site for site in find_sites(captured.variants["main"]) if site.name in SITES]
    assert rows_together(sites, held=4 * 16 * 128 * 7) == 7  # 16 tokens of 128 channels are the widest
    assert rows_together(sites, held=1) == 2
    assert rows_together([]) >= 2
    assert (tokens(sites), tokens([])) == (16, 1)


@pytest.mark.parametrize(("rows", "trajectories"), [(1, 1), (2, 1), (20, 10), (10_000, 64)])
def test_few_trajectories_of_a_large_model_run_together(
    captured: Program, monkeypatch: pytest.MonkeyPatch, rows: int, trajectories: int
) -> None:
    """Each takes two rows under guidance."""
    monkeypatch.setattr(together, "rows_together", lambda sites, held: rows)
    assert trajectories_together(captured) == trajectories
