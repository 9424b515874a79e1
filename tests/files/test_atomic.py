"""Files and folders in one piece: what is refused, what a failing disk costs, what an interrupted process leaves."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qcgraph.errors import UsageError
from qcgraph.files import atomic
from qcgraph.files.atomic import FolderKind, check_file, scratch_folder, writing_file

NOTES = FolderKind(lambda folder: {"a.txt": None} if (folder / "a.txt").exists() else None, "exists and is no note")
needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes, and locks")


def write(place: Path, text: str) -> None:
    with writing_file(place) as partial:
        partial.write_text(text)


def write_folder(place: Path, text: str) -> None:
    with NOTES.writing(place, force=True) as folder:
        (folder / "a.txt").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_keeps_the_usual_mode(tmp_path: Path) -> None:
    write(tmp_path / "a.png", "text")
    (tmp_path / "b.png").touch()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "b.png").stat().st_mode
    assert names(tmp_path) == ["a.png", "b.png"]


@pytest.mark.parametrize("call", [check_file, lambda place: write(place, "new")])
def test_what_a_killed_process_left_is_cleared(tmp_path: Path, call: Callable[[Path], None]) -> None:
    for name in (".grid.qcgraph-partial.png", ".grid.png.qcgraph-lock"):
        (tmp_path / name).write_text("half")
    call(tmp_path / "grid.png")
    assert names(tmp_path) in ([], ["grid.png"])


def test_two_files_of_one_stem_do_not_meet(tmp_path: Path) -> None:
    with writing_file(tmp_path / "grid.png") as one, writing_file(tmp_path / "grid.npz") as other:
        one.write_text("one")
        other.write_text("other")
    assert [(tmp_path / name).read_text() for name in names(tmp_path)] == ["other", "one"]


@needs_links
def test_a_planted_neighbour_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".grid.qcgraph-partial.png").symlink_to(tmp_path / "mine")
    write(tmp_path / "grid.png", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / ".grid.png.qcgraph-lock").symlink_to(tmp_path / "absent")
    with pytest.raises(UsageError, match="nothing can be written in"):
        write(tmp_path / "grid.png", "newer")
    assert not (tmp_path / "absent").exists()


@needs_links
@pytest.mark.parametrize("name", ["/dev/null", "pipe", "loop", "folder", "bad\0name", "file/a", "missing/a"])
def test_places_of_no_file(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = names(tmp_path)
    with pytest.raises(UsageError) as caught:
        write(tmp_path / name, "text")
    assert caught.value.hint
    assert names(tmp_path) == before
    assert Path("/dev/null").is_char_device()


@needs_links
@pytest.mark.parametrize("name", ["loop", "loop/a", "/", "bad\0name", "file/a/b", "file"])
def test_places_of_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for force in (False, True):
        with pytest.raises(UsageError) as caught:
            NOTES.check(tmp_path / name, force=force)
        assert caught.value.hint


@needs_links
def test_a_file_is_written_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_text("old")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    write(tmp_path / "link.png", "new")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").read_text() == "new"


def test_long_names(tmp_path: Path) -> None:
    name = "é" * 120 + ".png"
    write(tmp_path / name, "text")
    write_folder(tmp_path / ("n" * 250), "text")
    assert names(tmp_path) == ["n" * 250, name]
    with pytest.raises(UsageError, match="name too long"):
        write(tmp_path / ("n" * 300), "text")


def test_folders_around_go_again_where_nothing_was_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    def fail() -> None:
        with NOTES.writing(tmp_path / "a" / "b" / "c" / "d", force=False):
            raise ValueError

    with pytest.raises(ValueError, match=""):
        fail()
    assert names(tmp_path / "a") == []


# A disk that is full or fails.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", [write, write_folder])
def test_a_disk_that_fails_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: Callable[[Path, str], None]
) -> None:
    call(tmp_path / "place", "old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UsageError, match=f"cannot be written: {os.strerror(number)}") as caught:
            call(tmp_path / "place", "new")
    assert "what was there before is as it was" in (caught.value.hint or "")
    read = tmp_path / "place" / "a.txt" if call is write_folder else tmp_path / "place"
    assert read.read_text() == "old"
    assert names(tmp_path) == ["place"]


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    test_atomic.{call}(Path({place!r}), "new" * 1000)
except test_atomic.UsageError as error:
    print(error.message)
"""


