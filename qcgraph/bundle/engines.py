"""The folder of engines of a bundle: ``engines.json`` and one file for each engine. Plain data, no TensorRT."""

from __future__ import annotations

import hashlib
import re
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from qcgraph.bundle.manifest import MANIFEST
from qcgraph.bundle.read import Bundle
from qcgraph.errors import BundleError
from qcgraph.files import atomic
from qcgraph.files.folder import is_sha256, name_problem, parsed, read_file, record_of, text_of

ENGINES = "engines"  # the default folder in a bundle
RECORD = "engines.json"
RECORD_FORMAT = 1
TIMING_CACHE = "timing.cache"  # measured kernel times of TensorRT's builder
BUILD_AGAIN = "build the engines again"
_FILE = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"  # the name of an engine's file; it cannot lead into another folder
_CACHE = re.compile(r"timing\.cache|runtime\.sm\d+\.cache")


class Batch(BaseModel):
    """The batches that an engine takes, in samples of its graph: under guidance two for each image.

    Attributes:
        minimum: the smallest batch.
        optimum: the batch that the engine is tuned for.
        maximum: the largest batch; an engine reserves memory for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum: int
    optimum: int
    maximum: int

    def __str__(self) -> str:
        return f"{self.minimum},{self.optimum},{self.maximum}"


class Engine(BaseModel):
    """One engine.

    Attributes:
        variant: the variant that it runs.
        file: the name of its file in the folder.
        sha256: sha256 of the file.
        bytes: size of the file in bytes.
        compute_capability: compute capability of the GPUs that it runs on, such as ``8.9``.
        batch: the batches that it takes.
        seconds: seconds that building it took.
        layers: number of layers in the network before fusion.
        steps: number of steps after fusion. This field and the next four are None where the engine does not show them.
        quantized_gemms: number of 8-bit matrix products in them; products that share an activation may be merged.
        not_quantized: nodes of the graph that multiply quantized values and became no part of an 8-bit product.
        fused_attention: number of steps that are fused attention kernels.
        conditional_jumps: number of jumps in the engine that depend on a value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    file: str = Field(pattern=_FILE)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    compute_capability: str = Field(pattern=r"^[0-9]+\.[0-9]+$")
    batch: Batch
    seconds: float
    layers: int
    steps: int | None
    quantized_gemms: int | None
    not_quantized: tuple[str, ...] | None
    fused_attention: int | None
    conditional_jumps: int | None


class Source(BaseModel):
    """The bundle that engines or exports were made of.

    Attributes:
        model: the model of the bundle.
        target: the target of the bundle.
        manifest: sha256 of the bundle's manifest, which fixes every file in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    target: str
    manifest: str


class EngineManifest(BaseModel):
    """The record of a folder of engines, ``engines.json``.

    Attributes:
        format: the layout of the record.
        qcgraph: the version of qcgraph that wrote it.
        provider: the library that built the engines, such as ``tensorrt-rtx``.
        version: the version of this library; engines run with the same version only.
        source: the bundle that the engines were built of.
        engines: the engines, by variant and then by compute capability.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    qcgraph: str
    provider: str
    version: str
    source: Source
    engines: tuple[Engine, ...]


def source_of(bundle: Bundle) -> Source:
    """Return the identity of a bundle, for the record of its engines."""
    manifest = (bundle.path / MANIFEST).read_bytes()
    return Source(
        model=bundle.manifest.model, target=bundle.manifest.target, manifest=hashlib.sha256(manifest).hexdigest()
    )


def read_engines(folder: Path) -> EngineManifest:
    """Return the record of a folder of engines.

    Raises:
        BundleError: the record is missing or malformed, or has another format.
    """
    where = str(folder / RECORD)
    text = text_of(read_file(folder, RECORD, hint=BUILD_AGAIN), where, hint=BUILD_AGAIN)
    record = parsed(where, text, EngineManifest.model_validate, hint=BUILD_AGAIN)
    if record.format != RECORD_FORMAT:
        raise BundleError(f"has format {record.format}, not {RECORD_FORMAT}", where=where, hint=BUILD_AGAIN)
    return record


def has_engines(folder: Path) -> bool:
    """Tell whether a folder holds engines that qcgraph built, of any format and in whatever state."""
    return written_engines(folder) is not None


def engine_files(folder: Path) -> frozenset[str]:
    """Return the names of the files of a folder of engines, caches among them; none for any other folder."""
    return frozenset(written_engines(folder) or ())


def written_engines(folder: Path) -> atomic.Written | None:
    """Return the files of a folder of engines and their sha256, None where unknown; None for any other folder."""
    data = record_of(folder, RECORD)
    engines = data.get("engines")
    if not isinstance(data.get("qcgraph"), str) or not isinstance(engines, list):
        return None
    files: dict[str, str | None] = {RECORD: None}
    for engine in engines:
        name, digest = (engine.get(key) if isinstance(engine, dict) else None for key in ("file", "sha256"))
        if not isinstance(name, str) or name_problem(name) or not is_sha256(digest):
            return None
        files[name] = digest
    # Runs write to caches after the record is written.
    return files | {item.name: None for item in folder.iterdir() if _CACHE.fullmatch(item.name)}


def runtime_cache(capability: str) -> str:
    """Return the name of the file beside the engines that keeps the kernels compiled for a compute capability."""
    return f"runtime.{device_tag(capability)}.cache"


def device_tag(capability: str) -> str:
    """Return a compute capability as in file names: ``sm89`` for ``8.9``."""
    return f"sm{capability.replace('.', '')}"


def write_record(folder: Path, provider: str, version: str, source: Source, engines: tuple[Engine, ...]) -> None:
    """Write ``engines.json`` into a folder that already holds the engines."""
    record = EngineManifest(
        format=RECORD_FORMAT,
        qcgraph=metadata.version("qcgraph"),
        provider=provider,
        version=version,
        source=source,
        engines=engines,
    )
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", "utf-8")


ENGINE_FOLDER = atomic.FolderKind(written_engines, "exists and holds no engines")
