"""Engines of TensorRT and TensorRT-RTX on the GPU of this machine: contexts, scratch memory, and CUDA graphs.

Nothing is allocated while an engine runs: all contexts share one scratch memory of the largest size that any of them
needs, because they run one after the other on one stream. A context has one set of addresses and shapes. Its first run
is direct, which also compiles the late kernels of TensorRT-RTX; from the second run on it is a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qcgraph.bundle.engines import Batch, Engine
from qcgraph.errors import BundleError, QcgraphError, UsageError
from qcgraph.export.tensorrt.device import device_memory, out_of_memory
from qcgraph.export.tensorrt.provider import quiet_log
from qcgraph.files.atomic import writing_file
from qcgraph.files.folder import read_file
from qcgraph.plan.spec import Interface, TensorSpec

TYPES = {"f32": "FLOAT", "f16": "HALF", "bf16": "BF16", "i64": "INT64", "i32": "INT32"}  # qcgraph's types -> TensorRT's
BUILD_AGAIN = "build the engines again: qcgraph build --force"


@dataclass(frozen=True)
class EngineFile:
    """An engine that was read, and that matches its record."""

    record: Engine
    content: bytes = field(repr=False)


class TensorRTEngines:
    """The loaded engines of a bundle (see `qcgraph.export.run.engines.Engines`).

    Args:
        module: TensorRT or TensorRT-RTX (see `qcgraph.export.tensorrt.provider.load_provider`).
        files: the engine of every variant, by variant.
        interfaces: inputs and outputs by variant.
        device: a CUDA device.
        kernels: the file for kernels that TensorRT-RTX compiles at run time; TensorRT has none.

    Raises:
        BundleError: an engine cannot be loaded, or its inputs or outputs are not those of its interface.
        UsageError: there is not enough device memory.
    """

    def __init__(
        self,
        module: Any,
        files: Mapping[str, EngineFile],
        interfaces: Mapping[str, Interface],
        device: torch.device,
        kernels: Path,
    ) -> None:
        self._log = quiet_log(module)
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._runtime = module.Runtime(self._log)
        self._batches = {variant: file.record.batch for variant, file in files.items()}
        self._engines = {variant: self._loaded(variant, file.content) for variant, file in files.items()}
        self._inputs = {
            variant: _check_tensors(module, engine, variant, interfaces[variant])
            for variant, engine in self._engines.items()
        }
        size = max(engine.device_memory_size_v2 for engine in self._engines.values())
        with device_memory("what engines compute with"):
            self._scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        self._contexts = _Contexts(module, self._engines, kernels)
        self._compiled: set[tuple[object, ...]] = set()

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return self._device

    def inputs(self, variant: str) -> frozenset[str]:
        """Return the inputs that a variant reads."""
        return self._inputs[variant]

    def batch(self, variant: str) -> Batch:
        """Return the batches that a variant takes."""
        return self._batches[variant]

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Enter a separate stream, since the default one cannot be captured; it waits for the host's and vice versa."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def settle(self) -> None:
        """Wait for all running work."""
        self._stream.synchronize()

    def bind(self, variant: str, tensors: Mapping[str, torch.Tensor]) -> TensorRTCall:
        """Return a context of a variant on these tensors.

        Raises:
            UsageError: there is not enough device memory.
            BundleError: TensorRT does not take these tensors.
        """
        self._log.errors.clear()
        context = self._contexts.make(variant)
        if context is None:
            raise self._failed(variant, "cannot be prepared")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        for name, tensor in tensors.items():
            shaped = name not in self._inputs[variant] or context.set_input_shape(name, tuple(tensor.shape))
            if not (shaped and context.set_tensor_address(name, tensor.data_ptr())):
                raise self._failed(variant, f"does not take {name} of shape {tuple(tensor.shape)}")
        if missing := context.infer_shapes():
            raise self._failed(variant, f"was not given {', '.join(missing)}")
        return TensorRTCall(self, variant, context, tuple(tuple(tensor.shape) for tensor in tensors.values()))

    def enqueue(self, variant: str, context: Any) -> None:
        """Enqueue a run of a context.

        Raises:
            UsageError: there is not enough device memory.
            BundleError: TensorRT cannot run the context.
        """
        self._log.errors.clear()
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise self._failed(variant, "cannot be run")

    def capture(self, variant: str, context: Any) -> torch.cuda.CUDAGraph | None:
        """Return a run of a context as a CUDA graph; None where it cannot be captured."""
        can_capture = getattr(context, "is_stream_capturable", None)  # TensorRT-RTX has this method
        if can_capture is not None and not can_capture(self._stream.cuda_stream):
            return None
        graph = torch.cuda.CUDAGraph()
        self._stream.synchronize()
        try:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.enqueue(variant, context)
            finally:
                graph.capture_end()
        except (QcgraphError, RuntimeError):
            return None  # runs without a graph are correct, only slower
        return graph

    def keep_kernels(self, variant: str, shapes: tuple[object, ...]) -> None:
        """Write the compiled kernels to their file, once for every variant and batch."""
        if (variant, shapes) not in self._compiled:
            self._compiled.add((variant, shapes))
            self._contexts.keep_kernels()

    def _loaded(self, variant: str, content: bytes) -> Any:
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self._failed(variant, "cannot be loaded")
        return engine

    def _failed(self, variant: str, what: str) -> QcgraphError:
        """Return the error for a failure of TensorRT, with the errors in its log."""
        said = "; ".join(dict.fromkeys(self._log.errors)) or "TensorRT does not say why"
        if "out of memory" in said.lower() or "outofmemory" in said.lower():
            return out_of_memory(f"the engine of {variant}", said)
        return BundleError(f"the engine of {variant} {what}: {said}", hint=BUILD_AGAIN)


class TensorRTCall:
    """A context of a variant at fixed addresses (see `qcgraph.export.run.engines.BoundVariant`)."""

    def __init__(self, engines: TensorRTEngines, variant: str, context: Any, shapes: tuple[object, ...]) -> None:
        self._engines = engines
        self._variant = variant
        self._context = context
        self._shapes = shapes
        self._graph: torch.cuda.CUDAGraph | None = None
        self._runs = 0

    @property
    def is_graph(self) -> bool:
        """Whether the variant runs as a CUDA graph by now."""
        return self._graph is not None

    def run(self) -> None:
        """Run the variant once; called inside of `TensorRTEngines.stream`."""
        if self._runs == 1:
            self._graph = self._engines.capture(self._variant, self._context)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._engines.enqueue(self._variant, self._context)
        if self._runs == 0:
            self._engines.keep_kernels(self._variant, self._shapes)
        self._runs += 1


class _Contexts:
    """Makes contexts with memory from qcgraph, and with the kernels that earlier runs compiled."""

    def __init__(self, module: Any, engines: Mapping[str, Any], kernels: Path) -> None:
        self._engines = engines
        self._file = kernels
        self._strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        self._configs: dict[str, Any] = {}
        self._kernels: Any = None
        self._kept = 0  # size in bytes of the kernels in the file
        if hasattr(module, "IRuntimeCache"):
            self._configs = {variant: engine.create_runtime_config() for variant, engine in engines.items()}
            self._configure(module)

    def _configure(self, module: Any) -> None:
        """Set up TensorRT-RTX, which compiles kernels when it first needs them."""
        for config in self._configs.values():
            self._kernels = self._kernels or config.create_runtime_cache()
            config.set_execution_context_allocation_strategy(self._strategy)
            # Kernels for the exact shapes, compiled before the first run ends: a graph keeps the kernels of its
            # capture.
            config.dynamic_shapes_kernel_specialization_strategy = (
                module.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            config.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
        with suppress(BundleError):  # the file does not exist yet
            content = read_file(self._file.parent, self._file.name)
            self._kept = len(content) if self._kernels.deserialize(content) else 0  # 0: another driver's, compiled anew
        for config in self._configs.values():
            config.set_runtime_cache(self._kernels)

    def make(self, variant: str) -> Any:
        """Return a context without memory of its own; None where TensorRT cannot make it."""
        return self._engines[variant].create_execution_context(self._configs.get(variant, self._strategy))

    def keep_kernels(self) -> None:
        """Write the compiled kernels to their file where there are new ones."""
        if self._kernels is None:
            return
        content = bytes(self._kernels.serialize())
        if len(content) != self._kept:
            with suppress(OSError, UsageError), writing_file(self._file) as partial:  # else they are compiled again
                partial.write_bytes(content)
            self._kept = len(content)


def _check_tensors(module: Any, engine: Any, variant: str, interface: Interface) -> frozenset[str]:
    """Return the inputs that an engine reads; graphs may have more.

    Raises:
        BundleError: the tensors of the engine are not those of the interface.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = frozenset(name for name in names if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT)
    specs = {spec.name: spec for spec in (*interface.inputs, *interface.outputs)}
    for name in names:
        if name not in specs or not _is(module, engine, specs[name]):
            planned = specs.get(name, "nothing")
            raise BundleError(f"the engine of {variant} has another {name} than its plan, {planned}", hint=BUILD_AGAIN)
    if missing := set(interface.output_names) - (set(names) - inputs):
        raise BundleError(f"the engine of {variant} does not give {min(missing)}", hint=BUILD_AGAIN)
    return inputs


def _is(module: Any, engine: Any, spec: TensorSpec) -> bool:
    """Tell whether a tensor of an engine is on the device and has the planned type."""
    on_device = engine.get_tensor_location(spec.name) == module.TensorLocation.DEVICE
    return on_device and engine.get_tensor_dtype(spec.name).name == TYPES.get(spec.dtype)
