"""The GPU of this machine, as PyTorch sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qcgraph.errors import UsageError


def device_problem() -> str | None:
    """Return why there is no GPU to run engines on; None where there is one."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def require_device() -> torch.device:
    """Return the CUDA device in use.

    Raises:
        UsageError: there is no CUDA device.
    """
    if problem := device_problem():
        raise UsageError(
            problem, hint="engines need an NVIDIA GPU, its driver, and PyTorch with CUDA; elsewhere use another backend"
        )
    return torch.device("cuda", torch.cuda.current_device())


def capability_of(device: torch.device) -> str:
    """Return the compute capability of a CUDA device, such as ``8.9``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


@contextmanager
def device_memory(what: str) -> Iterator[None]:
    """Turn a lack of device memory into an error that names its purpose.

    Raises:
        UsageError: the body ran out of device memory.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise out_of_memory(what, str(error).splitlines()[0]) from None


def out_of_memory(what: str, said: str) -> UsageError:
    """Return the error for insufficient device memory."""
    return UsageError(
        f"not enough device memory for {what}: {said}",
        hint="sample fewer at once, build the engines for smaller batches (qcgraph build --batch), or end what else "
        "runs there",
    )