@needs_links
@pytest.mark.parametrize("call", ["write", "write_folder"])
def test_a_file_that_may_not_grow(tmp_path: Path, call: str) -> None:
    globals()[call](tmp_path / "place", "old")
    code = FULL.format(tests=str(Path(__file__).parent), call=call, place=str(tmp_path / "place"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot be written: {os.strerror(errno.EFBIG)}\n"
    assert names(tmp_path) == ["place"]


@needs_links
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    import fcntl

    def fail(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UsageError, match="cannot be locked") as caught:
        write(tmp_path / "a", "text")
    assert "a file system that knows locks" in (caught.value.hint or "")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_synced_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if os.path.isdir(descriptor):  # noqa: PTH112 - a descriptor is no path
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    write_folder(tmp_path / "place", "text")
    assert (tmp_path / "place" / "a.txt").read_text() == "text"


# Others who write there.

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_atomic
for number in range(40):
    with test_atomic.writing_file(Path({place!r})) as partial:
        partial.write_text({text!r} * 10000)
"""


@needs_links
def test_two_writers_of_a_file_take_turns(tmp_path: Path) -> None:
    place, tests = tmp_path / "a.txt", str(Path(__file__).parent)
    codes = [WRITER.format(tests=tests, place=str(place), text=text) for text in "xy"]
    processes = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert set(place.read_text()) in ({"x"}, {"y"})
    assert len(place.read_text()) == 10000
    assert names(tmp_path) == ["a.txt"]


HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_atomic
with {call}:
    print("now", flush=True)
    time.sleep(60)
"""


def held(call: str) -> subprocess.Popen[bytes]:
    """A process that is at work on something, and says so."""
    code = HOLDER.format(tests=str(Path(__file__).parent), call=call)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    return process


@needs_links
def test_a_live_writer_is_left_alone_and_a_killed_one_cleared(tmp_path: Path) -> None:
    place = tmp_path / "place"
    write_folder(place, "old")
    with held(f"test_atomic.NOTES.writing(Path({str(place)!r}), force=True)") as process:
        with pytest.raises(UsageError, match="another process is writing there"):
            write_folder(place, "new")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(tmp_path) == [".place.qcgraph-lock", ".place.qcgraph-partial", "place"]
    write_folder(place, "new")
    assert (place / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["place"]


@needs_links
def test_a_build_in_a_folder_that_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "place"
    write_folder(place, "old")
    with held(f"test_atomic.NOTES.writing(Path({str(place / 'inner')!r}), force=True)") as process:
        with pytest.raises(UsageError, match="another process is writing there"):
            write_folder(place, "new")
        process.send_signal(signal.SIGKILL)
        process.wait()
    write_folder(place, "new")
    assert names(place) == ["a.txt"]


# Temporary folders.


@needs_links
def test_temporary_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(atomic.tempfile, "tempdir", None)
    process = held("test_atomic.scratch_folder()")
    (left,) = tmp_path.iterdir()
    old = time.time() - 1000
    with process:
        os.utime(left, (old, old))
        with scratch_folder() as folder:
            assert names(tmp_path) == sorted([left.name, folder.name])
        process.send_signal(signal.SIGKILL)
        process.wait()
    (tmp_path / "qcgraph-scratch-young").mkdir()
    (tmp_path / "qcgraph-mine").mkdir()
    os.utime(tmp_path / "qcgraph-mine", (old, old))
    os.utime(left, (old, old))
    with scratch_folder():
        pass
    assert names(tmp_path) == ["qcgraph-mine", "qcgraph-scratch-young"]


@pytest.mark.parametrize("inside", [".", "deep"])
def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    """A shell that is in it would go on in a folder that is no more."""
    place = tmp_path / "place"
    (place / "deep").mkdir(parents=True)
    monkeypatch.chdir(place / inside)
    for path in (place, Path(os.path.relpath(place))):
        with pytest.raises(UsageError, match="is the current folder or around it"):
            NOTES.check(path, force=True)


REPLACING_TWICE = """
import sys
from pathlib import Path
from qcgraph.files.atomic import FolderKind
kind = FolderKind(lambda folder: {"in/a.txt": None} if (folder / "in").exists() else None, "exists and is no note")
for text in ("first", "second", "third"):
    with kind.writing(Path(sys.argv[1]), force=True) as folder:
        (folder / "in").mkdir()
        (folder / "in" / "a.txt").write_text(text)
    (folder.with_name("n") / "in").chmod(0o555)
    folder.with_name("n").chmod(0o555)
"""


def bow_to_permissions() -> None:
    """Take from a process of root, before it begins, the right to write where nobody may."""
    drop, override = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    ctypes.CDLL(None).prctl(drop, override, 0, 0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes a capability from a process")
def test_a_read_only_folder_is_replaced_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPLACING_TWICE, str(tmp_path / "n")]
    done = subprocess.run(command, preexec_fn=bow_to_permissions, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert names(tmp_path) == ["n"]
    assert (tmp_path / "n" / "in" / "a.txt").read_text() == "third"


def test_a_neighbour_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".n.qcgraph-partial").mkdir()
    monkeypatch.setattr(atomic, "_remove", lambda _: None)
    with pytest.raises(UsageError, match=r"\.n\.qcgraph-partial beside it is left over") as error:
        write_folder(tmp_path / "n", "text")
    assert error.value.hint == "remove .n.qcgraph-partial, or choose another place"
