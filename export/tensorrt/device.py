"""The GPU that is here, as PyTorch sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qcgraph.errors import UsageError


def device_problem() -> str | None:
    """Why there is no GPU to run engines on; None where there is one."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def require_device() -> torch.device:
    """The CUDA device that is in use.

    Raises:
        UsageError: there is none.
    """
    if problem := device_problem():
        raise UsageError(
            problem, hint="engines need an NVIDIA GPU, its driver, and PyTorch with CUDA; elsewhere use another backend"
        )
    return torch.device("cuda", torch.cuda.current_device())


def capability_of(device: torch.device) -> str:
    """The compute capability of a CUDA device, such as ``8.9``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


@contextmanager
def device_memory(what: str) -> Iterator[None]:
    """Say what there was no device memory for.

    Raises:
        UsageError: the body ran out of it.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise out_of_memory(what, str(error).splitlines()[0]) from None


def out_of_memory(what: str, said: str) -> UsageError:
    """The error for device memory that does not suffice."""
    return UsageError(
        f"not enough device memory for {what}: {said}",
        hint="sample fewer at once, build the engines for smaller batches (qcgraph build --batch), or end what else "
        "runs there",
    )
