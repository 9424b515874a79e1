"""Run one task in a process of its own: build a file of a baseline, or run one candidate alone.

    python -m qcgraph.benchmark.worker REQUEST.json RESULT.json

Building in another process keeps the patches and the memory of exporters and quantizers out of the process that times.
Running alone gives the peak memory of one candidate, and its latency without other candidates.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qcgraph.benchmark.baselines import BASELINES, BUILDERS
from qcgraph.benchmark.machine import peak_resident_bytes, resident_bytes
from qcgraph.benchmark.timing import TimedCall, TimedRunner, timed
from qcgraph.benchmark.turns import Turn, by_variant, counted, first_step, section, single_variant
from qcgraph.benchmark.workspace import Workspace
from qcgraph.bundle import Bundle
from qcgraph.errors import QcgraphError
from qcgraph.export.run.open import runner_of
from qcgraph.export.run.runtimes import runtime_for
from qcgraph.export.targets import target_of
from qcgraph.files.atomic import scratch_folder
from qcgraph.sampling.runner import Runner

_Value = TypeVar("_Value")
_STDERR_END = 2000  # characters at the end of a dead process's stderr that are searched for its last message


class TaskError(Exception):
    """A task raised an error, or its process died; the text is one line."""


@dataclass(frozen=True)
class Alone:
    """The figures of a candidate that ran alone in its process.

    Attributes:
        sampling: seconds of whole sampling, one value for each run; empty if only forwards were timed.
        forward: seconds of every computing step.
        base_bytes: resident memory after importing the runtime, before loading any file; None if unknown.
        peak_bytes: largest resident memory of the process, including loading; None if unknown.
    """

    sampling: tuple[float, ...]
    forward: tuple[float, ...]
    base_bytes: int | None
    peak_bytes: int | None


def build_file(workspace: Workspace, name: str) -> None:
    """Build one of `BUILDERS` in a process of its own.

    Raises:
        TaskError: the file could not be built.
    """
    _run({"task": "build", "file": name, "workspace": workspace.encode()})


def run_alone(
    workspace: Workspace, candidate: str, *, bundle: Path | None, samples: int, runs: int, forward_only: bool
) -> Alone:
    """Run one candidate in a process of its own.

    Args:
        workspace: the folder of its files, the bundle and the model.
        candidate: the name of a baseline; ignored for a bundle.
        bundle: the bundle to run, None for a baseline.
        samples: the number of samples drawn at once.
        runs: the number of timed runs, after a warm-up.
        forward_only: whether to run a section of the trajectory instead of the whole.

    Raises:
        TaskError: the candidate did not run.
    """
    result = _run(
        {
            "task": "alone",
            "candidate": candidate,
            "bundle": str(bundle) if bundle else None,
            "workspace": workspace.encode(),
            "samples": samples,
            "runs": runs,
            "forward_only": forward_only,
        }
    )
    return Alone(tuple(result["sampling"]), tuple(result["forward"]), result["base_bytes"], result["peak_bytes"])


def attempt(action: Callable[[], _Value]) -> _Value:
    """Call code of a peer, and turn its errors into one type.

    Raises:
        TaskError: the code raised an error; the text is the first line of its message.
    """
    try:
        return action()
    except Exception as error:  # peers raise any error; it fills the row of this peer, and other rows are not affected
        raise TaskError(one_line(error)) from error


def one_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message; for errors of qcgraph, the message alone."""
    if isinstance(error, TaskError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, QcgraphError):
        return error.message.splitlines()[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def main() -> None:
    """Run the requested task, and write its result."""
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    tasks = {"build": _build, "alone": _alone}
    try:
        result = attempt(lambda: tasks[request["task"]](request))
    except TaskError as failure:
        result = {"failure": str(failure)}
    Path(sys.argv[2]).write_text(json.dumps(result), "utf-8")


def _build(request: dict[str, Any]) -> dict[str, Any]:
    workspace = Workspace.decode(request["workspace"])
    BUILDERS[request["file"]](workspace, workspace.folder / request["file"])
    return {}


def _alone(request: dict[str, Any]) -> dict[str, Any]:
    workspace = Workspace.decode(request["workspace"])
    bundle = Bundle.open(request["bundle"], check=False) if request["bundle"] else None
    importlib.import_module(_runtime(request["candidate"], bundle))
    base = resident_bytes()
    plan, spec = workspace.bundle.plan, workspace.bundle.spec
    opened: Runner
    if bundle is not None:
        plan, opened = bundle.plan, runner_of(bundle, threads=workspace.threads)
    else:
        plan, opened = single_variant(plan), BASELINES[request["candidate"]].open(workspace)
    computing, runner = plan.computing, TimedRunner(opened)
    whole, part, first = (Turn(part, spec, request["samples"]) for part in (plan, section(plan), first_step(plan)))
    part.draw(runner)
    runner.take()

    def warm_up() -> None:
        first.draw(runner)
        runner.take()

    sampling: list[float] = []
    calls: list[TimedCall] = []
    for _ in range(request["runs"]):
        if request["forward_only"]:
            part.draw(runner)
            calls += counted(runner.take())
        else:
            sampling.append(timed(lambda: whole.draw(runner), warm_up))
            calls += runner.take()
    return {
        "sampling": sampling,
        "forward": by_variant(calls)[computing],
        "base_bytes": base,
        "peak_bytes": peak_resident_bytes(),
    }


def _runtime(candidate: str, bundle: Bundle | None) -> str:
    """Return the module of a candidate's runtime."""
    if bundle is None:
        return BASELINES[candidate].runtime
    return runtime_for(target_of(bundle), bundle.manifest.precision).module


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Run this module in another process.

    Raises:
        TaskError: the task raised an error, or the process died.
    """
    with scratch_folder() as folder:
        question, answer = folder / "request.json", folder / "result.json"
        question.write_text(json.dumps(request), "utf-8")
        command = [sys.executable, "-P", "-m", __name__, str(question), str(answer)]
        # The other process must be able to import the same modules, such as a factory of the user.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        result = json.loads(answer.read_text("utf-8")) if answer.is_file() else {"failure": _death(done)}
    if "failure" in result:
        raise TaskError(result["failure"])
    return dict(result)


def _death(done: subprocess.CompletedProcess[str]) -> str:
    """Describe how a process without a result ended, and its last message."""
    end = f"killed by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"exit {done.returncode}"
    last = [line.strip() for line in done.stderr[-_STDERR_END:].splitlines() if line.strip()]
    return f"its process ended ({end})" + (f": {last[-1]}" if last else "")


if __name__ == "__main__":
    main()
