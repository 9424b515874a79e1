"""A runner of engines: tensors stay on the device, at fixed addresses."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from qcgraph.bundle.engines import Batch
from qcgraph.errors import BundleError, UsageError, closest
from qcgraph.export.run.cache_buffers import Buffers, HeldBuffer
from qcgraph.export.tensorrt.device import device_memory
from qcgraph.ir.graph import DTYPES
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import BATCH, Interface, TensorSpec
from qcgraph.sampling.cache_state import State, cached, depths, remember
from qcgraph.sampling.runner import Array, Call

MOST_CALLS = 64  # number of calls kept ready; each has an execution context and a CUDA graph


class BoundVariant(Protocol):
    """A variant with every input and output at a fixed address."""

    def run(self) -> None:
        """Run the variant once; the device may still be working when this returns."""
        ...


class Engines(Protocol):
    """The engines of one bundle, which run its variants on a device."""

    @property
    def device(self) -> torch.device:
        """The device of their tensors."""
        ...

    def inputs(self, variant: str) -> frozenset[str]:
        """Return the inputs that a variant reads."""
        ...

    def batch(self, variant: str) -> Batch:
        """Return the batches that a variant takes."""
        ...

    def stream(self) -> AbstractContextManager[None]:
        """Enter a stream whose work runs after the host's earlier work, and before the host's later work."""
        ...

    def bind(self, variant: str, tensors: Mapping[str, torch.Tensor]) -> BoundVariant:
        """Return a variant on these tensors, which keep their addresses as long as it is used."""
        ...

    def settle(self) -> None:
        """Wait for all work on the stream."""
        ...


class EngineRunner:
    """Runs engines (see `qcgraph.sampling.runner.Runner`), on NumPy arrays or on tensors of the device.

    Each input and result of a variant has one place. A step writes a cache tensor into a buffer that no request holds,
    and no step writes to it again while a request holds it; reusing steps read it there. Threads take turns: the device
    runs the work of one thread before that of the next.

    Args:
        engines: the engines that run the variants.
        interfaces: inputs and outputs by variant.
    """

    def __init__(self, engines: Engines, interfaces: Mapping[str, Interface]) -> None:
        self._engines = engines
        self._interfaces = interfaces
        self._depths = depths(interfaces.values())
        self._inputs: dict[tuple[str, str, tuple[int, ...]], _Input] = {}
        self._results: dict[tuple[str, int], torch.Tensor] = {}
        self._buffers: dict[tuple[str, tuple[int, ...]], Buffers] = {}
        self._calls: OrderedDict[tuple[object, ...], BoundVariant] = OrderedDict()
        self._turn = threading.RLock()

    @property
    def engines(self) -> Engines:
        """The engines that run the variants."""
        return self._engines

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self._engines.device

    @property
    def largest_batch(self) -> int:
        """The largest batch that every step takes."""
        steps = (name for name, each in self._interfaces.items() if each.given(TensorRole.PREDICTION))
        return min(self._engines.batch(name).maximum for name in steps)

    @property
    def calls(self) -> tuple[BoundVariant, ...]:
        """The calls that are kept ready, in the order of their last runs."""
        return tuple(self._calls.values())

    def run(self, call: Call) -> Array:
        """Run one variant; the result is float32, whatever type the engine gives.

        Raises:
            UsageError: the engine does not take the batch, or the device has not enough memory.
            BundleError: there is no such variant, it reuses a value that was never computed, or TensorRT cannot run it.
        """
        return cast(Array, self.run_tensors(call).to("cpu", torch.float32).numpy())

    def run_tensors(self, call: Call) -> torch.Tensor:
        """Run one variant as `run` does, without leaving the device.

        Args:
            call: the call; its inputs are NumPy arrays, or tensors of any device and floating-point type.

        Returns:
            The result, a new tensor on the device.
        """
        variant, inputs, state = call.variant, call.inputs, call.state
        interface = self._interface(variant)
        batch = self._batch(variant, interface, inputs)
        with self._turn, device_memory(f"{variant} at a batch of {batch}"), self._engines.stream():
            tensors = self._filled(variant, interface, batch, inputs, state)
            self._forget(interface, tensors, state)
            first = interface.result
            result = tensors[first.name] = self._result(variant, first, batch)
            computed = {spec.value: self._buffers_of(spec, batch).take() for spec in interface.caches}
            tensors |= {spec.name: computed[spec.value].tensor for spec in interface.caches}
            self._call(variant, tensors).run()
            answer = result.clone()
            remember(state, computed, self._depths)
        if answer.is_cuda:
            answer.record_stream(torch.cuda.current_stream(answer.device))
        return answer

    def _interface(self, variant: str) -> Interface:
        if variant not in self._interfaces:
            raise BundleError(f"no variant {variant!r}", hint=closest(variant, self._interfaces))
        return self._interfaces[variant]

    def _batch(self, variant: str, interface: Interface, inputs: Mapping[str, Any]) -> int:
        """Return the batch of a call."""
        batch = next(len(inputs[spec.name]) for spec in interface.inputs if BATCH in spec.shape and spec.name in inputs)
        limits = self._engines.batch(variant)
        if not limits.minimum <= batch <= limits.maximum:
            raise UsageError(
                f"the engine of {variant} takes batches of {limits.minimum} to {limits.maximum}, not {batch}",
                hint="sample fewer or more at once, or build engines for it: qcgraph build --batch MIN,OPT,MAX; under "
                "guidance a batch is two latents a sample",
            )
        return batch

    def _filled(
        self, variant: str, interface: Interface, batch: int, inputs: Mapping[str, Any], state: State
    ) -> dict[str, torch.Tensor]:
        """Return the input tensors of a call by name, with their values."""
        tensors = {}
        for spec in interface.inputs:
            if spec.name not in self._engines.inputs(variant):
                continue
            if spec.name in inputs:
                tensors[spec.name] = self._input(spec, batch).filled(inputs[spec.name])
            else:
                tensors[spec.name] = cast(HeldBuffer, cached(spec, variant, state)).tensor
        return tensors

    def _forget(self, interface: Interface, read: Mapping[str, torch.Tensor], state: State) -> None:
        """Drop the oldest cached values of a request, so that their buffers are free for the values that replace them.

        Values that this call reads are kept, so that a failed call can be repeated.
        """
        reading = {(spec.value, spec.age) for spec in interface.taken(TensorRole.CACHE) if spec.name in read}
        for spec in interface.caches:
            oldest = (spec.value, self._depths.get(spec.value, 0))
            if oldest not in reading:
                state.pop(oldest, None)

    def _input(self, spec: TensorSpec, batch: int) -> _Input:
        key = (spec.name, spec.dtype, _shape(spec, batch))
        if key not in self._inputs:
            self._inputs[key] = _Input(spec.name, self._empty(spec, batch))
        return self._inputs[key]

    def _result(self, variant: str, spec: TensorSpec, batch: int) -> torch.Tensor:
        key = (variant, batch)
        if key not in self._results:
            self._results[key] = self._empty(spec, batch)
        return self._results[key]

    def _buffers_of(self, spec: TensorSpec, batch: int) -> Buffers:
        key = (spec.name, _shape(spec, batch))
        if key not in self._buffers:
            self._buffers[key] = Buffers(lambda: self._empty(spec, batch))
        return self._buffers[key]

    def _empty(self, spec: TensorSpec, batch: int) -> torch.Tensor:
        return torch.empty(_shape(spec, batch), dtype=DTYPES[spec.dtype], device=self.device)

    def _call(self, variant: str, tensors: Mapping[str, torch.Tensor]) -> BoundVariant:
        """Return a variant on these tensors, as it was bound before if it was."""
        key = (variant, *((name, tensor.data_ptr(), tuple(tensor.shape)) for name, tensor in tensors.items()))
        if key not in self._calls:
            if len(self._calls) >= MOST_CALLS:
                self._engines.settle()
                self._calls.popitem(last=False)
            self._calls[key] = self._engines.bind(variant, tensors)
        self._calls.move_to_end(key)
        return self._calls[key]


class _Input:
    """The place of an input."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self._name = name
        self._tensor = tensor
        self._known: npt.NDArray[np.generic] | None = None

    def filled(self, value: Any) -> torch.Tensor:
        """Copy a value to the tensor and return it; small arrays of the host, such as labels, are copied if changed."""
        if tuple(value.shape) != tuple(self._tensor.shape):
            raise UsageError(
                f"{self._name} has shape {tuple(value.shape)}", hint=f"it takes {tuple(self._tensor.shape)}"
            )
        if not isinstance(value, np.ndarray):
            self._known = None
            self._tensor.copy_(value, non_blocking=True)
        elif self._known is None or value.ndim > 1 or not np.array_equal(value, self._known):
            self._known = value.copy() if value.ndim <= 1 else None
            self._tensor.copy_(torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape), non_blocking=True)
        return self._tensor


def _shape(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    return tuple(batch if dim == BATCH else int(dim) for dim in spec.shape)
