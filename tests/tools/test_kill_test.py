"""Commands that are killed while they write leave the old or the new, whole, and nothing for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CUTS = 3
TOOL = Path(__file__).resolve().parents[2] / "tools" / "kill_test.py"


def killed(folder: Path, *arguments: object) -> dict[str, dict[str, int]]:
    """The counts of the tool; it fails where a point does."""
    command = [sys.executable, TOOL, *map(str, arguments), "--json", "counts.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads((folder / "counts.json").read_text()))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads /proc")
def test_every_command_is_killed_at_some_points(tmp_path: Path) -> None:
    """At points spread over the command; without ``--cuts``, the tool takes all of them."""
    counts = killed(tmp_path, "--cuts", CUTS)
    commands = {"compile", "export", "sample", "eval", "compile-renaming"}
    assert counts.keys() == commands | ({"build"} if find_spec("tensorrt_rtx") else set())
    for tally in counts.values():
        assert tally["points"] >= CUTS
        assert min(tally["old"], tally["new"], tally["left"], tally["again"]) > 0
        assert tally["failures"] == []
