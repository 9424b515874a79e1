"""Files and folders that are written in one piece: complete in their place, or not there at all.

A folder is filled as a hidden neighbour of its place and renamed into it, under a lock. A process that is killed at
any moment leaves the old folder or none; what else it left is cleared by the next one that writes to the same place.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qcgraph.errors import UsageError

_ELSEWHERE = "choose another place"

IsOurs = Callable[[Path], bool]


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that is written in one piece, and never over anybody's data.

    Attributes:
        is_ours: tells a folder of this kind from others.
        refusal: what is said of a place that holds something else.
        stranger: a file in a folder of this kind that was not written with it, if there is one.
    """

    is_ours: IsOurs
    refusal: str
    stranger: Callable[[Path], str | None]

    def check(self, path: Path, *, force: bool) -> None:
        """Refuse a place that cannot be written to; call it before any work begins.

        Raises:
            UsageError: something is there (with ``force``: something else than a folder of this kind), the folder
                around it cannot be written, or another process writes there now.
        """
        place = resolved(path)
        if not place.parent.is_dir():
            check_creatable(place)
            return
        with locked(place):
            clear(place, self.is_ours)
            self._check_replaceable(place, path, force=force)

    @contextmanager
    def writing(self, path: Path, *, force: bool) -> Iterator[Path]:
        """Write a folder: the body fills the one that it is given, which takes its place after it.

        Raises:
            UsageError: see `check`.
        """
        self.check(path, force=force)
        place = resolved(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place):
            self._check_replaceable(place, path, force=force)
            with replacing_folder(place, self.is_ours) as folder:
                yield folder

    def _check_replaceable(self, place: Path, path: Path, *, force: bool) -> None:
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return
        if not self.is_ours(place):
            raise UsageError(self.refusal, where=str(path), hint="choose another place, or move it away")
        if not force:
            raise UsageError("exists", where=str(path), hint="give --force to replace it, or choose another place")
        stranger = self.stranger(place)
        if stranger is not None:
            raise UsageError(
                f"holds {stranger}, which qcgraph did not write", where=str(path), hint="move that file away first"
            )


def check_file(path: Path) -> None:
    """Refuse a place that a file cannot be written to; call it before any work begins.

    Raises:
        UsageError: the path is a folder, or the folder around it is missing or cannot be written.
    """
    if path.is_dir():
        raise UsageError("is a folder", where=str(path), hint="give the path of a file")
    if path.parent.is_file():
        raise UsageError(f"cannot be made, because {path.parent} is a file", where=str(path), hint=_ELSEWHERE)
    if not path.parent.is_dir():
        raise UsageError("the folder around it does not exist", where=str(path), hint=f"make {path.parent} first")
    _check_writable(path.parent, path)


@contextmanager
def writing_file(path: Path) -> Iterator[Path]:
    """Write a file: the body writes the one that it is given, which takes its place after it.

    Raises:
        UsageError: see `check_file`.
    """
    check_file(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(place: Path, is_ours: IsOurs) -> Iterator[Path]:
    """Write a folder: the body fills the one that it is given, which takes its place after it.

    Call it with the lock of the place held.

    Args:
        place: a resolved path; what is there, a folder, is replaced.
        is_ours: tells a folder that this function wrote from others.
    """
    clear(place, is_ours)
    partial = _beside(place, "partial")
    partial.mkdir()
    try:
        yield partial
        if place.exists() and any(place.iterdir()):
            place.rename(_beside(place, "old"))
        partial.rename(place)
    finally:
        clear(place, is_ours)


def clear(place: Path, is_ours: IsOurs) -> None:
    """Take away what an interrupted process left, and put back what it had moved aside. Needs the lock."""
    old = _beside(place, "old")
    if old.exists() and not place.exists():
        old.rename(place)
    if old.exists() and is_ours(place):
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(_beside(place, "partial"), ignore_errors=True)


def restore_interrupted(path: Path, is_ours: IsOurs) -> None:
    """Put back a folder whose replacement was killed between its two renames; does nothing otherwise."""
    try:
        place = path.resolve()
    except (OSError, RuntimeError):  # links in a circle: nothing is there, which whoever opens it says
        return
    if place.name and not place.exists() and _beside(place, "old").exists():
        with locked(place, wait=True):
            clear(place, is_ours)


def resolved(path: Path) -> Path:
    """The place itself where the path is a link, so that what is renamed is on the same file system.

    Raises:
        UsageError: the path has no name of its own.
    """
    try:
        place = path.resolve(strict=path.is_symlink())
    except FileNotFoundError:  # a link to what does not exist yet
        place = path.resolve()
    except (OSError, RuntimeError):
        raise UsageError("links to itself", where=str(path), hint=_ELSEWHERE) from None
    if not place.name:
        raise UsageError("is no place for a new folder", where=str(path), hint="give the path of a new folder")
    return place


def check_creatable(place: Path) -> None:
    """Refuse a place whose parent folder does not exist and cannot be made.

    Raises:
        UsageError: says why.
    """
    existing = next(folder for folder in place.parents if folder.exists())
    if not existing.is_dir():
        raise UsageError(f"cannot be made, because {existing} is a file", where=str(place), hint=_ELSEWHERE)
    _check_writable(existing, place)


def _check_writable(folder: Path, path: Path) -> None:
    """Refuse a folder in which nothing can be made; tried, because permissions alone do not tell."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise UsageError(
            f"cannot be made, because nothing can be written in {folder}: {error.strerror}",
            where=str(path),
            hint=_ELSEWHERE,
        ) from None


@contextmanager
def locked(place: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a place; the system releases it when the process ends, in whatever way.

    Args:
        place: a resolved path whose parent exists.
        wait: whether to wait for another process that holds it.

    Raises:
        UsageError: the lock cannot be made there, or another process holds it.
    """
    if sys.platform == "win32":  # no flock: two processes that write to the same place are not kept apart
        yield
        return
    lock = _beside(place, "lock")
    descriptor = _acquire(lock, place, wait=wait)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock: Path, place: Path, *, wait: bool) -> int:
    import fcntl

    while True:
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise UsageError(f"cannot be written: {error.strerror}", where=str(place), hint=_ELSEWHERE) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                "another process is writing there", where=str(place), hint="wait for it, or choose another place"
            ) from None
        if _is_file_of(lock, descriptor):
            return descriptor
        os.close(descriptor)  # its holder has removed the file meanwhile: this lock is worth nothing


def _is_file_of(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _beside(place: Path, what: str) -> Path:
    """A hidden neighbour: ``partial`` (being written), ``old`` (being replaced) or ``lock``."""
    return place.with_name(f".{place.name}.qcgraph-{what}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
