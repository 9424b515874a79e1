"""Kill commands at every operation on the file system, and check the files that remain.

    python tools/kill_test.py [COMMAND ...] [--cuts N] [--json FILE]

For ``compile`` (also as on systems that cannot exchange two folders), ``export``, ``sample``, ``eval`` and, where
TensorRT-RTX is installed, ``build``: the real command replaces its earlier output, and is killed with SIGKILL before
its k-th operation (open to write, mkdir, rename, remove, fsync, chmod), or while a file grows over a number of bytes.
The output then has to be the old or the new one, complete; and a second run of the command has to succeed and leave
no other files. ``--cuts`` takes a number of evenly spaced points of each command; by default all points. Prints counts;
exits with 1 if a point failed.

The command runs once up to the start of writing, and is forked there for every point, so that a point takes as long as
writing does. It needs a system with fork, and one thread: set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qcgraph.bundle import Bundle, is_bundle
from qcgraph.bundle.engines import ENGINE_FOLDER
from qcgraph.bundle.exports import EXPORT_FOLDER
from qcgraph.cli import run
from qcgraph.files import atomic
from qcgraph.models import LoadedModel
from qcgraph.models.dit import DiT, initialize_random
from qcgraph.models.geometry import DiTConfig
from qcgraph.plan.spec import ModelSpec

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
# File sizes in bytes at which the process is killed.
SIZES = (0, 1, 10, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 30000)
VOLATILE = ("manifest.json", "report.json", "engines.json", "export.json")  # contain times; other checks cover them
TINY = "kill_test:tiny"
COMPILE = ("--bits", "off", "--guidance", "1.5", "--no-verdict")
MEASURE = ("--model", TINY, "--metrics", "latent_error", "--no-attribution", "--seeds", "2", "--threads", "1")
BUNDLE = "bundle"


def tiny() -> LoadedModel:
    """Make a random DiT of one block and 16 tokens."""
    config = DiTConfig(input_size=8, patch_size=2, channels=1, width=16, depth=1, heads=2, class_count=3)
    module = DiT(config)
    initialize_random(module, torch.Generator().manual_seed(0))
    return LoadedModel(
        module, ModelSpec.class_conditional("tiny", (1, 8, 8), 3, 3, output_channels=2, is_image=True), ("x", "t", "y")
    )


def whole_bundle(place: Path) -> None:
    opened = Bundle.open(place)
    assert len(opened.plan) in (3, 4)
    assert opened.report is not None
    assert opened.report.source == TINY


def whole_export(place: Path) -> None:
    EXPORT_FOLDER.check(place, force=True)  # every file is unchanged since it was written


def whole_engines(place: Path) -> None:
    ENGINE_FOLDER.check(place, force=True)


def whole_picture(place: Path) -> None:
    from PIL import Image

    Image.open(place).load()


def whole_evaluation(place: Path) -> None:
    assert json.loads((place / "eval.json").read_text())["kind"] == "eval"
    whole_picture(place / "samples.png")
    whole_picture(place / "curves.png")


@dataclass(frozen=True)
class Command:
    """A command that replaces its earlier output.

    Attributes:
        place: the output, in the folder that the command runs in.
        old: arguments that write the first output.
        new: arguments that replace it.
        whole: raises an error if the output is not complete.
    """

    place: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    whole: Callable[[Path], None]
    exchanges: bool = True  # else as on a system that cannot exchange two folders: a reader may have to put one back


COMPILING = ("compile", TINY, "-o", "toy", "--target", "torch", "--force", "--cache", "interval=2", *COMPILE)
EXPORTING = ("export", BUNDLE, "-o", "repository", "--force", "--format")
SAMPLING = (
    "sample",
    BUNDLE,
    "-o",
    "grid.png",
    "--save-latents",
    "../latents.npz",
    "-n",
    "2",
    "--threads",
    "1",
    "--seed",
)
BUILDING = ("build", BUNDLE, "-o", "engines", "--force", "--compute-capability")
COMMANDS = {
    "compile": Command("toy", (*COMPILING, "--steps", "4"), (*COMPILING, "--steps", "3"), whole_bundle),
    "export": Command("repository", (*EXPORTING, "onnx-single"), (*EXPORTING, "triton"), whole_export),
    "sample": Command("grid.png", (*SAMPLING, "0"), (*SAMPLING, "1"), whole_picture),
    "eval": Command(
        "evaluation",
        ("eval", BUNDLE, "-o", "evaluation", *MEASURE, "--samples", "4"),
        ("eval", BUNDLE, "-o", "evaluation", *MEASURE, "--samples", "5"),
        whole_evaluation,
    ),
    "build": Command("engines", (*BUILDING, "8.6"), (*BUILDING, "8.9"), whole_engines),
    "compile-renaming": Command(
        "toy", (*COMPILING, "--steps", "4"), (*COMPILING, "--steps", "3"), whole_bundle, exchanges=False
    ),
}


@dataclass
class Tally:
    """The outcomes of the points of one command."""

    operations: int = 0
    points: int = 0
    old: int = 0
    new: int = 0
    left: int = 0  # points at which other files remained until the next run
    again: int = 0  # runs that succeeded after such a point
    failures: list[str] = field(default_factory=list)


class Watch:
    """Counts the operations of this process on a folder, and calls a function before one of them."""

    def __init__(self, root: Path) -> None:
        self._root = f"{root}{os.sep}"
        self.log: list[str] = []
        self.at: dict[int, Callable[[], None]] = {}
        self.at_end: Callable[[], object] = lambda: None
        self._busy = False
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            self._count("os.fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            sync(descriptor)

        os.fsync = fsync
        sys.addaudithook(self._hook)

    def kill_at(self, operation: int) -> None:
        """Kill this process before an operation."""
        self.at[operation] = lambda: os.kill(os.getpid(), signal.SIGKILL)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & WRITES:
                self._count(event, os.fsdecode(path))
        elif event in EVENTS:
            # Trees are removed by names relative to a folder.
            self._count(event, os.fsdecode(arguments[0]))

    def _count(self, event: str, path: str) -> None:
        if self._busy or (path.startswith(os.sep) and not path.startswith(self._root)):
            return
        self._busy = True
        self.log.append(f"{event} {path.removeprefix(self._root)}")
        while action := self.at.pop(len(self.log) - 1, None):
            action()  # it may ask to kill this process before the same operation
        self._busy = False


def forked(body: Callable[[], int]) -> int:
    """Call a function in a process of its own; return the exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = body()
        except BaseException:  # noqa: BLE001 - the process ends here, whatever the error
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def quietly(arguments: Sequence[str]) -> int:
    """Run a command, and print its output only if it fails."""
    with tempfile.TemporaryFile("w+") as said:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = run(list(arguments))
        if code:
            said.seek(0)
            print(said.read(), file=sys.stderr)
    return code


