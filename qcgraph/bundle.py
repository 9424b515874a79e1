"""Bundle: a folder that a stranger can inspect, move and run. Written in one piece or not at all; no torch.

Files: ``manifest.json`` (what is in the folder, with sha256), ``recipe.lock.toml``, ``plan.json`` (the model, the step
plan and the interface of every variant), the exported graphs, ``program.json`` and ``weights.safetensors`` (the final
program), ``ir/NNN_pass.txt`` and ``.diff``, and the report. Nothing in it is code, nothing is pickled.

Writing is atomic (see `qcgraph.atomic`): a process that is killed leaves the old bundle or none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qcgraph import atomic
from qcgraph.errors import BundleError, QcgraphError, UsageError
from qcgraph.facts import Facts, decode, encode
from qcgraph.recipe import Recipe
from qcgraph.spec import Interface, ModelSpec
from qcgraph.steps import StepPlan

SCHEMA_VERSION = 1
PLAN_FORMAT = 1
MANIFEST = "manifest.json"
RECIPE = "recipe.lock.toml"
PLAN = "plan.json"
PROGRAM = "program.json"
IR_FOLDER = "ir"
PACKAGES = ("diffusers", "numpy", "onnx", "onnxruntime", "onnxscript", "torch")  # what decides what a compilation gives

_AGAIN = "copy or compile the bundle again"
_IR_NAME = re.compile(rf"{IR_FOLDER}/(?P<index>[0-9]+)_(?P<name>.+)\.txt")
_LINE_WIDTH = 200  # of a value that plan.json keeps on one line; a step fits
_Value = TypeVar("_Value")


class FileEntry(BaseModel):
    """One file of a bundle: its content's sha256 and its size in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """What is in a bundle, and what made it.

    Attributes:
        schema_version: the layout of the bundle.
        qcgraph: the version of qcgraph that wrote it.
        model: the name of the model.
        target: the name of the target.
        packages: the versions of the libraries that it was compiled with.
        files: every other file, by its path with ``/``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    qcgraph: str
    model: str
    target: str
    packages: dict[str, str]
    files: dict[str, FileEntry]


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
        atomic.restore_interrupted(path, _is_bundle)
        bundle = cls(path, _read_manifest(path))
        for damage in bundle.damage() if check else ():
            raise BundleError(damage.problem, where=str(path / damage.file), hint=_AGAIN)
        return bundle

    def damage(self) -> Iterator[Damage]:
        """The files that are missing, truncated or changed; sizes first, contents after."""
        whole = []
        for name, entry in self.manifest.files.items():
            problem = _size_problem(self.path / name, entry)
            if problem:
                yield Damage(name, problem)
            else:
                whole.append(name)
        for name in whole:
            if problem := _content_problem(self.path / name, self.manifest.files[name]):
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
            raise BundleError(error.message, where=error.where, hint=_AGAIN) from None

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
        return self._parsed(PROGRAM, lambda data: tuple(dict(record) for record in data["history"]))

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
        return self._parsed(PLAN, _decode_plan)

    def _parsed(self, name: str, build: Callable[[Any], _Value]) -> _Value:
        return _parsed(str(self.path / name), self._text(name), build)

    def _text(self, name: str) -> str:
        path, entry = self.file(name), self.manifest.files[name]
        if problem := _size_problem(path, entry) or _content_problem(path, entry):
            raise BundleError(problem, where=str(path), hint=_AGAIN)
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"cannot be read: {error}", where=str(self.path / name), hint=_AGAIN) from None


def is_bundle(path: Path | str) -> bool:
    """Whether `Bundle.open` is the one to say what is wrong with this path: a bundle, or what is left of one."""
    atomic.restore_interrupted(Path(path), _is_bundle)
    return (Path(path) / MANIFEST).is_file()


def write_plan(folder: Path, spec: ModelSpec, plan: StepPlan, interfaces: Mapping[str, Interface]) -> None:
    """Write ``plan.json`` into a folder, to be read by people too: a step a line."""
    data = {
        "format": PLAN_FORMAT,
        "model": encode(spec),
        "plan": encode(plan),
        "variants": {name: encode(interface) for name, interface in interfaces.items()},
    }
    (folder / PLAN).write_text(readable_json(data) + "\n", "utf-8")


