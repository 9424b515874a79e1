"""Files and folders that are written in one piece: complete in their place, or not there at all.

New content is written to a hidden neighbour of its place, under a lock, synced to the disk, and renamed into its place;
only then is the old content removed. If a process is killed or power fails at any moment, the old or the new content is
there, whole. The names of the neighbours follow from the name of the place, so that the next process that writes there
removes the leftovers of an interrupted one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qcgraph.errors import UsageError

_ELSEWHERE = "choose another place"
_KEPT = "make room or choose another place; what was there before is as it was"
_NAMED = 3  # foreign files that an error names before it counts the rest
_LONGEST_NAME = 200  # bytes of a name that its neighbours repeat; file systems allow 255
# Errors of a place that the user can mend. All other errors of the system are raised unchanged.
_PLACE_ERRORS = frozenset(
    (
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    )
)
_NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # errors of file systems that cannot sync a folder
_HERE = -100  # AT_FDCWD: names are relative to the current folder
_EXCHANGE = 2  # RENAME_EXCHANGE
_SCRATCH = "qcgraph-scratch-"
_USED = "used"  # the file whose lock a process holds as long as it uses a temporary folder
_YOUNG = 60.0  # seconds in which a new temporary folder may not be locked yet
_NEIGHBOUR_PART = ".qcgraph-"
_NEIGHBOUR = re.compile(r"\..+\.qcgraph-(partial|old|gone|lock)(\..+)?")

IsOurs = Callable[[Path], bool]
Written = Mapping[str, str | None]


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that is written in one piece, and never over anybody's data.

    Attributes:
        written: returns the files that qcgraph wrote into a folder, by their paths with ``/``, and the sha256 of each
            where one was recorded; None for a folder that is not of this kind.
        refusal: the message about a place that holds anything else.
    """

    written: Callable[[Path], Written | None]
    refusal: str

    def is_ours(self, folder: Path) -> bool:
        """Return whether a folder is of this kind."""
        return self.written(folder) is not None

    def check(self, path: Path, *, force: bool) -> None:
        """Refuse a place that cannot be written to; call it before any work begins.

        Raises:
            UsageError: the place exists (with ``force``: and is not a folder of this kind, or one that holds files
                which qcgraph did not write), the folder around it cannot be written, or another process writes there
                now.
        """
        place = resolved(path)
        with _in_words(path):
            if not place.parent.is_dir():
                check_creatable(place)
                return
            with locked(place):
                clear(place, self.is_ours)
                self._check_replaceable(place, path, force=force)

    @contextmanager
    def writing(self, path: Path, *, force: bool) -> Iterator[Path]:
        """Write a folder: the body fills a new folder, which then replaces the one in place.

        Raises:
            UsageError: see `check`; or the disk is full or fails, and the old content is unchanged.
        """
        place = resolved(path)
        with _in_words(path):
            if not place.parent.is_dir():
                check_creatable(place)
            with _parents(place), locked(place):
                clear(place, self.is_ours)
                self._check_replaceable(place, path, force=force)
                partial = _new_folder(beside(place, "partial"), path)
                try:
                    yield partial
                    _sync_tree(partial)
                    self._check_replaceable(place, path, force=force)  # again, because the body may have taken hours
                    _swap(partial, place)
                finally:
                    clear(place, self.is_ours)

    def remove(self, path: Path) -> None:
        """Remove a folder of this kind, unless it holds anything that qcgraph did not write.

        Raises:
            UsageError: another process writes there now, or the folder cannot be removed.
        """
        place = resolved(path)
        if not place.is_dir():
            return
        with _in_words(path), locked(place):
            clear(place, self.is_ours)
            written = self.written(place)
            if written is not None and not any(_strangers(place, written)):
                place.rename(beside(place, "gone"))
                clear(place, self.is_ours)

    def _check_replaceable(self, place: Path, path: Path, *, force: bool) -> None:
        if _is_current(place):
            raise UsageError(
                "is the current folder or around it, which would be another one afterwards",
                where=str(path),
                hint="give the path of a new folder in it, or go elsewhere first",
            )
        if not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir())):
            return
        written = self.written(place) if place.is_dir() else None
        if written is None:
            raise UsageError(self.refusal, where=str(path), hint="choose another place, or move it away")
        if not force:
            raise UsageError("exists", where=str(path), hint="give --force to replace it, or choose another place")
        if found := list(_strangers(place, written)):
            more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise UsageError(
                f"holds {', '.join(found[:_NAMED])}{more}",
                where=str(path),
                hint="move what you want to keep away, or choose another place; nothing is replaced but what qcgraph "
                "wrote, as it wrote it",
            )


