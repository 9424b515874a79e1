"""Pass, its registry, and Pipeline: a tuple of passes that round-trips to text.

The text of a pass is its name and the options that differ from their defaults, ``insert-qdq`` or
``plan-cache{interval=3}``; the text of a pipeline is its passes with commas between. The framework, not the pass,
checks the contract: the facts that a pass requires and provides, the legality of its result, and whether it changed
the program.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, ClassVar

from qcgraph.errors import ContractError, QcgraphError, UsageError, closest, shown
from qcgraph.extensions import Extensions
from qcgraph.files.documents import is_text
from qcgraph.ir import legality
from qcgraph.ir.program import HistoryEntry, Program, Refusal
from qcgraph.pipeline.options import check_options, converted
from qcgraph.pipeline.running import Running, in_torch
from qcgraph.pipeline.workload import Workload
from qcgraph.progress import Progress
from qcgraph.sampling.reference import RunStore

MOST_CHARACTERS = 200_000  # characters of a pipeline's text, which may hold a cache schedule
_BARE = re.compile(r"[A-Za-z0-9_.:/+-]+")
_TOKEN = re.compile(r"\s*(?P<name>[a-z][a-z0-9-]*)\s*(?:\{(?P<options>[^{}]*)\})?\s*(?P<end>,|$)")
_OPTION = re.compile(r"\s*(?P<key>[a-z][a-z0-9-]*)=(?P<value>\"(?:[^\"\\]|\\.)*\"|[^\s\"]+)(?:\s+|$)")


@dataclass(frozen=True)
class Costs:
    """A measurement of the time that the variants of a program take.

    Attributes:
        runtime: the name of the runtime of the measurement.
        measure: returns milliseconds by variant for a program.
    """

    runtime: str
    measure: Callable[[Program], Mapping[str, float]]


@dataclass
class PassContext:
    """The services that the framework gives to a running pass.

    Attributes:
        progress: where to report progress.
        refusals: the refusals of the pass.
        costs: measures the variants of a program, or None where no runtime can.
        origin: the captured program, or None where the caller did not give it.
        runs: the runs of the captured program that were recorded so far.
        running: opens the runner of a program for many runs that nothing observes.
    """

    progress: Progress = field(default_factory=Progress)
    refusals: list[Refusal] = field(default_factory=list)
    costs: Costs | None = None
    origin: Program | None = None
    runs: RunStore = field(default_factory=RunStore)
    running: Running = in_torch

    def refuse(self, where: str, reason: str) -> None:
        """Record a node or site that the pass leaves alone, and the reason."""
        self.refusals.append(Refusal(where, reason))


@dataclass(frozen=True)
class Pass(ABC):
    """A program transformation. Its fields are its options, its CLI spelling, its docs and its recipe entry.

    Attributes:
        name: the spelling in pipelines; also the file's name.
        requires: the facts that the program must hold before.
        precedes: the facts that the program must not hold yet, because they depend on what this pass changes.
        provides: the facts that the program holds after.
        provides_with: facts that are provided with an option only: the text of the pass with the option, and the fact.
        samples: whether the pass samples trajectories; a dry run leaves it out.
        restarts: whether a compilation starts anew from the result of this pass, which is the captured model with other
            weights: it is the origin of the passes that follow, and the weights that it replaced are freed.

    Raises:
        UsageError: an option has a wrong type or is out of range.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[type, ...]] = ()
    precedes: ClassVar[tuple[type, ...]] = ()
    provides: ClassVar[tuple[type, ...]] = ()
    provides_with: ClassVar[tuple[tuple[str, type], ...]] = ()
    samples: ClassVar[bool] = False
    restarts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> Program:
        """Return the transformed program; the given program stays unchanged."""

    def check(self, captured: Program) -> None:  # noqa: B027 - most passes refuse nothing beforehand
        """Refuse a model that the pass cannot transform; called before any pass runs, and before anything is sampled.

        Args:
            captured: the captured program, which holds the model's spec and the step plan.

        Raises:
            UsageError: says why, with a hint.
        """

    def foreseen(self, program: Program) -> Program:
        """Return a program with what is known of the result before anything is sampled; dry runs go on from it."""
        return program

    def sizes(self, program: Program) -> tuple[int, int]:
        """Return the numbers of trajectories and of their latents that the pass leaves to later passes.

        Args:
            program: a program with a step plan.
        """
        return 0, 0

    def forwards(self, work: Workload) -> float:
        """Return about how many runs of the model on one latent the pass takes; a dry run estimates time by it."""
        return 0.0

    @property
    def text(self) -> str:
        """The pass as pipeline text."""
        changed = {item.name: getattr(self, item.name) for item in fields(self)}
        options = [
            f"{item.name.replace('_', '-')}={_format(changed[item.name])}"
            for item in fields(self)
            if changed[item.name] != item.default
        ]
        return f"{self.name}{{{' '.join(options)}}}" if options else self.name

    @classmethod
    def summary(cls) -> str:
        """Return the first sentence of the docstring, which is the help of the pass."""
        return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


