"""Describe the machine of a measurement, the versions of packages, and the memory of this process."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# CPU features that decide the speed of int8 and float32 products, as the kernel names them.
FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
BUSY = 0.25  # load of other programs, as a share of the cores, above which figures are unreliable
_CPUINFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that decide its speed.

    Attributes:
        cpu: the name of the CPU model.
        cores: logical cores that this process may use.
        flags: the CPU's features in `FLAGS`; empty if the system does not report them.
        memory_bytes: main memory, or None if the system does not report it.
        system: kernel and architecture.
        load: load average of the last minute before measuring, or None if the system does not report it.
    """

    cpu: str
    cores: int
    flags: tuple[str, ...]
    memory_bytes: int | None
    system: str
    load: float | None

    @property
    def saturates(self) -> bool:
        """Whether products of uint8 and int8 may saturate: an x86 CPU without VNNI."""
        x86 = platform.machine().lower() in {"x86_64", "amd64", "i386", "i686"}
        return x86 and not {"avx_vnni", "avx512_vnni"} & set(self.flags)

    @property
    def is_busy(self) -> bool:
        """Whether other programs used the machine before measuring."""
        return self.load is not None and self.load > BUSY * self.cores


def read_machine() -> Machine:
    """Describe the machine of this process."""
    text = _CPUINFO.read_text("utf-8", "replace") if _CPUINFO.is_file() else ""
    found = set((_field(text, "flags") or _field(text, "Features")).split())
    return Machine(
        cpu=_field(text, "model name") or platform.processor() or platform.machine(),
        cores=usable_cores(),
        flags=tuple(flag for flag in FLAGS if flag in found),
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def usable_cores() -> int:
    """Return the number of logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of the given packages that are installed."""
    installed = {name for name in packages if next(iter(metadata.distributions(name=name)), None)}
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in sorted(installed)}


def resident_bytes() -> int | None:
    """Return the bytes of this process in memory, including mapped files; None if the system does not report them."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int | None:
    """Return the largest value that `resident_bytes` ever had in this process.

    ``getrusage`` would be portable, but on Linux a process inherits the peak of its parent process.
    """
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int | None:
    text = _STATUS.read_text("utf-8") if _STATUS.is_file() else ""
    value = _field(text, name)
    return int(value.split()[0]) * 1024 if value else None


def _memory_bytes() -> int | None:
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not hasattr(os, "sysconf") or not set(names) <= set(os.sysconf_names):
        return None
    return os.sysconf(names[0]) * os.sysconf(names[1])


def _field(text: str, name: str) -> str:
    """Return the first value of ``name : value`` in a file of the kernel; empty if there is none."""
    match = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""
