"""Buffers for cache tensors at fixed addresses: taken by the step that computes one, free when no request holds it."""

from __future__ import annotations

from collections.abc import Callable

import torch


class HeldBuffer:
    """A cache tensor in the state of a request. Its memory is free for a later step once nothing refers to it.

    Attributes:
        tensor: the values; nothing writes to them while this object lives.
    """

    __slots__ = ("_free", "_place", "tensor")

    def __init__(self, tensor: torch.Tensor, place: int, free: set[int]) -> None:
        self.tensor = tensor
        self._place = place
        self._free = free

    def __del__(self) -> None:
        self._free.add(self._place)


class Buffers:
    """The buffers of one cache tensor; their number is the largest that was ever held at once.

    The first free one is taken, so that consecutive trajectories use the same addresses in the same order. CUDA graphs
    are captured for fixed addresses.

    Args:
        allocate: returns one more buffer.
    """

    def __init__(self, allocate: Callable[[], torch.Tensor]) -> None:
        self._allocate = allocate
        self._tensors: list[torch.Tensor] = []
        self._free: set[int] = set()

    def __len__(self) -> int:
        return len(self._tensors)

    def take(self) -> HeldBuffer:
        """Return a buffer that no request holds; its content is arbitrary."""
        if not self._free:
            self._tensors.append(self._allocate())
            self._free.add(len(self._tensors) - 1)
        place = min(self._free)
        self._free.remove(place)
        return HeldBuffer(self._tensors[place], place, self._free)