class Instrument:
    """Watches a pipeline run; every hook does nothing unless it is overridden."""

    def before(self, pass_: Pass, program: Program) -> None:
        """Watch the start of a pass."""

    def after(self, pass_: Pass, before: Program, after: Program) -> None:
        """Watch the end of a pass whose result is legal; its record is the last of ``after.history``."""

    def failed(self, pass_: Pass, rest: Pipeline, program: Program, error: Exception) -> None:
        """Watch the failure of a pass, or of the check of its result; ``rest`` starts with this pass."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order."""

    passes: tuple[Pass, ...]

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def provides(self, fact: type) -> bool:
        """Return whether a pass of the pipeline provides a fact."""
        return any(fact in pass_.provides for pass_ in self.passes)

    def without_sampling(self) -> Pipeline:
        """Return the passes that can run without sampling, in their order.

        A pass that samples is left out, and so is every later pass that requires a fact which only an omitted pass
        would have provided.
        """
        kept: list[Pass] = []
        missing: set[type] = set()
        for pass_ in self.passes:
            if pass_.samples or missing.intersection(pass_.requires):
                missing.update(pass_.provides)
            else:
                missing.difference_update(pass_.provides)
                kept.append(pass_)
        return Pipeline(tuple(kept))

    def foreseen(self, program: Program) -> Program:
        """Return a program with what is known of the results of the passes that sample (see `Pass.foreseen`)."""
        for pass_ in self.passes:
            program = pass_.foreseen(program) if pass_.samples else program
        return program

    def check(self, captured: Program) -> None:
        """Ask every pass whether it can do its work on a model, before any of them runs.

        Args:
            captured: the captured program, which holds the model's spec and the step plan.

        Raises:
            UsageError: names the pass that refuses the model, and why.
        """
        for pass_ in self.passes:
            try:
                pass_.check(captured)
            except Exception as error:
                raise _located(error, pass_, ()) from error

    @property
    def text(self) -> str:
        """The pipeline as text; `parse` is the inverse."""
        return ",".join(pass_.text for pass_ in self.passes)

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Return the pipeline of a text.

        Raises:
            UsageError: the text is malformed, or names an unknown pass or option, or an option has a wrong value.
        """
        return cls(tuple(_parse(text)))

    def run(
        self,
        program: Program,
        instruments: Sequence[Instrument] = (),
        progress: Progress | None = None,
        costs: Costs | None = None,
        origin: Program | None = None,
        runs: RunStore | None = None,
        running: Running = in_torch,
    ) -> Program:
        """Run the passes one after the other, and check each against its contract.

        Args:
            program: the program to start from.
            instruments: the instruments that watch the passes.
            progress: where instruments and passes report progress.
            costs: measures the variants of a program.
            origin: the captured program, for passes that compare with it; they refuse where it is not given.
            runs: keeps the runs of the captured program that passes record, for those that follow.
            running: opens the runner of a program for many runs that nothing observes; PyTorch by default.

        Raises:
            QcgraphError: a pass refused its input or broke its contract; names it and the passes before it.
        """
        runs = RunStore() if runs is None else runs
        for index, pass_ in enumerate(self.passes):
            try:
                for instrument in instruments:
                    instrument.before(pass_, program)
                context = PassContext(progress or Progress(), costs=costs, origin=origin, runs=runs, running=running)
                result = _run_checked(pass_, program, context)
                for instrument in instruments:
                    instrument.after(pass_, program, result)
            except Exception as error:
                for instrument in instruments:
                    instrument.failed(pass_, Pipeline(self.passes[index:]), program, error)
                raise _located(error, pass_, self.passes[:index]) from error
            program = result
        return program


def _run_checked(pass_: Pass, program: Program, context: PassContext) -> Program:
    """Run one pass under its contract: requires -> run -> provides and legality of the result."""
    if missing := [kind.__name__ for kind in pass_.requires if kind not in program.facts]:
        providers = _providers(missing)
        hint = f"run {' or '.join(providers)} before it" if providers else "give the program this fact first"
        raise ContractError(f"needs {', '.join(missing)}, which the program does not hold", hint=hint)
    if stale := [kind.__name__ for kind in pass_.precedes if kind in program.facts]:
        providers = _providers(stale)
        raise ContractError(
            f"comes too late: {', '.join(stale)} is decided on what it changes, and is there already",
            hint=f"run it before {' and '.join(providers)}" if providers else "run it on a program without that fact",
        )
    result = pass_.run(program, context)
    if missing := [kind.__name__ for kind in pass_.provides if kind not in result.facts]:
        facts = ", ".join(f"{name}(...)" for name in missing)
        raise ContractError(
            f"promised {', '.join(missing)} and did not provide it", hint=f"return program.with_facts({facts})"
        )
    legality.verify(result)
    record = HistoryEntry(pass_.text, changed=result.digest != program.digest, refusals=tuple(context.refusals))
    return replace(result, history=(*program.history, record))


def _providers(facts: Sequence[str]) -> list[str]:
    """Return the texts of the passes that provide any of these facts."""
    offers = [(name, fact) for name, kind in registry().items() for fact in kind.provides]
    offers += [offer for kind in registry().values() for offer in kind.provides_with]
    return list(dict.fromkeys(text for text, fact in offers if fact.__name__ in facts))


def _located(error: Exception, pass_: Pass, done: Sequence[Pass]) -> QcgraphError:
    after = f" (after {', '.join(item.name for item in done)})" if done else ""
    where = f"pass {pass_.text}{after}"
    if not isinstance(error, QcgraphError):
        line = _line_in(pass_, error)
        return ContractError(
            f"{type(error).__name__}: {error}", where=f"{where}{line}", hint="this is a bug of the pass"
        )
    inner = f"{where}, {error.where}" if error.where else where
    return type(error)(error.message, where=inner, hint=error.hint)


def _line_in(pass_: Pass, error: Exception) -> str:
    """Return the line in the file of a pass that an error came through last, as text; nothing if there is none."""
    file = inspect.getfile(type(pass_))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", {file}:{frames[-1].lineno}, in {frames[-1].name}" if frames else ""


@cache
def registry() -> dict[str, type[Pass]]:
    """Return every pass of `qcgraph.passes` by name; each file holds one pass, and both have the same name."""
    package = importlib.import_module("qcgraph.passes")
    found: dict[str, type[Pass]] = {}
    for info in pkgutil.walk_packages(package.__path__, "qcgraph.passes."):
        *place, file = info.name.removeprefix(f"{package.__name__}.").split(".")
        if info.ispkg or file.startswith("_") or len(place) > 1:  # a folder, a helper, or a helper's folder
            continue
        module = importlib.import_module(info.name)
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == module.__name__
        ]
        expected = file.replace("_", "-")
        if [kind.name for kind in classes] != [expected]:
            raise ContractError(f"{info.name} must hold one pass, called {expected!r}")
        found[expected] = classes[0]
    return dict(sorted(found.items()))


def _problem_of(name: str, found: Any) -> str:
    if not (isinstance(found, type) and issubclass(found, Pass)):
        return f"is {found!r:.80}, not a subclass of qcgraph.pipeline.Pass"
    if getattr(found, "name", None) != name:
        return f"is called {getattr(found, 'name', None)!r}"
    return "" if is_dataclass(found) and not inspect.isabstract(found) else "is not a dataclass with a run method"


EXTENSIONS = Extensions("qcgraph.passes", "pass", lambda: registry(), _problem_of)


def find_pass(name: str) -> type[Pass]:
    """Return a pass by its name, from qcgraph or another distribution.

    Raises:
        UsageError: there is no such pass, or it is broken.
    """
    kind = registry().get(name) or EXTENSIONS.load(name)
    if kind is None:
        hint = (
            f"{closest(name, [*registry(), *EXTENSIONS.offers()])}; install the package of a pass that is not qcgraph's"
        )
        raise UsageError(f"unknown pass {shown(name)}", hint=hint)
    return kind


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """Return a pass by its name and options (keys spelled with ``-`` or ``_``).

    Raises:
        UsageError: the pass or an option is unknown, or a value does not fit.
    """
    kind = find_pass(name)
    known = {item.name for item in fields(kind)}
    values = {key.replace("-", "_"): value for key, value in options.items()}
    for key in values:
        if key not in known:
            hint = (
                closest(key.replace("_", "-"), {item.replace("_", "-") for item in known}) if known else "it has none"
            )
            raise UsageError(f"pass {name!r} has no option {shown(key.replace('_', '-'))}", hint=hint)
    return kind(**{name: converted(kind, name, value) for name, value in values.items()})


def _parse(text: str) -> Iterator[Pass]:
    if not is_text(text):
        raise UsageError("is no text", where="pipeline", hint="write it in UTF-8, without NUL")
    if len(text) > MOST_CHARACTERS:
        hint = f"{MOST_CHARACTERS} are allowed; the default pipeline has 600"
        raise UsageError(f"a text of {len(text)} characters", where="pipeline", hint=hint)
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.end() == position:
            raise UsageError(
                f"cannot read {shown(text[position:])}",
                where="pipeline",
                hint="write name{key=value key=value},name,...",
            )
        yield make_pass(match["name"], _parse_options(match["options"] or ""))
        position = match.end()
        if match["end"] == "," and position == len(text):
            raise UsageError("ends with a comma", where="pipeline", hint="take the last comma away")


def _parse_options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    position = 0
    text = text.strip()
    while position < len(text):
        match = _OPTION.match(text, position)
        if match is None:
            raise UsageError(
                f"cannot read options {shown(text[position:])}", where="pipeline", hint="write key=value key=value"
            )
        if match["key"] in options:
            raise UsageError(f"says {match['key']!r} twice", where="pipeline", hint="say every option once")
        options[match["key"]] = _value(match["value"])
        position = match.end()
    return options


def _value(text: str) -> Any:
    """Read a number, true/false, a quoted string, or a bare word."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # neither a number of thousands of digits nor a deep nest is a value
        return text
    return text if isinstance(value, dict | list) else value


def _format(value: Any) -> str:
    if isinstance(value, str) and _BARE.fullmatch(value) and _value(value) == value:
        return value
    return json.dumps(value)
