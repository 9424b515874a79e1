"""Reading the files of a folder from an untrusted source: no link out of it, no device, no pipe, no invalid JSON."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import ValidationError

from qcgraph.errors import BundleError, QcgraphError
from qcgraph.files import documents

AGAIN = "copy or compile the bundle again"
LARGEST_RECORD = 2**26  # bytes of a file that lists other files; a list of ten thousand files takes two million
MISSING = "the file is missing"
_SHA256_DIGITS = frozenset("0123456789abcdef")
_Value = TypeVar("_Value")


def name_problem(name: str) -> str:
    """Return why a name cannot be that of a file in a folder, or an empty string if it can."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or Path(name).is_absolute():
        return "is outside the bundle"
    if path.as_posix() != name or not path.parts:
        return "is not the plain path of a file"
    return "" if name.isprintable() else "is no name of a file"


def path_problem(folder: Path, name: str) -> str:
    """Return why a file of a folder must not be opened, or an empty string for a regular file in the folder."""
    try:
        real = (folder / name).resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            return "is a link that leads out of the folder; copy what it leads to (cp -rL)"
        return "" if stat.S_ISREG(real.stat().st_mode) else "is not a regular file"
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except RuntimeError:  # raised by Python before 3.13
        return "is a link that leads in a circle"
    except (OSError, ValueError) as error:
        return f"cannot be read: {error.strerror if isinstance(error, OSError) else error}"


def read_file(folder: Path, name: str, *, largest: int = LARGEST_RECORD, hint: str = AGAIN) -> bytes:
    """Read a file of a folder; a pipe or a device is not even opened.

    Args:
        folder: the folder.
        name: the name of the file, which must not lead out of the folder.
        largest: the size in bytes above which a file is refused.
        hint: what the user can do about a file that cannot be read.

    Raises:
        BundleError: the file is missing, leads out of the folder, is too large, or cannot be read.
    """
    if problem := path_problem(folder, name):
        raise BundleError(problem, where=str(folder / name), hint=hint)
    return documents.read_bytes(folder / name, hint=hint, error=BundleError, most_bytes=largest)


def text_of(content: bytes, where: str, *, hint: str = AGAIN) -> str:
    """Return the content of a file as text.

    Raises:
        BundleError: the content is not UTF-8.
    """
    return documents.parse_text(content, where=where, hint=hint, error=BundleError)


def parsed(where: str, text: str, build: Callable[[Any], _Value], *, hint: str = AGAIN, finite: bool = True) -> _Value:
    """Return what ``build`` makes of JSON text; numbers have to be finite if ``finite``.

    Raises:
        BundleError: the text is not JSON, or not of the shape that ``build`` expects.
    """
    try:
        return build(documents.parse_json(text, where=where, hint=hint, error=BundleError, finite=finite))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{place}: {first['msg']}", where=where, hint=hint) from None
    except BundleError:
        raise
    except QcgraphError as error:
        raise BundleError(error.message, where=where, hint=hint) from None
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise BundleError(f"is not of the expected form ({_shown(error)})", where=where, hint=hint) from None


def record_of(folder: Path, name: str) -> Mapping[str, Any]:
    """Return the JSON object in a file of a folder, or an empty one where the file is not such an object."""
    try:
        data = parsed(name, text_of(read_file(folder, name), name), lambda data: data)
    except BundleError:
        return {}
    return data if isinstance(data, dict) else {}


def recorded_hashes(data: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the sha256 of every file that a record of qcgraph lists; None where the data is not such a record."""
    files = data.get("files")
    if not isinstance(data.get("qcgraph"), str) or not isinstance(files, dict):
        return None
    hashes: dict[str, str] = {}
    for name, entry in files.items():
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if not is_sha256(digest):
            return None
        hashes[name] = str(digest)
    return hashes


def is_sha256(value: object) -> bool:
    """Return whether a value is a sha256 in hexadecimal digits."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= _SHA256_DIGITS


def _shown(error: Exception) -> str:
    """Return an error in short, even if it quotes a long value."""
    text = repr(error)
    return text if len(text) <= 200 else f"{text[:200]}..."
