"""qcgraph export: what is refused, before anything is written. What it writes is tested with the exporter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ([], "Missing option"),
        (["--format", "trition", "-o", "out"], "--format: unknown format 'trition'\n\nhint: did you mean 'triton'?"),
        (["--format", "triton", "-o", "out"], "the bundle has no full.onnx"),
        (["--format", "onnx-single", "-o", "out"], "the bundle has no full.onnx"),
    ],
)
def test_refused(
    qcgraph: Command, bundle: Path, options: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = qcgraph("export", bundle, *options)
    assert (done.code, done.out) == (2, "")
    assert what in done.err
    assert "\n\nhint: " in done.err
    assert not Path("out").exists()


def test_a_place_that_is_something_else_is_left_alone(qcgraph: Command, bundle: Path) -> None:
    before = sorted(bundle.rglob("*"))
    done = qcgraph("export", bundle, "--format", "triton", "-o", bundle, "--force")
    assert (done.code, done.out) == (2, "")
    assert sorted(bundle.rglob("*")) == before
