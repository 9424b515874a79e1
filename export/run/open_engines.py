"""Opening the engines of a bundle that are for the GPU of this machine, if they match their record."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qcgraph.bundle import Bundle
from qcgraph.bundle.engines import (
    ENGINES,
    RECORD,
    Engine,
    has_engines,
    read_engines,
    runtime_cache,
    source_of,
)
from qcgraph.bundle.watch import reading
from qcgraph.errors import BundleError, UsageError
from qcgraph.export.run.engines import EngineRunner
from qcgraph.export.run.tensorrt import BUILD_AGAIN, EngineFile, TensorRTEngines
from qcgraph.export.tensorrt.device import capability_of, require_device
from qcgraph.export.tensorrt.provider import LIBRARIES, load_provider
from qcgraph.files.folder import read_file


def open_bundle(bundle: Bundle, provider: str, threads: int | None) -> EngineRunner:
    """Return a runner on the engines in a bundle.

    Raises:
        UsageError: a number of threads was given, or `open_engines` lacks TensorRT, a GPU or memory.
        BundleError: there are no engines that run here, or the bundle was replaced meanwhile.
    """
    if threads is not None:
        raise UsageError(f"{threads} threads have no effect on engines", hint="leave the number of threads out")
    with reading(bundle):
        return open_engines(bundle, provider)


def open_engines(bundle: Bundle, provider: str, folder: Path | None = None) -> EngineRunner:
    """Return a runner on the engines of a bundle.

    Args:
        bundle: the bundle to run.
        provider: see `qcgraph.export.tensorrt.provider.LIBRARIES`.
        folder: the folder of its engines; ``engines`` in the bundle by default.

    Raises:
        UsageError: TensorRT is not installed, or there is no GPU or not enough memory on it.
        BundleError: engines are missing or damaged, or belong to another bundle, GPU or version of the library.
    """
    module, device = load_provider(provider), require_device()
    place, capability = folder or bundle.path / ENGINES, capability_of(device)
    chosen = choose_engines(place, bundle, provider, module.__version__, capability)
    files = {variant: EngineFile(engine, read_engine(place, engine)) for variant, engine in chosen.items()}
    kernels = place / runtime_cache(capability)
    return EngineRunner(TensorRTEngines(module, files, bundle.interfaces, device, kernels), bundle.interfaces)


def choose_engines(folder: Path, bundle: Bundle, provider: str, version: str, capability: str) -> dict[str, Engine]:
    """Return the engine of every variant of a bundle that runs here.

    Args:
        folder: a folder of engines.
        bundle: the bundle that they have to be built of.
        provider: the library that is to run them.
        version: the version of this library.
        capability: the compute capability of the GPU, such as ``8.9``.

    Raises:
        BundleError: there are none; says which engines there are instead.
    """
    build = f"qcgraph build {bundle.path} --target {provider} --compute-capability {capability}"
    if not has_engines(folder):
        raise BundleError("there are no engines", where=str(folder), hint=build)
    record, title = read_engines(folder), LIBRARIES[provider].title
    there = tuple(dict.fromkeys(engine.compute_capability for engine in record.engines))
    chosen = {engine.variant: engine for engine in record.engines if engine.compute_capability == capability}
    problem = None
    if record.source != source_of(bundle):
        problem = f"they were built of another bundle: {record.source.model}, {record.source.target}"
    elif record.provider != provider:
        problem = f"they were built for {record.provider}, not for {provider}"
    elif record.version != version:
        problem = f"they were built with {title} {record.version}, and {version} is installed"
    elif not chosen:
        problem = f"they are for compute capability {', '.join(there)}, and this GPU has {capability}"
    elif missing := set(bundle.interfaces) - set(chosen):
        problem = f"there is none of {min(missing)}"
    if problem is not None:
        raise BundleError(problem, where=str(folder / RECORD), hint=f"{build} --force")
    return {variant: chosen[variant] for variant in bundle.interfaces}


def read_engine(folder: Path, engine: Engine) -> bytes:
    """Return the bytes of an engine.

    Raises:
        BundleError: the file is missing or changed.
    """
    content = read_file(folder, engine.file, largest=engine.bytes, hint=BUILD_AGAIN)
    if hashlib.sha256(content).hexdigest() != engine.sha256:
        where = str(folder / engine.file)
        raise BundleError("is not the file that was built", where=where, hint=BUILD_AGAIN)
    return content
