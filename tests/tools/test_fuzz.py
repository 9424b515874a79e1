"""A short run of tools/fuzz.py: every door takes an input or refuses it in words."""

from __future__ import annotations

import importlib
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcgraph.errors import UsageError

TOOLS = Path(__file__).resolve().parents[2] / "tools"
# How many inputs a door gets, which is about a second each.
INPUTS = {
    "recipe": 300,
    "pipeline": 300,
    "plan": 200,
    "schedule": 500,
    "command": 30,
    "checkpoint": 150,
    "folder": 30,
    "bundle": 40,
    "program": 2,
}


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("fuzz")


@pytest.fixture(scope="module")
def doors(fuzz: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fuzz.make_doors(fuzz.make_samples(tmp_path_factory.mktemp("fuzz")))


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_every_input_is_taken_or_refused_in_words(fuzz: Any, doors: dict[str, Any], name: str) -> None:
    assert set(doors) == set(INPUTS)
    with fuzz.guarded():
        tally = fuzz.fuzz([doors[name]], INPUTS, seed=0)
    assert list(tally.findings.values()) == []
    assert sum(tally.outcomes.values()) == INPUTS[name]


def enter_odd_door(data: bytes) -> str:
    if b"x" in data:
        raise ZeroDivisionError
    if b"h" in data:
        time.sleep(5)
    if data.isdigit():
        raise UsageError("a number", hint="give none" if data < b"5" else None)
    return "passed"


def test_what_is_not_in_words_is_found_shortened_and_kept(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 0.05)
    inputs = [b"abc", b"aaxbbbbbbbbb", b"h", b"1", b"7", b"xx"]
    numbers = iter(range(len(inputs)))

    def draw(_: random.Random) -> bytes:
        return inputs[next(numbers)]

    door = fuzz.Door("odd", draw, enter_odd_door)
    with fuzz.guarded():
        tally = fuzz.fuzz([door], {"odd": len(inputs)}, seed=0)
    outcomes = {"passed": 1, "traceback": 2, "hang": 1, "refused": 1, "no hint": 1}
    assert tally.outcomes == {("odd", outcome): count for outcome, count in outcomes.items()}
    found = list(tally.findings.values())
    assert [(item.index, item.sample, item.count) for item in found] == [(1, b"x", 2), (2, b"h", 1), (4, b"7", 1)]
    fuzz.keep(found, 0, tmp_path)
    assert (tmp_path / "odd-0-1.input").read_bytes() == b"x"
    assert sys.exc_info() == (None, None, None)