def signature(place: Path) -> dict[str, str]:
    """Return the files of an output with digests of their contents; those that contain times have none."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {
        path.relative_to(place.parent).as_posix(): ""
        if path.name in VOLATILE or path.suffix == ".engine"
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


class Killing:
    """One command, killed at its points, in a folder with nothing but its output."""

    def __init__(self, command: Command, folder: Path, cuts: int) -> None:
        self._command, self._folder, self._cuts = command, folder, cuts
        self._place, self._kept = folder / command.place, folder.parent / "kept"
        self._around = {path.name for path in folder.iterdir()} | {command.place}
        self.tally = Tally()
        self._old: dict[str, str] = {}
        self._new: dict[str, str] = {}
        self._log: list[str] = []

    def run(self) -> Tally:
        """Take all points: one process runs the command, and is forked for every point."""
        if not self._command.exchanges:
            atomic._exchanged = lambda one, other: False
        self._need(forked(lambda: quietly(self._command.old)) == 0, "the old")
        self._old = signature(self._place)
        self._keep()
        answer = self._folder.parent / "tally.json"
        self._need(forked(lambda: self._served(answer)) == 0, "the points")
        self.tally = Tally(**json.loads(answer.read_text()))
        return self.tally

    def _served(self, answer: Path) -> int:
        """Run the command for all points, and write their outcomes."""
        watch, log = Watch(self._folder), self._folder.parent / "log.json"

        def at_once() -> None:
            """List all operations before the first one, and take the points before anything is written."""
            if continued(lambda: None) is None:
                watch.at_end = lambda: log.write_text(json.dumps(watch.log))
                return
            self._log = list(json.loads(log.read_text()))
            self._new = signature(self._place)
            assert self._old != self._new, "the command writes what was there"
            self._restore()
            self.tally.operations = len(self._log)
            begin = beginning(self._log)
            late = len(self._log) - begin
            share = round(self._cuts * late / len(self._log))
            if not self._cut(watch, chosen(range(begin), self._cuts - share), again=False):
                sizes = SIZES[:: 3 if self._cuts else 1]
                watch.at[begin] = lambda: writing(chosen(range(begin, len(self._log)), share), sizes)

        def writing(points: Sequence[int], sizes: Sequence[int]) -> None:
            """Take the remaining points from the start of writing."""
            if not self._cut(watch, points, sizes, again=True):
                answer.write_text(json.dumps(vars(self.tally)))
                os._exit(0)

        watch.at[0] = at_once
        code = quietly(self._command.new)
        watch.at_end()
        return code

    def _cut(self, watch: Watch, points: Sequence[int], sizes: Sequence[int] = (), *, again: bool) -> bool:
        """Take a sequence of points.

        Returns:
            Whether this is a process that continues with the command.
        """
        gc.freeze()  # a forked process would have to copy the memory that garbage collection touches
        gc.disable()
        return any(
            self._point(f"{point} {self._log[point]}", lambda at=point: watch.kill_at(at), again=again)
            for point in points
        ) or any(self._point(f"{size} bytes", lambda size=size: limit(size), again=again) for size in sizes)

    def _point(self, name: str, arm: Callable[[], None], *, again: bool) -> bool:
        """Kill the command at one point, check, run it again, check, and restore the first output.

        Returns:
            Whether this is the process that continues with the command.
        """
        code = continued(arm)
        if code is None:
            return True
        self.tally.points += 1
        if code not in (-signal.SIGKILL, -signal.SIGXFSZ, 0):
            self.tally.failures.append(f"{name}: ended with {code}")
        self._look(name, killed=code != 0)
        if not again:
            return False
        code = continued(lambda: None)
        if code is None:
            return True
        self.tally.again += code == 0
        if code != 0:
            self.tally.failures.append(f"{name}: run again, it ended with {code}")
        self._look(f"{name}, run again", killed=False)
        self._restore()
        return False

    def _look(self, name: str, *, killed: bool) -> None:
        """Check that the output is the old or the new one, complete, and that a completed run leaves no other file."""
        beside = sorted({path.name for path in self._folder.iterdir()} - self._around)
        if not self._command.exchanges:
            is_bundle(self._place)  # every reader puts back a folder that was moved aside
        found = signature(self._place)
        self.tally.old += killed and found == self._old
        self.tally.new += killed and found == self._new
        self.tally.left += killed and bool(beside)
        if found not in (self._old, self._new):
            self.tally.failures.append(f"{name}: neither the old nor the new: {sorted(found)}")
        if beside and not killed:
            self.tally.failures.append(f"{name}: left {', '.join(beside)}")
        try:
            self._command.whole(self._place)
        except Exception as error:  # noqa: BLE001 - any error is the reason why the point failed
            self.tally.failures.append(f"{name}: {error!r}")

    def _keep(self) -> None:
        shutil.rmtree(self._kept, ignore_errors=True)
        shutil.copytree(self._folder, self._kept)

    def _restore(self) -> None:
        for path in self._folder.iterdir():
            if path.name != BUNDLE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        kept = self._kept / self._command.place
        (shutil.copytree if kept.is_dir() else shutil.copyfile)(kept, self._place)

    def _need(self, condition: bool, what: str) -> None:
        if not condition:
            raise SystemExit(f"{self._command.new[0]}: could not make {what}")


def continued(arm: Callable[[], None]) -> int | None:
    """Fork; return None in the child, which continues, and the exit code of the child in the parent."""
    child = os.fork()
    if child == 0:
        arm()
        return None
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def limit(size: int) -> None:
    """Let the system kill this process as soon as a file grows over a size, in bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def beginning(log: Sequence[str]) -> int:
    """Return the operation with which a command begins to write: it takes the lock of the first file that it makes."""
    first = next(index for index, line in enumerate(log) if "qcgraph-partial" in line and not is_removal(line))
    return max(index for index, line in enumerate(log[:first]) if line.endswith("-lock") and "open" in line)


