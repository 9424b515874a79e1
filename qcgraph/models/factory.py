"""Call a user's factory and unwrap its model; errors of the factory are told apart from those of qcgraph."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qcgraph.capture.wrappers import unwrapped as without_wrappers
from qcgraph.errors import QcgraphError, UsageError
from qcgraph.models.loaded import LoadedModel

if TYPE_CHECKING:
    pass

_EXPECTED = "a factory takes no arguments and returns a qcgraph.models.LoadedModel"


def call_factory(name: str) -> LoadedModel:
    """Import ``package.module`` and call its ``factory``.

    Args:
        name: ``package.module:factory``.

    Raises:
        UsageError: the module or the factory is missing or raises an error, or the factory returns no model.
    """
    module_name, _, factory_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise UsageError(
            f"cannot import {module_name}: {error}",
            where=name,
            hint="install the package, or put its folder on PYTHONPATH; `qcgraph models` lists the built-in names",
        ) from error
    except (Exception, SystemExit) as error:  # any error of user code
        raise _raised(f"importing {module_name}", error, name, None) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise UsageError(f"{module_name} has no function {factory_name!r}", where=name, hint=_EXPECTED)
    return made_by(factory, f"your factory {factory_name}()", name, module)


def made_by(factory: Callable[[], Any], what: str, name: str, module: ModuleType | None) -> LoadedModel:
    """Call a factory.

    Args:
        factory: the function that makes the model.
        what: the description of the factory in errors.
        name: the name of the model as the user typed it.
        module: the module of the factory, if known.

    Raises:
        UsageError: the factory raises an error, or returns no model.
    """
    try:
        model = factory()
    except QcgraphError:
        raise  # the factory used qcgraph, whose error explains itself
    except (Exception, SystemExit) as error:  # any error of user code
        raise _raised(what, error, name, module) from error
    if not isinstance(model, LoadedModel):
        raise UsageError(f"the factory returned {type(model).__name__}", where=name, hint=_EXPECTED)
    return model


def unwrapped(model: LoadedModel, where: str) -> LoadedModel:
    """Return the model without wrappers of torch.compile or data parallelism, which cannot be captured.

    Args:
        model: the model.
        where: the name of the model in errors.

    Raises:
        UsageError: the model has no torch module.
    """
    import torch

    if not isinstance(model.module, torch.nn.Module):
        raise UsageError(f"the module is a {type(model.module).__name__}", where=where, hint="give a torch.nn.Module")
    inner = without_wrappers(model.module)
    if inner is model.module:
        return model
    note = f"the model is taken out of its wrapper {type(model.module).__name__}"
    return replace(model, module=inner, notes=(*model.notes, note))


def check_parameters(model: LoadedModel, where: str) -> None:
    """Refuse a module whose ``forward`` lacks a parameter that the model names.

    Raises:
        UsageError: a parameter is missing; the message names the first one.
    """
    wanted = [tensor.name for tensor in model.spec.inputs]
    hint = f"input_names are the forward parameters for {', '.join(wanted)}, in this order"
    if not isinstance(model.input_names, (tuple, list)) or len(model.input_names) != len(wanted):
        raise UsageError(f"input_names are {model.input_names!r}, not {len(wanted)} names", where=where, hint=hint)
    parameters = inspect.signature(model.module.forward).parameters
    absent = [name for name in model.input_names if name not in parameters]
    if absent:
        raise UsageError(
            f"the module's forward has no parameter {absent[0]!r}; it has {', '.join(parameters)}",
            where=where,
            hint=hint,
        )


def try_forward(model: LoadedModel, where: str, *, is_guided: bool = False) -> None:
    """Call a model once with inputs of its spec, so that errors show in the model's own words.

    Args:
        model: the model.
        where: the name of the model in errors.
        is_guided: whether the model must also accept null values of its conditions.

    Raises:
        UsageError: the module raises an error, or does not return one tensor [B, C_out, H, W].
    """
    import torch

    from qcgraph.capture.capture import example_inputs

    spec = model.spec
    shape, inputs = (2, *spec.latent_shape), example_inputs(spec, 2)
    for condition in spec.conditions:
        if is_guided and condition.null is not None:
            inputs[condition.name][1] = condition.null
    try:
        with torch.inference_mode():
            output: Any = model.module(**dict(zip(model.input_names, inputs.values(), strict=True)))
    except QcgraphError:
        raise
    except Exception as error:  # any error of user code
        if is_guided and isinstance(error, IndexError):
            nulls = [f"{item.name} {item.null}" for item in spec.conditions if item.null is not None]
            raise UsageError(
                f"the module has no row for the null value {', '.join(nulls)}, which guidance needs: {_said(error)}",
                where=where,
                hint="sample with --guidance 1, or give the embedding of classes one row more than there are classes",
            ) from error
        raise UsageError(
            f"the module fails on latents {list(shape)}, the shape in its spec: {_said(error)}{_at(error, None)}",
            where=where,
            hint="is latent_shape (channels, height, width) of one latent, and does forward take float32?",
        ) from error
    expected = (2, spec.output_channels, *spec.latent_shape[1:])
    found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if found != expected:
        raise UsageError(
            f"the module returns {found}, and its spec says {expected}",
            where=where,
            hint="forward returns one tensor [B, output_channels, height, width]",
        )


def _raised(what: str, error: BaseException, name: str, module: ModuleType | None) -> UsageError:
    return UsageError(
        f"{what} raised {_said(error)}{_at(error, module)}",
        where=name,
        hint="this is raised by your code, not by qcgraph; call the factory from Python to see the whole traceback",
    )


def _said(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _at(error: BaseException, module: ModuleType | None) -> str:
    """Return the place of an error: its line in the file of the module, or else the innermost one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(__file__).name
    file = getattr(module, "__file__", None)
    places = [frame for frame in frames if frame.filename == file] or [
        frame for frame in frames if Path(frame.filename).name != ours and not frame.filename.startswith("<")
    ]
    return f" ({places[-1].filename}:{places[-1].lineno})" if places else ""