def readable_json(value: Any, indent: str = "") -> str:
    """JSON with every value on one line that fits there."""
    flat = json.dumps(value, allow_nan=False)
    if (len(flat) <= _LINE_WIDTH and indent) or not isinstance(value, (dict, list, tuple)) or not value:
        return flat
    inner = indent + "  "
    if isinstance(value, dict):
        items = [f"{inner}{json.dumps(str(key))}: {readable_json(item, inner)}" for key, item in value.items()]
    else:
        items = [f"{inner}{readable_json(item, inner)}" for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([opening, ",\n".join(items), f"{indent}{closing}"])


def check_output(path: Path, *, force: bool) -> None:
    """Refuse a place that a bundle cannot be written to; call it before any work begins.

    Raises:
        UsageError: something is there (with ``force``: something else than a bundle), the folder around it cannot be
            written, or another process writes there now.
    """
    place = atomic.resolved(path)
    if not place.parent.is_dir():
        atomic.check_creatable(place)
        return
    with atomic.locked(place):
        atomic.clear(place, _is_bundle)
        _check_replaceable(place, path, force=force)


@contextmanager
def writing(path: Path, *, model: str, target: str, force: bool = False) -> Iterator[Path]:
    """Write a bundle in one piece.

    The body fills the folder that it is given; it writes at least ``plan.json`` and ``recipe.lock.toml``. The manifest
    is written after it, and then the folder takes its place. When the body raises, nothing changes.

    Args:
        path: where the bundle is to be.
        model: the name of the model.
        target: the name of the target.
        force: whether a bundle that is there is replaced.

    Yields:
        The folder to fill.

    Raises:
        UsageError: see `check_output`.
        BundleError: the body left out a file that every bundle has.
    """
    check_output(path, force=force)
    place = atomic.resolved(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic.locked(place):
        _check_replaceable(place, path, force=force)
        with atomic.replacing_folder(place, _is_bundle) as folder:
            yield folder
            _write_manifest(folder, model, target)


def _write_manifest(folder: Path, model: str, target: str) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): FileEntry(sha256=_sha256(path), bytes=path.stat().st_size)
        for path in files
    }
    if missing := {PLAN, RECIPE} - set(entries):
        raise BundleError(f"the bundle has no {' and no '.join(sorted(missing))}", hint="this is a bug of qcgraph")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        qcgraph=metadata.version("qcgraph"),
        model=model,
        target=target,
        packages=_package_versions(),
        files=entries,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")


def _package_versions() -> dict[str, str]:
    installed = {name for name in PACKAGES if next(iter(metadata.distributions(name=name)), None)}
    return {name: metadata.version(name) for name in sorted(installed)}


def _read_manifest(path: Path) -> Manifest:
    where = str(path / MANIFEST)
    if not path.is_dir():
        raise BundleError(
            "is a file, not a bundle" if path.exists() else "there is no such bundle",
            where=str(path),
            hint="give the folder that qcgraph compile wrote",
        )
    if not (path / MANIFEST).is_file():
        raise BundleError(
            f"is not a bundle: it has no {MANIFEST}", where=str(path), hint="give the folder that qcgraph compile wrote"
        )
    try:
        text = (path / MANIFEST).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot be read: {error}", where=where, hint=_AGAIN) from None
    _parsed(where, text, lambda data: _check_schema(data["schema_version"], where))
    manifest = _parsed(where, text, Manifest.model_validate)
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleError(f"names {name!r}, which is outside the bundle", where=where, hint=_AGAIN)
    return manifest


def _check_schema(version: int, where: str) -> None:
    if version == SCHEMA_VERSION:
        return
    newer = isinstance(version, int) and version > SCHEMA_VERSION
    raise BundleError(
        f"has schema version {version}; this qcgraph reads version {SCHEMA_VERSION}",
        where=where,
        hint="upgrade qcgraph" if newer else "compile again with this version",
    )


def _parsed(where: str, text: str, build: Callable[[Any], _Value]) -> _Value:
    """What ``build`` makes of JSON text.

    Raises:
        BundleError: the text is no JSON, or not of the shape that ``build`` expects.
    """
    try:
        return build(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{place}: {first['msg']}", where=where, hint=_AGAIN) from None
    except BundleError:
        raise
    except QcgraphError as error:
        raise BundleError(error.message, where=where, hint=_AGAIN) from None
    except json.JSONDecodeError as error:
        raise BundleError(f"is not valid JSON: {error}", where=where, hint=_AGAIN) from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"is not of the expected form ({error!r})", where=where, hint=_AGAIN) from None


def _decode_plan(data: Any) -> tuple[ModelSpec, StepPlan, dict[str, Interface]]:
    if data["format"] != PLAN_FORMAT:
        raise BundleError(f"has format {data['format']}, not {PLAN_FORMAT}", where=PLAN, hint="upgrade qcgraph")
    interfaces = {name: decode(Interface, value) for name, value in data["variants"].items()}
    return decode(ModelSpec, data["model"]), decode(StepPlan, data["plan"]), interfaces


def _size_problem(path: Path, entry: FileEntry) -> str:
    if not path.is_file():
        return "the file is missing"
    size = path.stat().st_size
    if size < entry.bytes:
        return f"the file is truncated: {size} of {entry.bytes} bytes"
    return f"the file was changed: {size} bytes instead of {entry.bytes}" if size != entry.bytes else ""


def _content_problem(path: Path, entry: FileEntry) -> str:
    return "the file was changed after it was written" if _sha256(path) != entry.sha256 else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, of any schema version."""
    try:
        data = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and {"schema_version", "qcgraph"} <= set(data) and isinstance(data.get("files"), dict)


def _check_replaceable(place: Path, path: Path, *, force: bool) -> None:
    """Refuse to replace anything that is not wholly a bundle of ours: nobody's data is lost."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not _is_bundle(place):
        raise UsageError("exists and is not a bundle", where=str(path), hint="choose another place, or move it away")
    if not force:
        raise UsageError("exists", where=str(path), hint="give --force to replace it, or choose another place")
    known = {MANIFEST, *json.loads((place / MANIFEST).read_text("utf-8"))["files"]}
    files = (file.relative_to(place) for file in sorted(place.rglob("*")) if not file.is_dir())
    for file in files:
        if file.as_posix() not in known and not any(part.startswith(".") for part in file.parts):
            raise UsageError(
                f"holds {file}, which qcgraph did not write", where=str(path), hint="move that file away first"
            )
