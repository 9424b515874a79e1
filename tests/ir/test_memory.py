"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLES = """
import numpy as np
from qcgraph.benchmark.machine import resident_bytes
from qcgraph.ir.memory import release_memory
values = [np.ones(12_000) for _ in range(4000)]  # 96 kB each, which lie one after the other
held = values[::50]
del values
before = resident_bytes()
release_memory()
print(before - resident_bytes())
assert all(value.all() for value in held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps what lies between blocks that are in use")
def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 300e6
