"""A runner that executes a program in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import fx

from qcgraph.ir.program import Program
from qcgraph.sampling.cache_state import cached, depths, remember
from qcgraph.sampling.runner import Array, Call

Observe = Callable[[Call, fx.Node, torch.Tensor], None]


@contextmanager
def ordinary_torch() -> Iterator[None]:
    """Set aside global settings of PyTorch that would change or break a run, such as autocast or a default dtype."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        # Leave inference mode first: within it no mode for gradients matters, and its tensors cannot be exported.
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
    """The reference runtime, which runs the graphs of a program unchanged (see `qcgraph.sampling.runner.Runner`).

    Args:
        program: the program to run.
        observe: called with (call, node, first argument's value) before every op, for calibration; makes runs slower.
    """

    def __init__(self, program: Program, observe: Observe | None = None) -> None:
        self._program = program
        self._observe = observe
        self._depths = depths(program.interfaces.values())

    @property
    def program(self) -> Program:
        """The program that this runner runs."""
        return self._program

    def run(self, call: Call) -> Array:
        """Run one variant; cached values in the state are torch tensors."""
        with ordinary_torch():
            return self._run(call)

    def _run(self, call: Call) -> Array:
        interface = self._program.variants[call.variant].interface
        tensors = {
            spec.name: torch.from_numpy(call.inputs[spec.name])
            if spec.name in call.inputs
            else cast(torch.Tensor, cached(spec, call.variant, call.state))
            for spec in interface.inputs
        }
        outputs = self._program.run(call.variant, tensors) if self._observe is None else self._watch(call, tensors)
        remember(call.state, {spec.value: outputs[spec.name] for spec in interface.caches}, self._depths)
        return cast(Array, outputs[interface.result.name].numpy())

    def _watch(self, call: Call, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        interface = self._program.variants[call.variant].interface
        watcher = _Watcher(self._program.module(call.variant), call, cast(Observe, self._observe))
        with torch.no_grad():
            outputs = watcher.run(*(tensors[name] for name in interface.input_names))
        return dict(zip(interface.output_names, outputs, strict=True))


class _Watcher(fx.Interpreter):
    """Interprets a graph and passes the first argument of every op to an observer."""

    def __init__(self, module: fx.GraphModule, call: Call, observe: Observe) -> None:
        super().__init__(module)
        self._call = call
        self._show = observe

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.args and isinstance(n.args[0], fx.Node):
            value = self.env[n.args[0]]
            if isinstance(value, torch.Tensor):
                self._show(self._call, n, value)
        return super().run_node(n)


def walk(
    program: Program, variant: str, inputs: Sequence[torch.Tensor], *, gradients: bool = False
) -> Iterator[tuple[fx.Node, Mapping[fx.Node, Any]]]:
    """Run a variant node by node, and free every value after its last use.

    Args:
        program: the program to run.
        variant: the name of one of its variants.
        inputs: in the order of its interface.
        gradients: whether gradients are recorded.

    Yields:
        A node that ran, the output last, and all values that are held then, with the node's own value and its
        arguments.
    """
    interpreter = fx.Interpreter(program.module(variant))
    interpreter.args_iter = iter(inputs)
    for node in interpreter.graph.nodes:
        with torch.set_grad_enabled(gradients):
            interpreter.env[node] = interpreter.run_node(node)
        yield node, interpreter.env
        for last in interpreter.user_to_last_uses.get(node, ()):
            del interpreter.env[last]
