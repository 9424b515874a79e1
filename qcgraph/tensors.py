"""NumPy arrays and torch tensors as hosts give them. torch is imported where a tensor of it came, and else not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def is_tensor(value: Any) -> bool:
    """Whether it is a torch tensor."""
    return hasattr(value, "detach")


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """A NumPy array from NumPy, a number, or a torch tensor; bfloat16, which NumPy does not have, becomes float32."""
    if not is_tensor(value):
        return np.asarray(value)
    tensor = value.detach().cpu()
    return np.asarray(tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor)


class Fetched:
    """The values of what a host gives again and again: a tensor of a device is fetched when it has changed."""

    def __init__(self) -> None:
        self._source: Any = None
        self._version = 0
        self._values: np.ndarray[Any, Any] = np.empty(0)

    def array(self, value: Any) -> np.ndarray[Any, Any]:
        """As `as_array`."""
        if not is_tensor(value) or value.device.type == "cpu" or value.is_inference():  # which has no version
            return as_array(value)
        if value is not self._source or value._version != self._version:
            self._source, self._version, self._values = value, value._version, as_array(value)
        return self._values


def on_device(value: Any, device: torch.device) -> torch.Tensor:
    """Values as a float32 tensor of a device; the same one where it is that already."""
    import torch

    tensor = value.detach() if is_tensor(value) else torch.from_numpy(np.asarray(value, dtype=np.float32))
    return tensor.to(device, torch.float32)


def index_of(places: Any, values: Any) -> Any:
    """Integers as an index into values: for a tensor on its device, so that what is indexed need not be waited for."""
    if not is_tensor(values) or is_tensor(places):
        return places
    import torch

    return torch.from_numpy(places).to(values.device)


def like(reference: Any, values: Any) -> Any:
    """Values, NumPy or torch, as a reference is: a torch tensor of its dtype and device, or NumPy."""
    if not is_tensor(reference):
        return as_array(values)
    import torch

    tensor = values if is_tensor(values) else torch.from_numpy(values)
    return tensor.to(device=reference.device, dtype=reference.dtype)