def is_removal(line: str) -> bool:
    """Return whether an operation of the log removes a file or folder."""
    return line.startswith(("os.remove", "os.rmdir"))


def chosen(points: Sequence[int], count: int) -> Sequence[int]:
    """Return a number of evenly spaced points with the first and last; all points if the count is 0 or too large."""
    if count <= 0 or count >= len(points):
        return points
    return sorted({points[round(index * (len(points) - 1) / max(count - 1, 1))] for index in range(count)})


def prepared(folder: Path) -> Path:
    """Return a bundle with graphs, which commands read; compile it if it is missing."""
    if (folder / BUNDLE).is_dir():
        return folder / BUNDLE
    arguments = ["compile", TINY, "-o", str(folder / BUNDLE), "--steps", "3", "--target", "onnxruntime-cpu", *COMPILE]
    if forked(lambda: quietly(arguments)) != 0:
        raise SystemExit("could not compile the bundle")
    return folder / BUNDLE


def main() -> None:
    """Kill all commands, and count the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"of {', '.join(COMMANDS)}; all by default")
    parser.add_argument("--cuts", type=int, default=0, help="points of each command; 0: all")
    parser.add_argument("--json", type=Path, help="write the counts to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).parent))
    for module in ("qcgraph.evaluation.pictures", "qcgraph.compiler.compilation", "torch._dynamo"):
        importlib.import_module(module)  # imported once, before the first fork
    tallies: dict[str, Tally] = {}
    output = options.json.resolve() if options.json else None
    with tempfile.TemporaryDirectory(prefix="qcgraph-") as name:
        scratch = Path(name).resolve()
        for title in options.commands or COMMANDS:
            if title == "build" and find_spec("tensorrt_rtx") is None:
                print("build: TensorRT-RTX is not installed")
                continue
            folder = scratch / title / "folder"
            folder.mkdir(parents=True)
            if BUNDLE in COMMANDS[title].new:
                shutil.copytree(prepared(scratch), folder / BUNDLE)
            os.chdir(folder)
            tallies[title] = tally = Killing(COMMANDS[title], folder, options.cuts).run()
            print(
                f"{title}: {tally.points} points of {tally.operations} operations: {tally.old} left the old, "
                f"{tally.new} the new; {tally.again} run again; {len(tally.failures)} failures",
                flush=True,
            )
            for failure in tally.failures[:20]:
                print(f"  {failure}")
            os.chdir(scratch)
    if output is not None:
        output.write_text(json.dumps({title: vars(tally) for title, tally in tallies.items()}, indent=2) + "\n")
    sys.exit(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    main()
