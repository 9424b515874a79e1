"""Reading a bundle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from qcgraph import atomic
from qcgraph.bundle.manifest import (
    AGAIN,
    MANIFEST,
    PLAN,
    RECIPE,
    Manifest,
    content_problem,
    file_problem,
    has_manifest,
    parsed,
    read_manifest,
    size_problem,
)
from qcgraph.errors import BundleError, UsageError
from qcgraph.facts import Facts, decode
from qcgraph.recipe import Recipe
from qcgraph.spec import Interface, ModelSpec
from qcgraph.steps import StepPlan

PLAN_FORMAT = 1
PROGRAM = "program.json"
REPORT = "report.json"
IR_FOLDER = "ir"

_IR_NAME = re.compile(rf"{IR_FOLDER}/(?P<index>[0-9]+)_(?P<name>.+)\.txt")
_Value = TypeVar("_Value")


class _Refusal(BaseModel):
    """What a pass refused, and why."""

    where: str
    reason: str


class _Record(BaseModel):
    """What a pass did."""

    text: str
    changed: bool
    refusals: list[_Refusal]


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was written, and in what way."""

    file: str
    problem: str


@dataclass(frozen=True)
class IrText:
    """The program as text after one pass; number 0 is the capture."""

    index: int
    name: str
    text: str = field(repr=False)


@dataclass(frozen=True)
class Bundle:
    """A compiled denoiser on disk; use `open`.

    Attributes:
        path: the folder.
        manifest: what is in it.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, check: bool = True) -> Bundle:
        """Open a bundle.

        Files that the manifest does not name are not looked at.

        Args:
            path: its folder.
            check: whether every file must be there and unchanged; without it, that is asked of a file when it is read.

        Raises:
            BundleError: it is no bundle, was written by another version, or a file is missing or changed; says which.
        """
        path = Path(path)
        atomic.restore_interrupted(path, has_manifest)
        bundle = cls(path, read_manifest(path))
        damaged = list(bundle.damage()) if check else []
        if damaged:
            others = [item.file for item in damaged[1:]]
            more = f"; also damaged: {', '.join(others)}" if others else ""
            raise BundleError(f"{damaged[0].problem}{more}", where=str(path / damaged[0].file), hint=AGAIN)
        return bundle

    def damage(self) -> Iterator[Damage]:
        """The files that are missing, truncated or changed; sizes first, contents after."""
        whole = []
        for name, entry in self.manifest.files.items():
            problem = size_problem(self.path / name, entry)
            if problem:
                yield Damage(name, problem)
            else:
                whole.append(name)
        for name in whole:
            if problem := content_problem(self.path / name, self.manifest.files[name]):
                yield Damage(name, problem)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe that it was compiled with."""
        try:
            return Recipe.from_toml(self._text(RECIPE), where=str(self.path / RECIPE))
        except UsageError as error:
            raise BundleError(error.message, where=error.where, hint=AGAIN) from None

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self._plan_file[0]

    @property
    def plan(self) -> StepPlan:
        """The step plan."""
        return self._plan_file[1]

    @property
    def interfaces(self) -> Mapping[str, Interface]:
        """Inputs and outputs of every variant, by its name."""
        return self._plan_file[2]

    @cached_property
    def facts(self) -> Facts:
        """All that the passes know; without ``program.json`` the model and the step plan only."""
        if PROGRAM not in self.manifest.files:
            return Facts([self.spec, self.plan])
        return self._parsed(PROGRAM, lambda data: Facts.decode(data["facts"]))

    @property
    def history(self) -> tuple[dict[str, Any], ...]:
        """What the passes did, in order: ``text``, ``changed`` and ``refusals`` (each ``where`` and ``reason``)."""
        if PROGRAM not in self.manifest.files:
            return ()
        return self._parsed(
            PROGRAM, lambda data: tuple(_Record.model_validate(record).model_dump() for record in data["history"])
        )

    @property
    def report(self) -> dict[str, Any]:
        """The summary of the compilation, as JSON data; empty where the bundle has none."""
        return self._parsed(REPORT, dict) if REPORT in self.manifest.files else {}

    @cached_property
    def ir_texts(self) -> tuple[IrText, ...]:
        """The program as text after each pass, in order."""
        found = [(match, name) for name in self.manifest.files if (match := _IR_NAME.fullmatch(name))]
        texts = [IrText(int(match["index"]), match["name"], self._text(name)) for match, name in found]
        return tuple(sorted(texts, key=lambda item: item.index))

    def file(self, name: str) -> Path:
        """The path of a file that the manifest names.

        Raises:
            BundleError: the bundle has no such file.
        """
        if name not in self.manifest.files:
            raise BundleError(f"the bundle has no {name}", where=str(self.path), hint="compile it for another target")
        return self.path / name

    @cached_property
    def _plan_file(self) -> tuple[ModelSpec, StepPlan, dict[str, Interface]]:
        return self._parsed(PLAN, decode_plan)

    def _parsed(self, name: str, build: Callable[[Any], _Value]) -> _Value:
        return parsed(str(self.path / name), self._text(name), build)

    def _text(self, name: str) -> str:
        path, entry = self.file(name), self.manifest.files[name]
        if problem := file_problem(path, entry):
            raise BundleError(problem, where=str(path), hint=AGAIN)
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"cannot be read: {error}", where=str(self.path / name), hint=AGAIN) from None


def is_bundle(path: Path | str) -> bool:
    """Whether `Bundle.open` is the one to say what is wrong with this path: a bundle, or what is left of one."""
    atomic.restore_interrupted(Path(path), has_manifest)
    return (Path(path) / MANIFEST).is_file()


def decode_plan(data: Any) -> tuple[ModelSpec, StepPlan, dict[str, Interface]]:
    """What ``plan.json`` holds: the model, the steps, and the interface of every variant."""
    if data["format"] != PLAN_FORMAT:
        raise BundleError(f"has format {data['format']}, not {PLAN_FORMAT}", where=PLAN, hint="upgrade qcgraph")
    interfaces = {name: decode(Interface, value) for name, value in data["variants"].items()}
    return decode(ModelSpec, data["model"]), decode(StepPlan, data["plan"]), interfaces
