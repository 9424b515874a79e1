"""Gates: what they read, what they refuse, what they let through."""

from __future__ import annotations

import math

import pytest

from qcgraph.errors import UsageError, VerificationError
from qcgraph.recipe.gate import Gate, require


def test_text_round_trip() -> None:
    exact = Gate.parse("psnr>=28.123456789")
    assert Gate.parse(exact.text) == exact
    gate = Gate.parse(" psnr >= 28, accuracy_drop<=1e-2 ,kid<-0.5")
    assert gate.text == "psnr>=28,accuracy_drop<=0.01,kid<-0.5"
    assert Gate.parse(gate.text) == gate


def test_metrics_are_named_once() -> None:
    assert Gate.parse("accuracy>=0.9,accuracy_drop<=0.01,fid_rise<=1").metrics == ("accuracy", "fid_small")


@pytest.mark.parametrize(
    ("term", "value", "passed"),
    [
        ("psnr>=28", 28.0, True),
        ("psnr>28", 28.0, False),
        ("psnr<=28", 28.0, True),
        ("psnr<28", 27.9, True),
        ("psnr>=28", math.nan, False),
        ("psnr<=28", math.nan, False),
        ("psnr>=28", math.inf, True),
    ],
)
def test_conditions(term: str, value: float, passed: bool) -> None:
    (verdict,) = Gate.parse(term).check({"psnr": value})
    assert verdict.passed is passed
    assert verdict.value is value


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("psn>=28", "no term 'psn'", "did you mean 'psnr'"),
        ("psnr=28", "cannot read 'psnr=28'", 'write it as "psnr>=28'),
        ("psnr>=", "cannot read", "write it as"),
        ("psnr>=1e", "'1e' is no number", "write it as"),
        ("psnr>=1e999", "'1e999' is no finite number", "write it as"),
        ("psnr>=" + "9" * 10**6, "is no finite number", "write it as"),
        ("", "cannot read ''", "write it as"),
        ("psnr>=28,", "cannot read ''", "write it as"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        Gate.parse(text)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_the_offending_term_is_named() -> None:
    verdicts = Gate.parse("psnr>=28,accuracy_drop<=0.01").check({"psnr": 30.0, "accuracy_drop": 0.25})
    with pytest.raises(VerificationError, match=r"accuracy_drop<=0.01 \(it is 0.25\)") as caught:
        require(verdicts, hint="so it is")
    assert "psnr" not in caught.value.message
    require(verdicts[:1], hint="so it is")
