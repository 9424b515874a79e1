"""Try inputs at every door of qcgraph: recipes, pipelines, plans, command lines, checkpoints, folders, bundles.

    python tools/fuzz.py --inputs 100000 --seed 0

Valid samples are damaged (bytes, tokens, values of JSON, types, depth) or composed from a grammar. The outcome must be
a success or a refusal in words: a `QcgraphError` with a hint. Any other outcome is a finding: another exception, a
refusal without a hint, a wrong exit code, a warning, a word on stderr, or more than ten seconds. Findings are
shortened, printed with the input that repeats them, and kept in a folder. The heavy part behind a door is cut off:
no command samples, calibrates or builds.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from fuzz_doors import REFUSED, STOPPED, Door, LetInError, make_doors, make_samples, stopped_behind_doors

from qcgraph.errors import QcgraphError

HANG_SECONDS = 10
PATIENCE = 6  # alarms until an input that waits without computing counts as a hang
MEMORY_BYTES = 24 * 2**30  # bytes of address space, so that a size in a file cannot exhaust the memory of the machine
SHRINKING_SECONDS = 10


_rings: list[int] = []  # alarms during the input that is being judged
_started: list[float] = []  # start of the input, in seconds of processor time
_noise: list[IO[bytes]] = []  # the file that replaces stderr while inputs are judged
# Warnings that Python hides from users by default.
_UNSEEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


class Hang(BaseException):
    """The input took too long."""


@dataclass
class Finding:
    """An input that is neither accepted nor refused in words."""

    door: str
    index: int
    what: str
    place: str
    sample: Any
    count: int = 1


@dataclass
class Tally:
    """The outcomes of all inputs.

    Attributes:
        outcomes: counts by door and outcome.
        findings: the first of each kind, by door, exception and place.
        seconds: seconds by door.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: dict[tuple[str, str, str], Finding] = field(default_factory=dict)
    seconds: Counter[str] = field(default_factory=Counter)


