"""Running a program in PyTorch as a sampling backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from qcgraph.ir.program import Program
from qcgraph.sampling.cache_state import State, cached, depths, remember
from qcgraph.sampling.loop import Array

Observe = Callable[[str, fx.Node, torch.Tensor], None]


@contextmanager
def ordinary_torch() -> Iterator[None]:
    """Set aside what a caller may have told PyTorch to do everywhere, which would change or break what runs."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        # Outside of inference mode first: within it no mode for gradients matters, and its tensors cannot be exported.
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


class TorchRunner:
    """The reference backend: runs the graphs of a program as they are (see `qcgraph.sampling.loop.Runner`).

    Args:
        program: what to run.
        observe: called with (variant, node, first argument's value) before every op; slower, for calibration.
    """

    def __init__(self, program: Program, observe: Observe | None = None) -> None:
        self._program = program
        self._observe = observe
        self._depths = depths(program.interfaces.values())

    @property
    def program(self) -> Program:
        """The program that it runs."""
        return self._program

    def run(self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: State) -> Array:
        """Run one variant; cache tensors in ``state`` are torch tensors."""
        with ordinary_torch():
            return self._run(variant, inputs, state)

    def _run(self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: State) -> Array:
        interface = self._program.variants[variant].interface
        tensors = {name: torch.from_numpy(inputs[name]) for name in interface.input_names if name in inputs}
        for name in interface.input_names:
            if name not in tensors:
                tensors[name] = cast(torch.Tensor, cached(name, variant, state))
        outputs = self._program.run(variant, tensors) if self._observe is None else self._watch(variant, tensors)
        result = outputs.pop(interface.output_names[0])
        remember(state, outputs, self._depths)
        return cast(Array, result.numpy())

    def _watch(self, variant: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        interface = self._program.variants[variant].interface
        watcher = _Watcher(self._program.module(variant), variant, cast(Observe, self._observe))
        with torch.no_grad():
            outputs = watcher.run(*(tensors[name] for name in interface.input_names))
        return dict(zip(interface.output_names, outputs, strict=True))


class _Watcher(fx.Interpreter):
    """Interprets a graph and shows the first argument of every op."""

    def __init__(self, module: fx.GraphModule, variant: str, observe: Observe) -> None:
        super().__init__(module)
        self._variant = variant
        self._show = observe

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.args and isinstance(n.args[0], fx.Node):
            value = self.env[n.args[0]]
            if isinstance(value, torch.Tensor):
                self._show(self._variant, n, value)
        return super().run_node(n)


def walk(
    program: Program, variant: str, inputs: Sequence[torch.Tensor], *, gradients: bool = False
) -> Iterator[tuple[fx.Node, Mapping[fx.Node, Any]]]:
    """Run a variant node by node; values are let go as soon as nothing needs them any more.

    Args:
        program: what to run.
        variant: which of its variants.
        inputs: in the order of its interface.
        gradients: whether values remember how to be differentiated.

    Yields:
        A node that ran, the output last, and the values that are held, its own and those that entered it among them.
    """
    interpreter = fx.Interpreter(program.module(variant))
    interpreter.args_iter = iter(inputs)
    for node in interpreter.graph.nodes:
        with torch.set_grad_enabled(gradients):
            interpreter.env[node] = interpreter.run_node(node)
        yield node, interpreter.env
        for last in interpreter.user_to_last_uses.get(node, ()):
            del interpreter.env[last]
