"""What is said of the machine, the versions and the memory of a process."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from qcgraph.benchmark import machine
from qcgraph.benchmark.machine import FLAGS, peak_resident_bytes, read_machine, resident_bytes, versions

INTEL = "processor\t: 0\nmodel name\t: Example CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f avx512_vnni\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


def test_the_machine_is_this_one() -> None:
    found = read_machine()
    assert found.cpu
    assert found.cores >= 1
    assert set(found.flags) <= set(FLAGS)
    assert found.memory_bytes is None or found.memory_bytes > 1e8


@pytest.mark.parametrize(
    ("text", "flags"), [(INTEL, ("avx2", "avx512f", "avx512_vnni")), (ARM, ("asimddp", "i8mm")), ("", ())]
)
def test_flags_are_those_that_decide(
    text: str, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert read_machine().flags == flags


@pytest.mark.parametrize(
    ("kind", "flags", "saturates"),
    [
        ("x86_64", ("avx2",), True),
        ("x86_64", ("avx2", "avx_vnni"), False),
        ("AMD64", ("avx512_vnni",), False),
        ("aarch64", (), False),
    ],
)
def test_only_x86_without_vnni_saturates(
    kind: str, flags: tuple[str, ...], saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: kind)
    assert replace(read_machine(), flags=flags).saturates is saturates


@pytest.mark.parametrize(("load", "busy"), [(None, False), (0.1, False), (2.0, True)])
def test_a_busy_machine_is_known(load: float | None, busy: bool) -> None:
    assert replace(read_machine(), cores=2, load=load).is_busy is busy


def test_memory_of_this_process() -> None:
    now, peak = resident_bytes(), peak_resident_bytes()
    if now is None or peak is None:
        pytest.skip("the system does not tell")
    assert 1e6 < now <= peak


def test_versions_name_what_is_installed() -> None:
    found = versions(["numpy", "no-such-package"])
    assert found == {"python": platform.python_version(), "numpy": metadata.version("numpy")}
