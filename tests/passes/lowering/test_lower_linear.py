"""lower-linear: the same function in the form that int8 kernels are matched in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qcgraph.ir.program import Program

Run = Callable[[str, Program], Program]


def test_golden(planned: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    program = run("insert-qdq", planned)
    golden_diff("lower-linear", program, run("lower-linear", program))


def test_it_is_the_same_function(planned: Program, run: Run) -> None:
    program = run("insert-qdq", planned)
    lowered = run("lower-linear", program)
    inputs = {
        "latent": torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.full((3,), 700.0),
        "class_label": torch.arange(3),
        "group": torch.tensor(2),
    }
    one, other = (candidate.run("full", inputs)["noise_prediction"] for candidate in (program, lowered))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_nothing_quantized_nothing_changed(captured: Program, run: Run) -> None:
    assert not run("lower-linear", captured).history[-1].changed
