"""Releasing freed memory that the C library keeps."""

from __future__ import annotations

import ctypes
import sys


def release_memory() -> None:
    """Give freed memory back to the system where the C library would keep it.

    glibc keeps the gaps between blocks in use. Tensors as large as an activation come and go between tensors that stay,
    and the gaps add up to more memory than all these tensors ever took together.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # C libraries other than glibc lack it
        if trim is not None:
            trim(0)
