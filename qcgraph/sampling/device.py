"""Sampling with latents that stay on a device. torch is imported on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from qcgraph.errors import UsageError
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.host_check import HostCheck
from qcgraph.sampling.runner import Call

NOT_FINITE = "the latent holds NaN or infinity"
NOT_FINITE_HINT = (
    "check what made it: the initial noise, the update of the step before, or half precision, which overflows where "
    "coefficients are large"
)

if TYPE_CHECKING:
    import torch


@runtime_checkable
class DeviceRunner(Protocol):
    """A backend that also takes and gives torch tensors of a device (see `qcgraph.sampling.runner.Runner`)."""

    @property
    def device(self) -> torch.device:
        """The device of these tensors."""
        ...

    def run_tensors(self, call: Call) -> torch.Tensor:
        """Run one variant as `qcgraph.sampling.runner.Runner.run` does, without leaving the device."""
        ...


@dataclass(frozen=True)
class OnDevice:
    """A backend with inputs and results on its device, in the form that a `qcgraph.sampling.loop.Request` calls."""

    runner: DeviceRunner

    def run(self, call: Call) -> Any:
        """Run one variant; the result is on the device."""
        return self.runner.run_tensors(call)


@dataclass(frozen=True)
class _Taken:
    """A step that ran, on its way to the host.

    Attributes:
        index: the index of the step.
        latent: the latent [B,C,H,W] on the host, once it has arrived; its largest value where it is not to be checked.
        conditions: the conditions of the batch.
        prediction: the prediction [B,C_out,H,W], likewise; unused where it is not to be checked.
        tolerance: the tolerance for rounding in the host.
        arrive: waits for both tensors.
    """

    index: int
    latent: torch.Tensor
    conditions: Conditions
    prediction: torch.Tensor
    tolerance: float
    arrive: Callable[[], None]


class LateHostCheck:
    """A host check of each step while the device computes the next one.

    A host that does not sample as planned, or gives latents that are not finite, is therefore refused one step late; at
    the last step of the plan it is refused at once.

    Args:
        host_check: the host check; without it, latents only have to be finite.
        steps: the number of steps of the plan.
    """

    def __init__(self, host_check: HostCheck | None, steps: int) -> None:
        self._host_check = host_check
        self._last = steps - 1
        self._waiting: _Taken | None = None

    def took(
        self,
        index: int,
        latent: torch.Tensor,
        conditions: Conditions,
        prediction: torch.Tensor,
        tolerance: float,
    ) -> None:
        """Record a step that was enqueued on the device, and check the step before it (see `HostCheck.check`).

        Raises:
            BundleError: the host does not sample as the plan does.
            UsageError: a latent is not finite.
        """
        earlier, self._waiting = self._waiting, None
        judged = (latent, prediction) if self._host_check is not None else (latent.abs().amax(),) * 2
        taken = _sent(index, judged[0], conditions, judged[1], tolerance)
        if earlier is not None and index > 0:
            self._judge(earlier)
        elif earlier is not None:
            self._note(earlier)  # belongs to a trajectory that was given up, so it is not checked
        if index == self._last:
            self._judge(taken)
        else:
            self._waiting = taken

    def forget(self) -> None:
        """Drop the waiting step, because its trajectory was given up."""
        self._waiting = None

    def _judge(self, taken: _Taken) -> None:
        taken.arrive()
        latent = taken.latent.numpy()
        if not np.isfinite(latent).all():
            raise UsageError(NOT_FINITE, hint=NOT_FINITE_HINT)
        if self._host_check is not None:
            self._host_check.check(taken.index, latent, taken.conditions, taken.tolerance)
        self._note(taken)

    def _note(self, taken: _Taken) -> None:
        taken.arrive()
        if self._host_check is not None:
            self._host_check.note(taken.index, taken.latent.numpy(), taken.conditions, taken.prediction.numpy())


def _sent(
    index: int, latent: torch.Tensor, conditions: Conditions, prediction: torch.Tensor, tolerance: float
) -> _Taken:
    """Return a step with copies of its tensors on their way; later changes by the host do not affect them."""
    if not latent.is_cuda:
        return _Taken(index, latent.clone(), conditions, prediction.clone(), tolerance, lambda: None)
    import torch

    copies = [torch.empty(source.shape, dtype=source.dtype, pin_memory=True) for source in (latent, prediction)]
    for copy, source in zip(copies, (latent, prediction), strict=True):
        copy.copy_(source, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(latent.device))
    return _Taken(index, copies[0], conditions, copies[1], tolerance, arrived.synchronize)