def check_file(path: Path) -> None:
    """Refuse a place that a file cannot be written to; call it before any work begins.

    Raises:
        UsageError: the place is not a file, or the folder around it is missing or cannot be written.
    """
    place = _place_of_file(path)
    with _in_words(path), locked(place, wait=True):
        _remove(_beside_file(place))


@contextmanager
def writing_file(path: Path) -> Iterator[Path]:
    """Write a file: the body writes a new file, which then replaces the one in place.

    Two processes that write to one place take turns.

    Raises:
        UsageError: see `check_file`; or the disk is full or fails, and the old content is unchanged.
    """
    place = _place_of_file(path)
    partial = _beside_file(place)
    with _in_words(path), locked(place, wait=True):
        _remove(partial)
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        try:
            yield partial
            partial.chmod(mode)  # libraries that create the file anew may have changed its mode
            _sync(partial)
            partial.replace(place)
            _sync(place.parent)
        finally:
            _remove(partial)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder for the time of the body, and remove the temporary folders of killed processes."""
    _sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as name, locked(Path(name, _USED)):
        yield Path(name)


def _sweep(parent: Path) -> None:
    """Remove the temporary folders of this user that no process holds any more."""
    for folder in parent.glob(f"{_SCRATCH}*"):
        with suppress(OSError, UsageError):  # it is in use, or is removed at this moment
            found = folder.lstat()
            is_own = stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())
            if sys.platform != "win32" and is_own and time.time() - found.st_mtime > _YOUNG:
                with locked(folder / _USED):
                    _remove(folder)


def clear(place: Path, is_ours: IsOurs) -> None:
    """Remove the leftovers of an interrupted process, and put back the folder that it moved aside. Needs the lock.

    Args:
        place: a resolved path.
        is_ours: returns whether a folder was written there by qcgraph; a folder moved aside is kept beside any other.
    """
    old, gone = beside(place, "old"), beside(place, "gone")
    if old.exists():
        if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
            place.rmdir()
        if not os.path.lexists(place):
            old.rename(place)
        elif is_ours(place):
            _remove(gone)
            old.rename(gone)  # so that a half-removed folder is never put back
    _remove(gone)
    _remove(beside(place, "partial"))


def restore_interrupted(path: Path, is_ours: IsOurs) -> None:
    """Put back a folder whose replacement was killed between its two renames; otherwise do nothing."""
    if not is_interrupted(path):
        return
    place = path.resolve()
    with _in_words(path), locked(place, wait=True):
        if is_interrupted(path):
            clear(place, is_ours)


def is_interrupted(path: Path) -> bool:
    """Return whether a folder is moved aside now, by a process that replaces it or was killed while doing so."""
    try:
        place = path.resolve()
        return bool(place.name) and not os.path.lexists(place) and beside(place, "old").exists()
    except (OSError, RuntimeError, ValueError):  # the path is not valid
        return False


def stamp(path: Path) -> tuple[int, ...] | None:
    """Return numbers that change when a folder is replaced; None where there is no folder."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns, found.st_mtime_ns


def resolved(path: Path) -> Path:
    """Return the place itself where the path is a link, so that renames stay on the same file system.

    Raises:
        UsageError: the path has no name of its own, is a link that leads in a circle, or cannot be a path.
    """
    try:
        place = path.resolve()
        circle = place.is_symlink()  # Python 3.13 returns such a link, earlier versions raise RuntimeError
    except RuntimeError:
        circle = True
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"is no path: {reason}", where=repr(str(path)), hint=_ELSEWHERE) from None
    if circle:
        raise UsageError("is a link that leads in a circle", where=str(path), hint=_ELSEWHERE)
    if not place.name:
        raise UsageError("is no place for a new folder", where=str(path), hint="give the path of a new folder")
    return place


