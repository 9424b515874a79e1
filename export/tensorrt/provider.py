"""TensorRT and TensorRT-RTX: reading an ONNX graph, and building an engine of it.

Both have the same API under different module names; `LIBRARIES` has a row for each. The module is imported when it is
needed, so no other part of qcgraph requires it.

TensorRT-RTX builds for a compute capability ahead of time, without such a GPU and without measuring. It chooses and
compiles kernels on the GPU at the first run of an engine, with a runtime cache of its own. TensorRT builds for the GPU
of this machine and measures kernels on it; later builds start from these measurements, the timing cache.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcgraph.bundle.engines import Batch
from qcgraph.errors import BundleError, QcgraphError, UsageError, closest
from qcgraph.plan.spec import BATCH, Interface
from qcgraph.progress import PLAIN_INTERVAL, Progress

_CAPABILITY = re.compile(r"SM(\d+)(\d)")
_DECOMPOSABLE = "ATTENTION_INPUT"  # the first layer of ONNX's Attention


@dataclass(frozen=True)
class Provider:
    """A library with TensorRT's API.

    Attributes:
        name: its name in qcgraph.
        title: its usual name.
        module: its Python module.
        install: the command that installs it.
        builds_ahead: whether it builds for any GPU; else it builds for, and measures on, the GPU of this machine.
    """

    name: str
    title: str
    module: str
    install: str
    builds_ahead: bool


LIBRARIES: Mapping[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("tensorrt", "TensorRT", "tensorrt", "pip install tensorrt", False),
        Provider("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", "pip install qcgraph[tensorrt-rtx]", True),
    )
}


@dataclass(frozen=True)
class NodeProblem:
    """A node that TensorRT cannot hold.

    Attributes:
        node: the node's name; empty where TensorRT does not say.
        operator: the node's ONNX operator; empty where TensorRT does not say.
        reason: TensorRT's message.
    """

    node: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Built:
    """A serialized engine.

    Attributes:
        engine: the bytes of the engine.
        seconds: seconds that building it took.
        layers: layers of the network before fusion.
        timing_cache: earlier and new measurements of kernels; None where the provider does not measure.
    """

    engine: memoryview = field(repr=False)
    seconds: float
    layers: int
    timing_cache: bytes | None = field(default=None, repr=False)


def load_provider(name: str) -> Any:
    """Return the module of a provider.

    Raises:
        UsageError: the provider is unknown, not installed, or cannot be loaded here.
    """
    if name not in LIBRARIES:
        raise UsageError(f"unknown provider {name!r}", hint=closest(name, LIBRARIES))
    provider = LIBRARIES[name]
    try:
        return importlib.import_module(provider.module)
    except ModuleNotFoundError as error:
        if error.name == provider.module:
            raise UsageError(f"{provider.title} is not installed", hint=provider.install) from None
        raise UsageError(f"{provider.title} is not complete: {error}", hint=provider.install) from None
    except (ImportError, OSError) as error:
        raise UsageError(f"{provider.title} cannot be loaded: {error}", hint=provider.install) from None


def compute_capabilities(module: Any) -> dict[str, Any]:
    """Return the compute capabilities that a provider builds for ahead of time, rising: ``8.9`` -> its constant."""
    if not hasattr(module, "ComputeCapability"):
        return {}
    members = module.ComputeCapability.__members__
    found = [(match, members[name]) for name in members if (match := _CAPABILITY.fullmatch(name))]
    found.sort(key=lambda item: (int(item[0][1]), int(item[0][2])))
    return {f"{match[1]}.{match[2]}": constant for match, constant in found}


def problems(module: Any, graph: Path) -> tuple[NodeProblem, ...]:
    """Return every node of an ONNX graph that TensorRT cannot hold; none when it can build the graph."""
    return _Reading(module, graph).problems


def build(
    module: Any,
    graph: Path,
    interface: Interface,
    batch: Batch,
    capability: str,
    progress: Progress | None = None,
    timing_cache: bytes = b"",
) -> Built:
    """Build an engine of an ONNX graph.

    The network is strongly typed: every tensor has its type in the graph, and nothing is rounded further. Files that
    the graph refers to are read from the folder of the graph.

    Args:
        module: see `load_provider`.
        graph: the ONNX file.
        interface: the inputs and outputs that the graph must have.
        batch: the batches that the engine takes.
        capability: a key of `compute_capabilities`; that of this machine's GPU where the provider does not build ahead.
        progress: reports progress of slow builds.
        timing_cache: the cache of an earlier build; ignored if it is of another GPU or version.

    Raises:
        UsageError: TensorRT cannot hold the graph, or cannot build it; names nodes and reasons.
        BundleError: the graph has other inputs or outputs.
    """
    reading = _Reading(module, graph)
    if reading.problems:
        raise refusal({graph.name: reading.problems})
    _check_interface(reading.network, interface, graph)
    _let_attention_decompose(module, reading.network)
    builder, watch = reading.builder, _watch(module, f"{graph.stem} for {capability}", progress or Progress())
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, interface, batch))
    ahead = compute_capabilities(module)
    if ahead:
        config.num_compute_capabilities = 1
        config.set_compute_capability(ahead[capability], 0)
    if hasattr(module.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # else runs cannot be captured as a CUDA graph
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
    timings = None if ahead else timings_of(config, timing_cache)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = watch
    layers, start = reading.network.num_layers, time.perf_counter()
    engine = _run(builder, reading.network, config, watch)
    seconds = time.perf_counter() - start
    if engine is None:
        raise _build_error(graph, capability, reading.log.errors)
    return Built(memoryview(engine), seconds, layers, None if timings is None else bytes(timings.serialize()))


def refusal(found: Mapping[str, tuple[NodeProblem, ...]]) -> UsageError:
    """Return the error for graphs that TensorRT cannot hold, by file name: every node, and each reason once."""
    lines = []
    for name, nodes in found.items():
        reasons: dict[tuple[str, str], list[str]] = {}
        for problem in nodes:
            reasons.setdefault((problem.operator, problem.reason), []).append(problem.node)
        for (operator, reason), names in reasons.items():
            named = f": {', '.join(names)}" if any(names) else ""
            lines.append(f"  {name}: {' '.join(filter(None, (operator, reason)))}{named}")
    count = sum(len(nodes) for nodes in found.values())
    return UsageError(
        "\n".join([f"TensorRT cannot hold {count} of the nodes", *lines]) if count > 1 else lines[0].strip(),
        hint="compile the model for a target of TensorRT, see qcgraph targets",
    )


class _Reading:
    """A graph that TensorRT has read. The parser owns the weights, so it has to live as long as the network."""

    def __init__(self, module: Any, graph: Path) -> None:
        self.log = quiet_log(module)
        self.builder = module.Builder(self.log)
        flags = getattr(module, "NetworkDefinitionCreationFlag", None)
        strong = getattr(flags, "STRONGLY_TYPED", None)  # later versions have this kind only
        self.network = self.builder.create_network(0 if strong is None else 1 << int(strong))
        self._parser = module.OnnxParser(self.network, self.log)
        self.problems = () if self._parser.parse_from_file(str(graph)) else tuple(self._errors())

    def _errors(self) -> Iterator[NodeProblem]:
        for index in range(self._parser.num_errors):
            error = self._parser.get_error(index)
            # TensorRT's only message for an operator that it lacks is "false".
            reason = "is not supported" if error.desc() in ("", "false") else " ".join(error.desc().split())
            yield NodeProblem(error.node_name(), error.node_operator(), reason)


def _check_interface(network: Any, interface: Interface, graph: Path) -> None:
    inputs = {network.get_input(index).name for index in range(network.num_inputs)}
    outputs = {network.get_output(index).name for index in range(network.num_outputs)}
    if not inputs <= set(interface.input_names) or outputs != set(interface.output_names):
        raise BundleError(
            f"has the inputs {sorted(inputs)} and outputs {sorted(outputs)}, not those of its plan",
            where=str(graph),
            hint="compile the bundle again",
        )


def timings_of(config: Any, earlier: bytes) -> Any:
    """Return the timing cache of a build: the earlier one, or an empty one if the earlier is unfit.

    The cache must live as long as the build.
    """
    for content in (earlier, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _profile(builder: Any, interface: Interface, batch: Batch) -> Any:
    """Return the shapes of an engine. Inputs without a batch, such as the scalars group and row, need none."""
    profile = builder.create_optimization_profile()
    for spec in interface.inputs:
        if BATCH in spec.shape:
            sizes = (batch.minimum, batch.optimum, batch.maximum)
            profile.set_shape(
                spec.name, *(tuple(size if dim == BATCH else int(dim) for dim in spec.shape) for size in sizes)
            )
    return profile


def _let_attention_decompose(module: Any, network: Any) -> None:
    """Let attention without a fused kernel, as in float32, be built of its parts, since building fails otherwise."""
    kind = getattr(module.LayerType, _DECOMPOSABLE, None)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if kind is not None and layer.type == kind:
            layer.__class__ = module.IAttentionInputLayer  # a cast; the bindings give the base class only
            layer.attention.decomposable = True


def quiet_log(module: Any) -> Any:
    """Return a logger that keeps errors and prints nothing: TensorRT's own writes to stdout, which is for data."""
    serious = (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR)

    class Log(module.ILogger):  # type: ignore[misc]  # the module has no annotations
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in serious:
                self.errors.append(" ".join(message.split()))

    return Log()


