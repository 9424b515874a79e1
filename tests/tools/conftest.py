"""Tools that run in this process, as their command line would: each in a process of its own imports PyTorch anew."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@dataclass(frozen=True)
class Done:
    """What a tool did, with the names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run ``tools/NAME`` with arguments in a folder."""

    def call(name: str, *arguments: object, folder: Path) -> Done:
        module = importlib.import_module(name.removesuffix(".py"))
        with monkeypatch.context() as patched:
            patched.chdir(folder)
            patched.setattr(sys, "argv", [str(TOOLS / name), *map(str, arguments)])
            try:
                code = module.main()
            except SystemExit as left:
                code = left.code
        if isinstance(code, str):  # as Python does with what `sys.exit` is told
            sys.stderr.write(f"{code}\n")
            code = 1
        captured = capsys.readouterr()
        return Done(code or 0, captured.out, captured.err)

    monkeypatch.syspath_prepend(TOOLS)
    return call
