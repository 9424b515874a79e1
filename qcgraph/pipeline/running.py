"""Open the runner of a program, for passes that sample with it many times and observe nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.sampling.runner import Runner

Running: TypeAlias = Callable[[Program], AbstractContextManager[Runner]]


@contextmanager
def in_torch(program: Program) -> Iterator[Runner]:
    """Run a program in PyTorch."""
    yield TorchRunner(program)
