"""NumPy arrays and torch tensors as hosts give them. torch is imported only where a host gave one of its tensors."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from qcgraph.errors import UsageError

if TYPE_CHECKING:
    import torch

INTEGERS, FLOATS = "iu", "f"  # kinds of NumPy's dtypes
NUMPY_FLOATS = ("torch.float16", "torch.float32", "torch.float64")
_SHOWN = 60  # characters of a value in a message


def is_tensor(value: Any) -> bool:
    """Return whether a value is a torch tensor."""
    torch_module = sys.modules.get("torch")  # a caller that has a tensor has imported torch
    return torch_module is not None and isinstance(value, torch_module.Tensor)


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """Return a number, an array or a torch tensor as an array; bfloat16 and 8-bit floats become float32."""
    if not is_tensor(value):
        return np.asarray(value)
    tensor = value.detach().cpu().resolve_neg()  # needed for the imaginary part of a conjugate, whose negation is lazy
    is_known = not tensor.dtype.is_floating_point or str(tensor.dtype) in NUMPY_FLOATS
    return np.asarray(tensor if is_known else tensor.float())


def checked_values(value: Any, kinds: str, what: str, hint: str) -> Any:
    """Check that a value holds real numbers; return a torch tensor unchanged, and any other value as an array.

    Args:
        value: a number, nested lists, a NumPy array, or a torch tensor.
        kinds: the kinds of NumPy's dtypes that are allowed, of `INTEGERS` and `FLOATS`.
        what: the name of the value in a message.
        hint: what to give instead.

    Raises:
        UsageError: the value is no dense array, or of another kind: booleans, complex numbers, text, objects.
    """
    if is_tensor(value):
        _check_dense(value, what)
        kind = _kind_of(value)
        if kind not in kinds:
            raise UsageError(f"{what} has dtype {value.dtype}", hint=hint)
        return value
    if np.ma.isMaskedArray(value):
        raise UsageError(f"{what} is a masked array", hint="fill it in: compiled graphs know no masks")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # ragged lists, objects of other libraries
        raise UsageError(f"{what} is not an array: {str(error).splitlines()[0]}", hint=hint) from None
    if array.dtype.kind not in kinds:
        raise UsageError(f"{what} {_described(value, array)}", hint=hint)
    return array


def _described(value: Any, array: np.ndarray[Any, Any]) -> str:
    """Say why a value is not made of the expected numbers."""
    if array.ndim:
        return f"has dtype {array.dtype}"
    if isinstance(value, int) and array.dtype == object:
        return "is an integer that 64 bits do not hold"  # has too many digits to show
    shown = f"is {value!r}" if isinstance(value, (str, bytes, bool, complex)) else f"is of type {type(value).__name__}"
    return shown[:_SHOWN]


def _kind_of(tensor: torch.Tensor) -> str:
    """Return the kind of NumPy's dtypes that a tensor's dtype is of; ``?`` where NumPy has no such kind."""
    if tensor.dtype.is_floating_point:
        return "f"
    name = str(tensor.dtype).removeprefix("torch.")
    return next((kind for kind, prefix in (("i", "int"), ("u", "uint")) if name.startswith(prefix)), "?")


def _check_dense(tensor: torch.Tensor, what: str) -> None:
    """Refuse a tensor that does not hold its values one by one."""
    forms = {
        "a nested tensor": tensor.is_nested,
        "on the device meta, which holds no values": tensor.is_meta,
        "a quantized tensor": tensor.is_quantized,
        f"a tensor of layout {tensor.layout}": str(tensor.layout) != "torch.strided",
    }
    for form, is_so in forms.items():
        if is_so:
            raise UsageError(f"{what} is {form}", hint="give a dense tensor that holds its values")


class Fetched:
    """The values of an argument that a host gives in every call; a device tensor is fetched only when it changed."""

    def __init__(self) -> None:
        self._source: Any = None
        self._version = 0
        self._values: np.ndarray[Any, Any] = np.empty(0)

    def array(self, value: Any) -> np.ndarray[Any, Any]:
        """Return an array as `as_array` does."""
        if not is_tensor(value) or value.device.type == "cpu" or value.is_inference():  # has no version
            return as_array(value)
        if value is not self._source or value._version != self._version:
            self._source, self._version, self._values = value, value._version, as_array(value)
        return self._values


def on_device(value: Any, device: torch.device) -> torch.Tensor:
    """Return values as a float32 tensor of a device, without a copy where they are one already."""
    import torch

    tensor = value.detach() if is_tensor(value) else torch.from_numpy(np.asarray(value, dtype=np.float32))
    return tensor.to(device, torch.float32)


def index_of(places: Any, values: Any) -> Any:
    """Return integers as an index into values: for a tensor, on its device, so that indexing does not wait for it."""
    if not is_tensor(values) or is_tensor(places):
        return places
    import torch

    return torch.from_numpy(places).to(values.device)


def like(reference: Any, values: Any) -> Any:
    """Return NumPy or torch values in the form of a reference: a torch tensor of its dtype and device, or NumPy."""
    if not is_tensor(reference):
        return as_array(values)
    import torch

    tensor = values if is_tensor(values) else torch.from_numpy(values)
    return tensor.to(device=reference.device, dtype=reference.dtype)