def judge(door: Door, sample: Any) -> tuple[str, str, str]:
    """Pass an input to a door.

    Returns:
        The outcome, the error, and its place in qcgraph; error and place are empty if there is no finding.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for category in _UNSEEN:
            warnings.simplefilter("ignore", category)
        outcome, what, place = _judge_silent(door, sample)
    noise = _take_noise()
    if what:
        return outcome, what, place
    if warned:
        first = warned[0]
        return (
            "warning",
            f"{first.category.__name__}: {first.message}"[:300],
            f"{Path(first.filename).name}:{first.lineno}",
        )
    return ("noise", f"on stderr: {noise[:300]}", "stderr") if noise else (outcome, what, place)


def _judge_silent(door: Door, sample: Any) -> tuple[str, str, str]:
    """Pass an input to a door as :func:`judge` does, but ignore warnings and stderr."""
    _rings.clear()
    _started[:] = [time.process_time()]
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS, HANG_SECONDS)
    try:
        return door.enter(sample), "", ""
    except LetInError:
        return STOPPED, "", ""
    except QcgraphError as error:
        if error.hint and error.exit_code in (1, 2) and error.message:
            return REFUSED, "", ""
        return "no hint", f"{type(error).__name__} without a hint: {error}", _place(error)
    except Hang as error:
        return "hang", f"more than {HANG_SECONDS} s", _place(error)
    except BaseException as error:  # noqa: BLE001 - any exception is a finding of this tool
        return "traceback", f"{type(error).__name__}: {error}"[:300], _place(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _take_noise() -> str:
    """Return the text on stderr since the last call, from Python or from a native library."""
    if not _noise:
        return ""
    file = _noise[0]
    length = file.seek(0, os.SEEK_END)
    if not length:
        return ""
    file.seek(0)
    text = file.read().decode("utf-8", "replace")
    file.truncate(0)
    return text.strip()


def _place(error: BaseException) -> str:
    """Return the innermost line of qcgraph that an error came through."""
    root = Path(__file__).resolve().parents[1]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(root) and path.parent.name != "tools":
            return f"{path.relative_to(root)}:{frame.lineno}"
    return "outside of qcgraph"


def shrink(door: Door, sample: Any, kind: tuple[str, str]) -> Any:
    """Remove the parts of an input that the same finding does not need."""
    best, size, end = sample, max(1, len(sample) // 2), time.monotonic() + SHRINKING_SECONDS
    while size and time.monotonic() < end:
        at, changed = 0, False
        while at < len(best) and time.monotonic() < end:
            candidate = best[:at] + best[at + size :]
            outcome, what, place = judge(door, candidate)
            if what and (outcome, place) == kind:
                best, changed = candidate, True
            else:
                at += size
        size = size if changed and size > 1 else size // 2
    return best


def fuzz(
    doors: Sequence[Door],
    inputs: Mapping[str, int],
    seed: int,
    *,
    seconds: float | None = None,
    only: int | None = None,
) -> Tally:
    """Pass inputs to doors.

    Args:
        doors: the doors.
        inputs: the number of inputs for each door.
        seed: seeds the inputs; input number i of a door depends on the seed, the door and i alone.
        seconds: the time after which to stop.
        only: the number of the only input, to repeat a finding.
    """
    tally, started = Tally(), time.monotonic()
    for door in doors:
        began = time.monotonic()
        for index in [only] if only is not None else range(inputs[door.name]):
            if seconds is not None and time.monotonic() - began > seconds * inputs[door.name] / sum(inputs.values()):
                break
            sample = door.draw(random.Random(f"{seed}:{door.name}:{index}"))
            outcome, what, place = judge(door, sample)
            tally.outcomes[door.name, outcome] += 1
            if not what:
                continue
            key = (door.name, what.partition(":")[0], place)
            if key in tally.findings:
                tally.findings[key].count += 1
                continue
            small = sample if outcome == "hang" else shrink(door, sample, (outcome, place))
            tally.findings[key] = Finding(door.name, index, what, place, small)
            print(f"FOUND {door.name} (--door {door.name} --seed {seed} --only {index}): {what} at {place}", flush=True)
        tally.seconds[door.name] = round(time.monotonic() - began)
    tally.seconds["all"] = round(time.monotonic() - started)
    return tally


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Limit the time and memory of inputs, and keep their stderr for judgement, while the context is active."""

    def hang(number: int, frame: FrameType | None) -> None:
        # On a busy machine an input may wait for processor time; only a hang waits for very long.
        _rings.append(number)
        if time.process_time() - _started[0] > HANG_SECONDS / 2 or len(_rings) >= PATIENCE:
            raise Hang

    before, limits = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, limits[1]))
    try:
        with stopped_behind_doors(), _stderr_kept():
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _stderr_kept() -> Iterator[None]:
    """Replace stderr by a file while the context is active, also for native libraries."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile(buffering=0) as file:
        _noise[:] = [file]
        # The file is opened for appending, because it is emptied between inputs.
        fcntl.fcntl(file.fileno(), fcntl.F_SETFL, fcntl.fcntl(file.fileno(), fcntl.F_GETFL) | os.O_APPEND)
        os.dup2(file.fileno(), 2)
        try:
            with os.fdopen(os.dup(2), "w", buffering=1, errors="replace") as stream, contextlib.redirect_stderr(stream):
                yield
        finally:
            _noise.clear()
            os.dup2(before, 2)
            os.close(before)


def shares(doors: Sequence[Door], inputs: int) -> dict[str, int]:
    """Return the number of inputs of each door."""
    whole = sum(door.weight for door in doors)
    return {door.name: max(1, round(inputs * door.weight / whole)) for door in doors}


def keep(findings: Sequence[Finding], seed: int, folder: Path) -> None:
    """Write every finding with its unchanged input into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for finding in findings:
        stem = f"{finding.door}-{seed}-{finding.index}"
        content = finding.sample if isinstance(finding.sample, bytes) else json.dumps(finding.sample).encode()
        (folder / f"{stem}.input").write_bytes(content)
        (folder / f"{stem}.txt").write_text(f"{finding.what}\nat {finding.place}, {finding.count} times\n", "utf-8")


def print_tally(tally: Tally) -> None:
    for door in dict.fromkeys(door for door, _ in tally.outcomes):
        counts = {outcome: count for (name, outcome), count in sorted(tally.outcomes.items()) if name == door}
        text = ", ".join(f"{outcome} {count}" for outcome, count in counts.items())
        print(f"{door:11} {sum(counts.values()):7} inputs {tally.seconds[door]:5} s: {text}")
    print(
        f"{'all':11} {sum(tally.outcomes.values()):7} inputs {tally.seconds['all']:5} s, {len(tally.findings)} findings"
    )
    for finding in tally.findings.values():
        print(f"\n{finding.door}, input {finding.index}, {finding.count} times: {finding.what}\n  at {finding.place}")
        print(f"  {finding.sample[:20] if isinstance(finding.sample, list) else finding.sample[:200]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all doors together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after so long, shared out like the inputs")
    parser.add_argument("--door", action="append", help="only this door; can be repeated")
    parser.add_argument("--only", type=int, help="only this input, to repeat a finding")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder for what is found")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        doors = make_doors(make_samples(Path(folder)))
        chosen = [doors[name] for name in options.door or doors]
        with guarded():
            tally = fuzz(
                chosen, shares(chosen, options.inputs), options.seed, seconds=options.seconds, only=options.only
            )
    print_tally(tally)
    if tally.findings:
        keep(list(tally.findings.values()), options.seed, options.findings)
        sys.exit(1)


if __name__ == "__main__":
    main()
