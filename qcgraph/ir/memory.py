"""Memory that was freed, and that the C library keeps."""

from __future__ import annotations

import ctypes
import sys


def release_memory() -> None:
    """Give freed memory back to the system, where the C library would keep it.

    glibc keeps what lies between blocks that are in use. Tensors as large as an activation come and go between those
    that stay, and what is kept of them comes to more than what they ever took together.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
