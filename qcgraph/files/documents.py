"""Read JSON and TOML that anybody may have written: as a whole, with limits, and with errors in words.

Recipes, plans, bundles and folders of models are read here, so that problems of a file, apart from its meaning, are
handled in one place: it is missing, not a file, not readable, too large, not UTF-8, not valid syntax, nested too
deeply, has a key twice, or holds a number or a character that cannot be represented. No torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcgraph.errors import QcgraphError, UsageError, shown

MOST_JSON_BYTES = 256 * 2**20  # the program of a large model, whose facts hold the scales of every step, is below 50 MB
MOST_TOML_BYTES = 2**20  # a recipe with a plan of a thousand steps is below 50 kB
MOST_LEVELS = 64  # levels of nesting; files of qcgraph have about ten
MOST_BITS = 64  # bits of a whole number, the limit of TOML
_TOO_DEEP = f"is nested more than {MOST_LEVELS} levels deep"
_TOO_LARGE = f"holds a whole number of more than {MOST_BITS} bits"
_SUSPECT = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)|\\U0{8}")  # half a surrogate pair, or NUL
# A key of many parts takes time and memory by the square of their number, and tomllib does not limit it.
_LONG_KEY = re.compile(rf"(?<![\w\"'-])[\w\"'-]+(?:[ \t]*\.[ \t]*[\w\"'-]+){{{MOST_LEVELS},}}")


def read_json(
    path: Path,
    *,
    hint: str,
    error: type[QcgraphError] = UsageError,
    most_bytes: int = MOST_JSON_BYTES,
    finite: bool = True,
) -> Any:
    """Read a JSON file; see `read_text` and `parse_json`, whose errors it raises."""
    text = read_text(path, hint=hint, error=error, most_bytes=most_bytes)
    return parse_json(text, where=str(path), hint=hint, error=error, finite=finite)


def read_toml(
    path: Path, *, hint: str, error: type[QcgraphError] = UsageError, most_bytes: int = MOST_TOML_BYTES
) -> dict[str, Any]:
    """Read a TOML file; see `read_text` and `parse_toml`, whose errors it raises."""
    return parse_toml(
        read_text(path, hint=hint, error=error, most_bytes=most_bytes), where=str(path), hint=hint, error=error
    )


def read_text(
    path: Path, *, hint: str, error: type[QcgraphError] = UsageError, most_bytes: int = MOST_JSON_BYTES
) -> str:
    """Read a UTF-8 file; see `read_bytes` and `parse_text`, whose errors it raises."""
    content = read_bytes(path, hint=hint, error=error, most_bytes=most_bytes)
    return parse_text(content, where=str(path), hint=hint, error=error)


def read_bytes(
    path: Path, *, hint: str, error: type[QcgraphError] = UsageError, most_bytes: int = MOST_JSON_BYTES
) -> bytes:
    """Read a file without ever waiting for it.

    Args:
        path: a regular file; a pipe or a device is refused, because reading one may never end.
        hint: what the user can do about a file that cannot be read.
        error: the type of the error to raise.
        most_bytes: the size above which a file is refused unread.

    Raises:
        QcgraphError: of the type ``error``; the file is missing, not regular, not readable, or too large.
    """
    try:
        # Opening a pipe waits for a writer unless it is told not to.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as stream:
            if kind := _not_regular(os.fstat(descriptor).st_mode):
                raise error(kind, where=str(path), hint=hint)
            content = stream.read(most_bytes + 1)
    except FileNotFoundError:
        raise error("there is no such file", where=str(path), hint=hint) from None
    except IsADirectoryError:
        raise error("is a folder, not a file", where=str(path), hint=hint) from None
    except OSError as problem:
        raise error(f"cannot be read: {problem.strerror}", where=str(path), hint=hint) from None
    except ValueError as problem:  # a NUL character or half a surrogate pair in the name
        raise error(f"cannot be the name of a file: {problem}", where=repr(str(path)), hint=hint) from None
    if len(content) > most_bytes:
        raise error(f"is larger than {_size_text(most_bytes)}", where=str(path), hint=hint)
    return content


def parse_text(content: bytes, *, where: str, hint: str, error: type[QcgraphError] = UsageError) -> str:
    """Decode UTF-8 text, which may begin with a byte order mark, as some editors write.

    Raises:
        QcgraphError: of the type ``error``; the content is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"is not UTF-8 text, at byte {problem.start}", where=where, hint=hint) from None


