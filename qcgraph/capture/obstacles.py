"""Errors that say why a module cannot be captured: its mode, its parts, its operators, and the line of the model."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
from torch import fx, nn

from qcgraph.errors import CaptureError
from qcgraph.ir.graph import module_path
from qcgraph.plan.spec import ModelSpec

_OWN = (Path(torch.__file__).parent, Path(__file__).parents[1], Path(torch.utils.__file__).parent)
_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<code>[^\n]*)')
_CONSTANT = re.compile(r"to be a constant \((\d+)\)")
TABLE = "LEGAL_OPERATORS in qcgraph/ir/legal_operators.py"


def refuse_module(module: nn.Module, spec: ModelSpec) -> None:
    """Refuse a module that has a part in training mode, or a tensor that is not on the CPU.

    Raises:
        CaptureError: says which part.
    """
    training = next((path for path, part in module.named_modules() if part.training), None)
    if training is not None:
        what = f"its part {training!r}" if training else "the model"
        raise CaptureError(f"{what} is in training mode", where=spec.name, hint="call model.eval() first")
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.device.type != "cpu":
            raise CaptureError(
                f"{name} is on the device {value.device}",
                where=spec.name,
                hint="call model.cpu(): models are captured there",
            )


def refuse_trace(module: nn.Module, inputs: Mapping[str, torch.Tensor], spec: ModelSpec, error: Exception) -> NoReturn:
    """Raise the reason why `torch.export` failed: the model cannot be called with these inputs, or it cannot be traced.

    Raises:
        CaptureError: always.
    """
    called = _called(module, inputs)
    if called is not None:
        types = [f"{name} {_type_name(value.dtype)}{list(value.shape)}" for name, value in inputs.items()]
        takes = "; ".join(f"{tensor.name} {tensor}" for tensor in spec.inputs)
        hint = f"its spec says that it takes {takes}: is that so?"
        raise call_error(module, f"with {', '.join(types)}", spec.name, called, hint) from called
    reason, hint = _reason(error)
    raise CaptureError(
        f"torch.export cannot capture the model: {reason}", where=_place(spec.name, error), hint=hint
    ) from error


def call_error(module: nn.Module, how: str, name: str, error: Exception, hint: str) -> CaptureError:
    """Return the error that says that a model cannot be called, and why.

    Args:
        module: the model.
        how: the inputs of the call, or its place.
        name: the model's name.
        error: the error that the model raised.
        hint: the hint, which is replaced where the model's parameters are not float32.
    """
    kinds = {value.dtype for value in module.parameters() if value.is_floating_point()} - {torch.float32}
    message = f"the model fails when it is called {how}: {first_line(error)}"
    if kinds:
        message = f"the model's parameters are {_type_name(min(kinds, key=str))}; {message}"
        hint = (
            "call model.float(): models are captured in float32; target.precision chooses 16 bits for what is compiled"
        )
    return CaptureError(message, where=_place(name, error), hint=hint)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place(name: str, error: Exception) -> str:
    line = user_line(error.__traceback__)
    return f"{name}, {line}" if line else name


def refuse_operator(node: fx.Node, reason: str) -> NoReturn:
    """Raise an error that names an operator that may not stand in a program, and the line of the model that calls it.

    Raises:
        CaptureError: always.
    """
    line = traced_line(node)
    places = [module_path(node) or "top level", *([line] if line else [])]
    raise CaptureError(f"the model {reason}", where=", ".join(places), hint=_operator_hint(node))


def _operator_hint(node: fx.Node) -> str:
    """Return advice for a user on an operator."""
    name = str(node.target)
    if "dropout" in name or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return "a denoiser gives the same result every time: switch dropout and noise off, or make the noise an input"
    if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)) or name.startswith("aten.item"):
        return "values of tensors cannot become Python numbers: keep them tensors (no .item(), int() or float())"
    return f"if the model is right, report {name} and this line to the authors of qcgraph: the table is {TABLE}"


def _called(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Exception | None:
    """Return the error that a module raises when it is called without being traced, or None."""
    try:
        with torch.no_grad():
            module(**{name: value.clone() for name, value in inputs.items()})
    except Exception as error:  # noqa: BLE001 - a model's code may raise anything; the error is passed on
        return error
    return None


def _reason(error: Exception) -> tuple[str, str]:
    """Return why torch.export failed, and advice for a user."""
    kind, text = type(error).__name__, str(error)
    if "DataDependent" in kind or "data-dependent" in text:
        return (
            "its Python code branches on the value of a tensor",
            "use torch.where, or decide before the model is loaded; of lengths that vary, fix one",
        )
    if "ConstraintViolation" in kind or "Constraints violated" in text:
        fixed = _CONSTANT.search(text)
        batch = f"it fixes the batch to {fixed[1]}" if fixed else "it does not take every batch"
        return batch, "the batch must stay symbolic: take sizes from x.shape instead of writing numbers"
    hint = "models are traced without running: no .item(), no control flow on values of tensors, a batch of any size"
    if "was assigned during export" in text:
        hint = "a denoiser keeps nothing between calls: register the tensor as a buffer in __init__"
    return first_line(error), hint


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def user_line(trace: TracebackType | None) -> str:
    """Return the innermost line of the model in a traceback, or nothing."""
    frames = [frame for frame in traceback.extract_tb(trace) if _is_foreign(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def traced_line(node: fx.Node) -> str:
    """Return the innermost line of the model that made a node, or nothing."""
    found = [match for match in _LINE.finditer(node.meta.get("stack_trace") or "") if _is_foreign(match["file"])]
    return f"{found[-1]['file']}:{found[-1]['line']} ({found[-1]['code']})" if found else ""


def _is_foreign(file: str) -> bool:
    """Tell whether a file is the model's code rather than PyTorch's or qcgraph's."""
    if file.startswith("<"):
        return False
    path = Path(file)
    return not any(path.is_relative_to(folder) for folder in _OWN)
