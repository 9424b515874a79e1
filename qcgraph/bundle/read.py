"""Opening a bundle, and reading the files in it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from qcgraph.bundle.manifest import (
    CHANGED,
    MANIFEST,
    PLAN,
    RECIPE,
    Manifest,
    content_problem,
    has_manifest,
    read_manifest,
    size_problem,
)
from qcgraph.bundle.report import REPORT, CompileReport, parse_report
from qcgraph.errors import BundleError, UsageError
from qcgraph.facts import Facts, decode
from qcgraph.files import atomic
from qcgraph.files.folder import AGAIN, name_problem, parsed, path_problem, read_file, text_of
from qcgraph.plan.spec import Interface, ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.recipe import Recipe

PLAN_FORMAT = 2
PROGRAM = "program.json"
IR_FOLDER = "ir"
_KEPT = (PLAN, RECIPE, REPORT)  # read together when a bundle is opened, so that they belong to one bundle
_LARGEST_KEPT = 2**24  # bytes
_ATTEMPTS = 20  # attempts at opening a bundle that is replaced meanwhile
_LARGEST_COUNT = 10**6  # number of values of a condition
_LARGEST_LATENT = 2**28  # numbers of one sample

_IR_NAME = re.compile(rf"{IR_FOLDER}/(?P<index>[0-9]+)_(?P<name>.+)\.txt")
_Value = TypeVar("_Value")


class _RefusalData(BaseModel):
    """A site or node that a pass refused, and the reason."""

    where: str
    reason: str


class _Record(BaseModel):
    """The result of a pass."""

    text: str
    changed: bool
    refusals: list[_RefusalData]


@dataclass(frozen=True)
class Damage:
    """A file that differs from the one that was written, and the difference."""

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
    """A compiled denoiser on disk; opened with `open`.

    Attributes:
        path: the folder.
        manifest: the files in it, and its origin.
    """

    path: Path
    manifest: Manifest
    _kept: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    _stamp: tuple[int, ...] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path | str, *, check: bool = True) -> Bundle:
        """Open a bundle.

        Files that the manifest does not name are ignored. When another process replaces the bundle at this moment, the
        result is the whole old bundle or the whole new one.

        Args:
            path: the folder of the bundle.
            check: whether every file must be present and unchanged; else each file is checked when it is read.

        Raises:
            BundleError: the folder is not a bundle or of another version, or a file is missing or changed; names the
                file.
        """
        path = Path(path)
        for _ in range(_ATTEMPTS):
            atomic.restore_interrupted(path, has_manifest)
            before = atomic.stamp(path)
            try:
                opened: Bundle | BundleError = cls._open(path, before, check=check)
            except BundleError as error:
                opened = error
            if before == atomic.stamp(path) and (before is not None or not _appears(path)):
                break
        if isinstance(opened, BundleError):
            raise opened
        return opened

    @classmethod
    def _open(cls, path: Path, stamp: tuple[int, ...] | None, *, check: bool) -> Bundle:
        """Open the bundle that is at a path now; see `open`."""
        manifest = read_manifest(path)
        kept = {}
        for name in _KEPT:
            entry = manifest.files.get(name)
            if entry is not None and entry.bytes <= _LARGEST_KEPT and not path_problem(path, name):
                kept[name] = read_file(path, name)
        bundle = cls(path, manifest, kept, stamp)
        damaged = list(bundle.damage()) if check else []
        if damaged:
            others = [item.file for item in damaged[1:]]
            more = f"; also damaged: {', '.join(others)}" if others else ""
            raise BundleError(f"{damaged[0].problem}{more}", where=str(path / damaged[0].file), hint=AGAIN)
        return bundle

    def damage(self) -> Iterator[Damage]:
        """Yield the files that are missing, truncated or changed: all sizes are checked first, then the contents."""
        whole = []
        for name, entry in self.manifest.files.items():
            problem = size_problem(self.path, name, entry)
            if problem:
                yield Damage(name, problem)
            else:
                whole.append(name)
        for name in whole:
            if problem := content_problem(self.path, name, self.manifest.files[name]):
                yield Damage(name, problem)

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe of the compilation."""
        try:
            return Recipe.from_toml(self._text(RECIPE), where=str(self.path / RECIPE))
        except UsageError as error:
            raise BundleError(error.message, where=error.where, hint=AGAIN) from None
        except (ValueError, RecursionError) as error:  # raised by tomllib for a number or nesting out of its range
            where = str(self.path / RECIPE)
            raise BundleError(f"is not valid TOML ({str(error)[:100]})", where=where, hint=AGAIN) from None

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
        """The facts that the passes recorded; without ``program.json`` the model and the step plan only."""
        if PROGRAM not in self.manifest.files:
            return Facts([self.spec, self.plan])
        return self._parsed(PROGRAM, lambda data: Facts.decode(data["facts"]))

    @property
    def history(self) -> tuple[dict[str, Any], ...]:
        """The record of each pass in order: ``text``, ``changed`` and ``refusals`` (each ``where`` and ``reason``)."""
        if PROGRAM not in self.manifest.files:
            return ()
        return self._parsed(
            PROGRAM, lambda data: tuple(_Record.model_validate(record).model_dump() for record in data["history"])
        )

    @property
    def report(self) -> CompileReport | None:
        """The report of the compilation, None where the bundle has none.

        Raises:
            BundleError: the report has another schema version or shape.
        """
        return self._parsed(REPORT, parse_report) if REPORT in self.manifest.files else None

    @cached_property
    def ir_texts(self) -> tuple[IrText, ...]:
        """The program as text after each pass, in order."""
        found = [(match, name) for name in self.manifest.files if (match := _IR_NAME.fullmatch(name))]
        texts = [IrText(int(match["index"]), match["name"], self._text(name)) for match, name in found]
        return tuple(sorted(texts, key=lambda item: item.index))

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest names.

        Raises:
            BundleError: the bundle has no such file, or it leads out of the bundle.
        """
        if name not in self.manifest.files:
            raise BundleError(f"the bundle has no {name}", where=str(self.path), hint="compile it for another target")
        if problem := path_problem(self.path, name):
            raise self._damaged(name, problem)
        return self.path / name

    @cached_property
    def _plan_file(self) -> tuple[ModelSpec, StepPlan, dict[str, Interface]]:
        spec, plan, interfaces = self._parsed(PLAN, decode_plan)
        if unknown := plan.roles.keys() ^ interfaces.keys():
            problem = f"says of {min(unknown)!r} what it is for, or what it takes, and not both"
            raise BundleError(problem, where=str(self.path / PLAN), hint=AGAIN)
        return spec, plan, interfaces

    def _parsed(self, name: str, build: Callable[[Any], _Value]) -> _Value:
        return parsed(str(self.path / name), self._text(name), build)

    def _text(self, name: str) -> str:
        """Return the text of a file that the manifest names, if the file is unchanged."""
        self.file(name)
        entry = self.manifest.files[name]
        if problem := "" if name in self._kept else size_problem(self.path, name, entry):
            raise self._damaged(name, problem)
        content = self._kept.get(name)
        if content is None:
            content = read_file(self.path, name, largest=max(entry.bytes, 1))
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise self._damaged(name, size_problem(self.path, name, entry) or CHANGED)
        return text_of(content, str(self.path / name))

    def _damaged(self, name: str, problem: str) -> BundleError:
        """Return the error about a file, which may belong to another bundle by now."""
        if self._stamp is not None and self._is_replaced():
            return BundleError("was replaced while it was read", where=str(self.path), hint="run it again")
        return BundleError(problem, where=str(self.path / name), hint=AGAIN)

    def _is_replaced(self) -> bool:
        try:
            return self._stamp != atomic.stamp(self.path) and read_manifest(self.path) != self.manifest
        except BundleError:
            return True


def _appears(path: Path) -> bool:
    """Tell whether a folder that was missing a moment ago is there now, or is being put in place."""
    return atomic.is_interrupted(path) or atomic.stamp(path) is not None


def is_bundle(path: Path | str) -> bool:
    """Tell whether a path holds a bundle or the remains of one, so that `Bundle.open` can say what is wrong with it."""
    atomic.restore_interrupted(Path(path), has_manifest)
    return (Path(path) / MANIFEST).is_file()


def decode_plan(data: Any) -> tuple[ModelSpec, StepPlan, dict[str, Interface]]:
    """Return the content of ``plan.json``: the model, the steps, and the interface of every variant.

    Raises:
        BundleError: the format is another one, or a number is impossible for a model, a step or an interface.
        ValueError: the data has another shape.
    """
    if data["format"] != PLAN_FORMAT:
        raise BundleError(f"has format {data['format']!r:.40}, not {PLAN_FORMAT}", where=PLAN, hint=AGAIN)
    _check_finite(data["plan"])
    interfaces = {name: decode(Interface, value) for name, value in data["variants"].items()}
    for name in interfaces:
        if "/" in name or name_problem(f"{name}.onnx"):
            raise ValueError(f"{name!r} is no name of a variant")
    spec, plan = decode(ModelSpec, data["model"]), decode(StepPlan, data["plan"])
    _check_sizes(spec)
    if any(not 0 <= number < len(plan) for step in plan.steps for number in (step.group, step.row)):
        raise ValueError("a group or a row is none of the steps")
    return spec, plan, interfaces


def _check_sizes(spec: ModelSpec) -> None:
    """Refuse sizes that no model has, before anything of such a size is allocated."""
    if min(spec.latent_shape) < 1 or math.prod(spec.latent_shape) > _LARGEST_LATENT:
        raise ValueError(f"a latent of {spec.latent_shape} is none")
    for condition in spec.conditions:
        if condition.count is not None and not 0 < condition.count <= _LARGEST_COUNT:
            raise ValueError(f"{condition.count} values of {condition.name}")
        if math.prod(condition.shape, start=1) > _LARGEST_LATENT or min(condition.shape, default=1) < 1:
            raise ValueError(f"{condition.name} of shape {condition.shape} is no condition")


def _check_finite(data: Any) -> None:
    """Refuse NaN and infinity, which would make every sample NaN."""
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError(f"holds {data}")
    for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        _check_finite(item)