def parse_json(text: str, *, where: str, hint: str, error: type[QcgraphError] = UsageError, finite: bool = True) -> Any:
    """Parse JSON more strictly than ``json.loads``: accepted values can be written, printed and compared safely.

    Args:
        text: the JSON.
        where: the name of the text in errors, a file name for example.
        hint: what the user can do about an error.
        error: the type of the error to raise.
        finite: whether to refuse infinity and NaN, which JSON does not have but Python writes.

    Raises:
        QcgraphError: of the type ``error``; the text is not JSON, a key occurs twice, a number is too large or not
            finite, a string holds half a surrogate pair or NUL, or values are nested more than `MOST_LEVELS` deep.
    """

    def number(digits: str) -> float:
        value = float(digits)
        if finite and not math.isfinite(value):
            raise error(f"holds {digits[:40]}, which is no finite number", where=where, hint=hint)
        return value

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise error(f"says {shown(twice)} twice", where=where, hint=hint)
        return data

    try:
        data = json.loads(text, parse_float=number, parse_constant=number, object_pairs_hook=once)
    except json.JSONDecodeError as problem:
        raise error(f"is not valid JSON: {problem}", where=where, hint=hint) from None
    except RecursionError:
        raise error(_TOO_DEEP, where=where, hint=hint) from None
    except ValueError:  # the only other one: Python reads no whole number of more than 4300 digits
        raise error(_TOO_LARGE, where=where, hint=hint) from None
    if found := _problem(data, suspect=_SUSPECT.search(text) is not None):
        raise error(found, where=where, hint=hint)
    return data


def parse_toml(text: str, *, where: str, hint: str, error: type[QcgraphError] = UsageError) -> dict[str, Any]:
    """Parse TOML; its numbers may be infinite or NaN, which the model that takes them has to refuse.

    Args:
        text: the TOML.
        where: the name of the text in errors, a file name for example.
        hint: what the user can do about an error.
        error: the type of the error to raise.

    Raises:
        QcgraphError: of the type ``error``; the text is not TOML, a whole number is too large, a string holds NUL, or
            values are nested more than `MOST_LEVELS` deep.
    """
    if len(text) > MOST_TOML_BYTES:
        raise error(f"is larger than {MOST_TOML_BYTES // 2**20} MiB", where=where, hint=hint)
    if _LONG_KEY.search(text):
        raise error(_TOO_DEEP, where=where, hint=hint)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise error(f"is not valid TOML: {problem}", where=where, hint=hint) from None
    except RecursionError:
        raise error(_TOO_DEEP, where=where, hint=hint) from None
    except ValueError:  # as in JSON
        raise error(_TOO_LARGE, where=where, hint=hint) from None
    if found := _problem(data, suspect=_SUSPECT.search(text) is not None):
        raise error(found, where=where, hint=hint)
    return data


def as_path(value: object, *, where: str) -> Path:
    """Return the path that a caller gave, after a check by the system that it can be a path.

    Args:
        value: a string or a path object; no file has to be there.
        where: the name of the argument, for errors.

    Raises:
        UsageError: the value is of another type or empty, or the system refuses the path: it is too long, goes in a
            circle of links, or through a folder that may not be read.
    """
    hint = "give the path of a file or folder"
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise UsageError(f"{shown(value)} is no path", where=where, hint=hint)
    if not is_text(text):
        raise UsageError(f"{shown(text)} is no path that can be written down", where=where, hint=hint)
    try:
        os.stat(text)  # noqa: PTH116 - a Path would make of the text what the system never sees
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as problem:
        raise UsageError(f"{shown(text)}: {problem.strerror}", where=where, hint=hint) from None
    return Path(text)


def is_text(value: str) -> bool:
    """Return whether a string can be encoded, printed and passed to the system: no NUL, no half of a surrogate pair."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _size_text(count: int) -> str:
    return f"{count // 2**20} MiB" if count >= 2**20 else f"{count} bytes"


def _not_regular(mode: int) -> str:
    if stat.S_ISREG(mode):
        return ""
    return "is a folder, not a file" if stat.S_ISDIR(mode) else "is a pipe or a device, not a file"


def _problem(data: Any, *, suspect: bool) -> str:
    """Say which value would break code that uses the values, or return an empty string; does not recurse.

    Args:
        data: the parsed values.
        suspect: whether to look for invalid characters in strings, too.
    """
    level, values = 0, [data]
    while values:
        inner: list[Any] = []
        for value in values:
            if isinstance(value, dict):
                inner.extend(value.values())
                if suspect:
                    inner.extend(value)
            elif isinstance(value, list):
                inner.extend(value)
            elif isinstance(value, int) and value.bit_length() > MOST_BITS:
                return _TOO_LARGE
            elif suspect and isinstance(value, str) and not is_text(value):
                return "holds NUL or half of a surrogate pair, which is no character"
        level, values = level + 1, inner
        if level > MOST_LEVELS:
            return _TOO_DEEP
    return ""
