"""Memory for cache tensors that stays where it is: taken by the step that computes one, free when no request has it."""

from __future__ import annotations

from collections.abc import Callable

import torch


class HeldBuffer:
    """A cache tensor in the state of a request. Once nothing refers to it, its memory is free for a later step.

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
    """The buffers of one cache tensor: as many as were ever held at once.

    The first free one is taken, so that trajectories which come one after the other use the same addresses in the same
    order. That is what CUDA graphs are captured for.

    Args:
        allocate: makes one more.
    """

    def __init__(self, allocate: Callable[[], torch.Tensor]) -> None:
        self._allocate = allocate
        self._tensors: list[torch.Tensor] = []
        self._free: set[int] = set()

    def __len__(self) -> int:
        return len(self._tensors)

    def take(self) -> HeldBuffer:
        """A buffer that no request holds; what is in it is arbitrary."""
        if not self._free:
            self._tensors.append(self._allocate())
            self._free.add(len(self._tensors) - 1)
        place = min(self._free)
        self._free.remove(place)
        return HeldBuffer(self._tensors[place], place, self._free)
