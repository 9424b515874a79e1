"""The errors that qcgraph raises on purpose: where, what, and a hint on what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QcgraphError(Exception):
    """A refusal with a reason.

    Args:
        message: what is wrong, in one sentence.
        where: the place of the problem (node, module path, file, option), if there is one.
        hint: what the user can do about it.
    """

    exit_code = 2

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return f"{head}\n\nhint: {self.hint}" if self.hint else head


class UsageError(QcgraphError):
    """Wrong usage or input: an unknown name, a value out of range, an unreadable file."""


class CaptureError(QcgraphError):
    """The model cannot be captured, with the reason."""


class ContractError(QcgraphError):
    """A pass broke its contract: a missing fact, an illegal program, a mutated input."""


class BundleError(QcgraphError):
    """A bundle is incomplete, changed, or used outside the plan that it was compiled for."""


class VerificationError(QcgraphError):
    """A verification or a quality gate failed; the command exits with 1."""

    exit_code = 1


class RefusedError(VerificationError):
    """A compilation is valid but not good enough: an unsafe cache, or a gate that is not met."""


def shown(value: object, most: int = 80) -> str:
    """Return a value of any type as an error may quote it, in one short line.

    Args:
        value: the value.
        most: the number of characters to quote; the middle of a longer text is left out.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or deep nesting: Python prints neither
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"


def closest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest known name, then all of them.

    Args:
        name: the unknown name.
        known: the names that exist.

    Returns:
        One sentence for the ``hint`` of an error.
    """
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {matches[0]!r}? " if matches else ""
    return f"{guess}known: {', '.join(names)}"
