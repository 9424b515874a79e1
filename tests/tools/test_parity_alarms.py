"""The tool that counts false alarms of parity counts them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from qcgraph.export.check import parity


@pytest.mark.slow
def test_alarms_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tools")
    tool = importlib.import_module("parity_alarms")
    monkeypatch.setattr(sys, "argv", ["parity_alarms.py", "--models", "1", "--draws", "1"])
    tool.main()
    assert capsys.readouterr().out.startswith("0 of 1 checks fail")
    monkeypatch.setattr(parity, "_limit", lambda roundings, flips: 1e-12)  # so that compiling is refused, too
    tool.main()
    assert "\n1 of 1 checks fail" in capsys.readouterr().out
