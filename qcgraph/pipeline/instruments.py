"""Instruments that watch a pipeline: time, dump, print, numerics, reproduce. Passes do not know of them."""

from __future__ import annotations

import difflib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TextIO

import torch

from qcgraph.bundle.manifest import entry_of
from qcgraph.errors import ContractError, UsageError
from qcgraph.files.atomic import FolderKind, Written
from qcgraph.files.folder import record_of, recorded_hashes
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import program_from_json, program_to_json, save_program
from qcgraph.pipeline import Instrument, Pass, Pipeline
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import GROUP, PREDICTION_NAME, ROW, TIMESTEP, ModelSpec
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import in_turn

RECORD = "reproducer.json"


class Timer(Instrument):
    """Measures and announces the seconds of every pass, and of the stages around the passes.

    Attributes:
        seconds: seconds of the passes, in order.
        stages: seconds of the other stages, by name.
    """

    def __init__(self, progress: Progress) -> None:
        self.seconds: list[float] = []
        self.stages: dict[str, float] = {}
        self._progress = progress
        self._start = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the seconds of a ``with`` block as a stage of this name."""
        self._progress.stage(name)
        start = time.perf_counter()
        yield
        self.stages[name] = time.perf_counter() - start

    def before(self, pass_: Pass, program: Program) -> None:
        self._progress.stage(pass_.name)
        self._start = time.perf_counter()

    def after(self, pass_: Pass, before: Program, after: Program) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        changed = "" if after.history[-1].changed else "  (changed nothing)"
        self._progress.note(f"  {pass_.text}  {self.seconds[-1]:.1f} s{changed}")


class Dump(Instrument):
    """Keeps the program's text after every pass, with the captured program first."""

    def __init__(self, captured: Program) -> None:
        self.texts: list[tuple[str, str]] = [("capture", captured.text)]

    def after(self, pass_: Pass, before: Program, after: Program) -> None:
        self.texts.append((pass_.name, after.text))

    def write(self, folder: Path) -> None:
        """Write ``NNN_pass.txt``, and ``NNN_pass.diff`` against the text before it, into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        earlier = ""
        for index, (name, text) in enumerate(self.texts):
            stem = f"{index:03d}_{name}"
            (folder / f"{stem}.txt").write_text(text, "utf-8")
            if index:
                lines = difflib.unified_diff(earlier.splitlines(True), text.splitlines(True), "before", stem)
                (folder / f"{stem}.diff").write_text("".join(lines), "utf-8")
            earlier = text


class PrintAfter(Instrument):
    """Prints the program after the passes with these names; ``all`` stands for every pass that changed something."""

    def __init__(self, names: tuple[str, ...], out: TextIO) -> None:
        self._names = names
        self._out = out

    def after(self, pass_: Pass, before: Program, after: Program) -> None:
        everything = "all" in self._names and after.history[-1].changed
        if everything or pass_.name in self._names:
            print(f"; after {pass_.text}\n{after.text}", file=self._out)


class VerifyEach(Instrument):
    """Checks after every pass that its input is unchanged, and its result survives a round trip to disk and runs."""

    def __init__(self, captured: Program, progress: Progress) -> None:
        self._progress = progress
        self._digest = captured.digest
        self._inputs = example_inputs(captured)
        self._reference = captured.run(captured.computing, self._inputs)[PREDICTION_NAME]

    def after(self, pass_: Pass, before: Program, after: Program) -> None:
        if before.compute_digest() != self._digest:
            raise ContractError("wrote to the program it was given", hint="edit a copy: see GraphEditor")
        if program_from_json(program_to_json(after), after.constants).digest != after.digest:
            raise ContractError("made a program that does not survive being written and read")
        self._digest = after.digest
        for name, error in self._errors(after).items():
            self._progress.note(f"    {name}: noise prediction {error:.2e} from the captured one (relative L2)")

    def _errors(self, program: Program) -> dict[str, float]:
        inputs = dict(self._inputs)
        inputs |= {spec.name: torch.zeros((), dtype=torch.int64) for spec in (GROUP, ROW)}
        errors: dict[str, float] = {}
        cached: dict[str, torch.Tensor] = {}  # values from the computing variant, reused at whatever age
        for name, interface in program.interfaces.items():
            if not interface.given(TensorRole.PREDICTION):
                continue
            taken = {spec.name: cached[spec.value] for spec in interface.taken(TensorRole.CACHE)}
            outputs = program.run(name, program.prepared(name, inputs | taken))
            cached |= {spec.value: outputs[spec.name] for spec in interface.caches}
            difference = outputs[interface.result.name] - self._reference
            errors[name] = float(difference.norm() / self._reference.norm())
        return errors


class Reproduce(Instrument):
    """Saves the program before a failing pass, and the rest of the pipeline.

    Wrong input is up to the user and saves nothing. A fault of a pass saves a folder for ``tools/replay.py``.
    """

    def __init__(self, folder: Callable[[], Path], progress: Progress) -> None:
        self._folder = folder
        self._progress = progress

    def failed(self, pass_: Pass, rest: Pipeline, program: Program, error: Exception) -> None:
        if isinstance(error, UsageError):
            return
        folder = self._folder()
        try:
            with REPRODUCER_FOLDER.writing(folder, force=True) as partial:
                save_program(program, partial)
                (partial / "pipeline.txt").write_text(rest.text + "\n", "utf-8")
                (partial / "error.txt").write_text("".join(traceback.format_exception(error)), "utf-8")
                _write_record(partial)
        except UsageError as problem:  # the pass's own error is raised after this
            self._progress.note(f"  saved no reproducer: {problem.where} {problem.message}")
            return
        self._progress.note(f"  saved the program before {pass_.name} and the rest of the pipeline in {folder}")


def _write_record(folder: Path) -> None:
    """Write ``reproducer.json`` into a folder that already holds all other files."""
    entries = {path.name: entry_of(path).model_dump() for path in sorted(folder.iterdir())}
    record = {"qcgraph": metadata.version("qcgraph"), "kind": "reproducer", "files": entries}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def written_reproducer(folder: Path) -> Written | None:
    """Return the files of a reproducer and their sha256; None for another folder."""
    data = record_of(folder, RECORD)
    hashes = recorded_hashes(data)
    return {RECORD: None, **hashes} if hashes is not None and data.get("kind") == "reproducer" else None


REPRODUCER_FOLDER = FolderKind(written_reproducer, "exists and is not a reproducer")


def example_inputs(program: Program, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return inputs for a captured program: a normal latent, timesteps in the middle, conditions in turn."""
    generator = torch.Generator().manual_seed(seed)
    spec = program.facts[ModelSpec]
    conditions = in_turn(batch, spec)
    return {
        spec.latent.name: torch.randn(batch, *spec.latent_shape, generator=generator),
        TIMESTEP.name: torch.full((batch,), spec.noise_schedule.train_steps / 2),
        **{name: torch.from_numpy(values) for name, values in conditions.values.items()},
    }