def _run(builder: Any, network: Any, config: Any, watch: Any) -> Any:
    """Return the serialized engine, or None.

    The build runs in a thread of its own. A signal is raised in the main thread, in the Python code that comes next,
    and in a callback it would have to pass through TensorRT's C++. With this thread it finds the main thread waiting.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        building = pool.submit(builder.build_serialized_network, network, config)
        try:
            return building.result()
        except BaseException:
            watch.goes_on = False  # TensorRT stops at its next step, and the pool waits for it
            raise


def _watch(module: Any, label: str, progress: Progress) -> Any:
    """Return a monitor that reports TensorRT's phases while it builds, at intervals."""

    class Watch(module.IProgressMonitor):  # type: ignore[misc]  # the module has no annotations
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.goes_on = True
            self._start = self._reported = time.monotonic()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            now = time.monotonic()
            if now - self._reported >= PLAIN_INTERVAL:
                self._reported = now
                progress.note(f"  {label}: {phase.lower()}, {now - self._start:.0f} s")

        def step_complete(self, phase: str, step: int) -> bool:
            return self.goes_on

        def phase_finish(self, phase: str) -> None:
            pass

    return Watch()


def _build_error(graph: Path, capability: str, errors: list[str]) -> QcgraphError:
    said = "; ".join(dict.fromkeys(errors)) or "TensorRT does not say why"
    return UsageError(
        f"TensorRT cannot build it for {capability}: {said}",
        where=graph.name,
        hint="compile the model for a target of TensorRT (see qcgraph targets)",
    )