def check_creatable(place: Path) -> None:
    """Refuse a place whose parent folder does not exist and cannot be made.

    Raises:
        UsageError: it cannot be made; the message says why.
    """
    first = next(folder for folder in (place, *place.parents) if folder.parent.exists())
    if not first.parent.is_dir():
        raise UsageError(f"cannot be made, because {first.parent} is a file", where=str(place), hint=_ELSEWHERE)
    if os.path.lexists(first):
        raise UsageError(f"cannot be made, because {first} is a file", where=str(place), hint=_ELSEWHERE)
    with locked(first, wait=True):  # tried, because permissions alone do not decide
        pass


@contextmanager
def locked(place: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a place; the system releases it however the process ends.

    Args:
        place: a resolved path whose parent exists.
        wait: whether to wait for another process that holds it.

    Raises:
        UsageError: the lock cannot be made there, or another process holds it.
    """
    if sys.platform == "win32":  # no flock: two processes that write to the same place are not kept apart
        yield
        return
    lock = beside(place, "lock")
    descriptor = _acquire(lock, place, wait=wait)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder around it may be removed by now
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def beside(place: Path, what: str) -> Path:
    """Return a hidden neighbour: ``partial`` (being written), ``old`` (being replaced), ``gone`` or ``lock``."""
    return place.with_name(f".{_short(place.name)}.qcgraph-{what}")


def _beside_file(place: Path) -> Path:
    """Return the neighbour of a file that is being written; it has the ending by which libraries choose the format."""
    return place.with_name(f".{_short(place.stem)}.qcgraph-partial{place.suffix}")


def _short(name: str) -> str:
    """Return a name, or the beginning and digest of a long one, because the name of a neighbour is longer."""
    data = os.fsencode(name)
    if len(data) <= _LONGEST_NAME:
        return name
    return f"{data[: _LONGEST_NAME // 2].decode('utf-8', 'ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"


def _place_of_file(path: Path) -> Path:
    """Return the place where a file is to be written.

    Raises:
        UsageError: see `check_file`.
    """
    place = resolved(path)
    with _in_words(path):
        if place.is_dir():
            raise UsageError("is a folder", where=str(path), hint="give the path of a file")
        if place.exists() and not place.is_file():
            raise UsageError("is no regular file", where=str(path), hint=_ELSEWHERE)
        if place.parent.is_file():
            raise UsageError(f"cannot be made, because {path.parent} is a file", where=str(path), hint=_ELSEWHERE)
        if not place.parent.is_dir():
            hint = f"make {path.parent} first"
            raise UsageError("the folder around it does not exist", where=str(path), hint=hint)
    return place


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Turn errors of the system about a place into errors in words.

    Raises:
        UsageError: the place cannot be written, or the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        about = str(error.filename or path.name)
        if error.errno not in _PLACE_ERRORS or not (path.name in about or _NEIGHBOUR_PART in about):
            raise
        raise UsageError(f"cannot be written: {error.strerror}", where=str(path), hint=_KEPT) from error


@contextmanager
def _parents(place: Path) -> Iterator[None]:
    """Make the folders around a place; remove them when the body raises, unless they hold anything by then."""
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        for folder in reversed(made):
            folder.mkdir(exist_ok=True)
            _sync(folder.parent)
        yield
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def _swap(partial: Path, place: Path) -> None:
    """Put a folder into its place; the old folder stays beside it until the new one is on the disk.

    Where the system can exchange two names, the place is never empty. Elsewhere it is empty for a moment, and a reader
    in this moment puts the old folder back (see `restore_interrupted`).
    """
    if not place.exists() or not any(place.iterdir()):
        partial.rename(place)
    elif not _exchanged(partial, place):
        place.rename(beside(place, "old"))
        partial.rename(place)
    _sync(place.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step with renameat2 of Linux; return False where this is unavailable."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _sync_tree(folder: Path) -> None:
    """Sync all files of a folder to the disk, and the folders that name them."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    if sys.platform == "win32" and is_folder:
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _NOT_SYNCED:
            raise
    finally:
        os.close(descriptor)


def _is_current(place: Path) -> bool:
    """Return whether the current folder is this place or lies in it, and so would be removed with it."""
    try:
        current = Path.cwd()
    except OSError:  # the current folder is removed already
        return False
    return place == current or place in current.parents


def _strangers(place: Path, written: Written) -> Iterator[str]:
    """Yield the files, folders and links in a folder, even hidden ones, that differ from those that qcgraph wrote."""
    ours = {parent for name in written for parent in PurePosixPath(name).parents}
    for root, folders, files in os.walk(place, onerror=_raise):
        here = PurePosixPath(Path(root).relative_to(place).as_posix())
        for name in sorted(folders):
            if _is_left_over(Path(root, name)):
                folders.remove(name)
            elif here / name not in ours or Path(root, name).is_symlink():
                folders.remove(name)
                yield f"{here / name}{os.sep}, which qcgraph did not write"
        for name in sorted(files):
            if not _is_left_over(Path(root, name)):
                yield from _foreign(Path(root, name), (here / name).as_posix(), written)


def _foreign(path: Path, name: str, written: Written) -> Iterator[str]:
    """Yield how a file differs from the one that qcgraph wrote; nothing where it does not."""
    if name not in written or not stat.S_ISREG(path.lstat().st_mode):
        yield f"{name}, which qcgraph did not write"
        return
    expected = written[name]
    if expected is not None and sha256_of(path) != expected:
        yield f"{name}, which was changed after qcgraph wrote it"


def _is_left_over(path: Path) -> bool:
    """Return whether an interrupted process left this file in a folder, such as a build of engines in a bundle.

    Raises:
        UsageError: the process is still running.
    """
    found = _NEIGHBOUR.fullmatch(path.name)
    if found is None:
        return False
    if found[1] == "lock" and sys.platform != "win32" and path.is_file() and not path.is_symlink():
        os.close(_acquire(path, path.parent, wait=False))
    return True


def _raise(error: OSError) -> None:
    raise error


def sha256_of(path: Path) -> str:
    """Return the sha256 of the present content of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _new_folder(partial: Path, path: Path) -> Path:
    """Make the neighbour in which a folder is written.

    Raises:
        UsageError: a neighbour exists that could not be removed, because it belongs to another user for example.
    """
    try:
        partial.mkdir()
    except FileExistsError:
        said = f"cannot be written: {partial.name} beside it is left over and cannot be removed"
        raise UsageError(said, where=str(path), hint=f"remove {partial.name}, or choose another place") from None
    return partial


def _remove(path: Path) -> None:
    """Remove a neighbour of any kind; the next process tries again if it cannot be removed now."""
    if path.is_dir() and not path.is_symlink():
        _make_writable(path)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _make_writable(folder: Path) -> None:
    """Let the owner remove the content of a folder and of its subfolders, which may have been made read-only."""
    with suppress(OSError):
        folder.chmod(stat.S_IRWXU)
    for root, folders, _ in os.walk(folder):
        for inner in (Path(root, name) for name in folders):
            if not inner.is_symlink():
                with suppress(OSError):
                    inner.chmod(stat.S_IRWXU)


def _acquire(lock: Path, place: Path, *, wait: bool) -> int:
    import fcntl

    while True:
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            reason = f"nothing can be written in {lock.parent}: {error.strerror}"
            raise UsageError(f"cannot be made, because {reason}", where=str(place), hint=_ELSEWHERE) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                "another process is writing there", where=str(place), hint="wait for it, or choose another place"
            ) from None
        except OSError as error:
            os.close(descriptor)
            with suppress(OSError):
                lock.unlink()
            raise UsageError(
                f"cannot be locked: {error.strerror}",
                where=str(place),
                hint="choose a place on a file system that knows locks, such as a local disk, and copy it from there",
            ) from None
        except BaseException:  # interrupted while it waits
            os.close(descriptor)
            raise
        if _is_file_of(lock, descriptor):
            return descriptor
        os.close(descriptor)  # the holder has removed the file meanwhile, so this lock protects nothing


def _is_file_of(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
