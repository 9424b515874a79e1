"""Checks that files are as they were when a bundle was opened, however long ago.

A bundle is replaced as one folder. Files that were opened before keep their content, and files that are opened after
would belong to another bundle. Weights are mapped into memory: a write to their file changes the loaded weights.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qcgraph.bundle.manifest import FileEntry, read_manifest
from qcgraph.bundle.read import Bundle
from qcgraph.errors import BundleError
from qcgraph.files.folder import AGAIN

_Place = tuple[int, int]  # the device and the inode of a file
_State = tuple[int, int]  # the size of a file in bytes, and the time of the last write in nanoseconds


class OpenFile:
    """A file that is held open to detect later writes to it.

    Args:
        path: the file.
        entry: the file's entry in the manifest.

    Raises:
        BundleError: the file cannot be opened.
    """

    def __init__(self, path: Path, entry: FileEntry) -> None:
        self._path = path
        self._entry = entry
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise BundleError(f"cannot be read: {error.strerror}", where=str(path), hint=AGAIN) from None
        weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()
        self._state = self._now()[1]

    def check(self) -> None:
        """Refuse a file that was written to; a different file at its path does not matter.

        Raises:
            BundleError: the content differs from the manifest.
        """
        if self._now()[1] == self._state:
            return
        with self._lock:
            state = self._now()[1]
            if state[0] != self._entry.bytes or self._sha256() != self._entry.sha256:
                raise BundleError(
                    "the file was written to after the bundle was loaded, and what was loaded reads it in place",
                    where=str(self._path),
                    hint="load the bundle again; qcgraph compile --force replaces one that is in use without "
                    "touching it",
                )
            self._state = state

    def is_at_its_path(self) -> bool:
        """Tell whether the path still leads to this file, and the file is unchanged since it was opened."""
        try:
            found = self._path.stat()
        except OSError:
            return False
        return self._now() == ((found.st_dev, found.st_ino), self._state)

    def _sha256(self) -> str:
        with os.fdopen(os.dup(self._descriptor), "rb") as stream:
            stream.seek(0)  # users of the descriptor share its position, hence the lock
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def _now(self) -> tuple[_Place, _State]:
        found = os.fstat(self._descriptor)
        return (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns)


@contextmanager
def reading(bundle: Bundle, names: Iterable[str] = (), done: str = "loaded") -> Iterator[Mapping[str, OpenFile]]:
    """Read files of a bundle by their paths, and ensure afterwards that all of them belonged to this one bundle.

    Args:
        bundle: an opened bundle.
        names: files to hold open in their present state; names that the bundle does not have are ignored.
        done: the use of the bundle for the error message: loaded, verified, built into engines.

    Yields:
        The open files by name.

    Raises:
        BundleError: the bundle was replaced, changed or deleted meanwhile, whether the body succeeded or not.
    """
    files = {}
    for name in dict.fromkeys(names):
        if name in bundle.manifest.files:
            try:
                files[name] = OpenFile(bundle.path / name, bundle.manifest.files[name])
            except BundleError:
                _require_same(bundle, done)
                raise
    try:
        yield files
    except Exception:  # missing files are the cause, whatever error a library raises about them
        _require_same(bundle, done)
        raise
    _require_same(bundle, done)
    if not all(file.is_at_its_path() for file in files.values()):
        raise _replaced(bundle, done)


def _require_same(bundle: Bundle, done: str) -> None:
    """Refuse a bundle that is no longer at its path."""
    with suppress(BundleError):
        if read_manifest(bundle.path) == bundle.manifest:
            return
    raise _replaced(bundle, done)


def _replaced(bundle: Bundle, done: str) -> BundleError:
    return BundleError(
        f"the bundle was replaced, changed or deleted while it was {done}", where=str(bundle.path), hint="do it again"
    )
