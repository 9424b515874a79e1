"""Measure the seconds and the memory of every stage of a compilation, for DiT geometries with random weights.

    python tools/bench_compile.py
    python tools/bench_compile.py dit-s-2 --steps 50 --trajectories 2 -o compile.json

The whole pipeline runs: load, capture, every pass, export, verify, and writing the bundle. Each geometry has a process
of its own. A stage lasts until the next one begins. Its memory is the largest resident size that the kernel recorded
during the stage (VmHWM of /proc/self/status, reset at its start through /proc/self/clear_refs), so that no peak is too
short to be seen; it includes Python, its libraries and mapped files. Linux only.

Only calibration and the fit of the compensation grow with steps and trajectories; a few of them show the other costs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from qcgraph.benchmark.machine import Machine, peak_resident_bytes, read_machine, usable_cores, versions
from qcgraph.bundle.manifest import PACKAGES
from qcgraph.models.geometry import GEOMETRIES, DiTConfig
from qcgraph.progress import PlainProgress
from qcgraph.recipe import Calibration, Recipe

FORMAT = 1
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # the value that resets the peak (proc_pid_clear_refs(5))
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Stage:
    """One stage of a compilation: its seconds, and the largest resident size of the process during it."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    """One compilation.

    Attributes:
        model: the geometry.
        parameters: the number of its parameters.
        weight_bytes: the size of its weights in float32.
        bundle_bytes: the size of the bundle.
        steps: sampling steps.
        trajectories: the number of calibration trajectories.
        threads: the number of threads of PyTorch.
        start_bytes: the resident size before loading, which is that of Python and its libraries.
        seconds: the seconds of all stages.
        peak_bytes: the largest resident size of all stages.
        ratio: the peak over the size of the weights.
        stages: the stages in order.
    """

    model: str
    parameters: int
    weight_bytes: int
    bundle_bytes: int
    steps: int
    trajectories: int
    threads: int
    start_bytes: int
    seconds: float
    peak_bytes: int
    ratio: float
    stages: tuple[Stage, ...]

    @property
    def slowest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.seconds)

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak_bytes)


class Meter(PlainProgress):
    """Measures the stages that a compilation announces."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.stages: list[Stage] = []
        self._name = ""
        self._start = 0.0

    def stage(self, name: str) -> None:
        """End the previous stage, and begin this one."""
        self.end()
        self._name = name
        CLEAR_REFS.write_text(RESET_PEAK)
        self._start = time.perf_counter()

    def end(self) -> None:
        """End the current stage, if there is one."""
        if self._name:
            self.stages.append(Stage(self._name, time.perf_counter() - self._start, peak_bytes()))
        self._name = ""


def main() -> None:
    """Compile every geometry, print the results, and write them."""
    options = parse()
    if not os.access(CLEAR_REFS, os.W_OK):
        sys.exit(f"cannot write {CLEAR_REFS}, which measuring the memory of a stage needs")
    machine = read_machine()
    # Each geometry has a process of its own, spawned rather than forked, so that it inherits no memory of another one.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = []
        for geometry in options.geometries:
            rows.append(pool.submit(measure, geometry, GEOMETRIES[geometry], options).result())
            if not options.json:
                print(f"{markdown(rows[-1])}\n", flush=True)
    document = {
        "kind": "compile",
        "format": FORMAT,
        "machine": asdict(machine),
        "versions": versions(PACKAGES),
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(document, indent=2)
    if options.output:
        options.output.write_text(text + "\n", "utf-8")
    print(text if options.json else where(machine))


def measure(geometry: str, config: DiTConfig, options: argparse.Namespace) -> Row:
    """Compile one geometry in this process."""
    import torch

    from qcgraph.compiler.compilation import compile_model

    torch.set_num_threads(options.threads)
    recipe = Recipe().override(
        steps=options.steps,
        guidance=options.guidance,
        bits=options.bits,
        groups=options.groups,
        cache=options.cache,
        compensate=options.compensate,
        target=options.target,
    )
    recipe = recipe.model_copy(update={"calibration": Calibration(trajectories=options.trajectories)})
    GEOMETRIES[geometry] = config  # of this process alone, which may not have it
    meter, start = Meter(), peak_bytes()
    with tempfile.TemporaryDirectory(prefix="qcgraph-") as folder:
        result = compile_model(f"{geometry}:random", recipe, Path(folder) / "bundle", progress=meter)
        meter.end()
    assert result.bundle is not None
    peak = max(stage.peak_bytes for stage in meter.stages)
    weight_bytes = config.parameter_count * FLOAT32_BYTES
    return Row(
        model=geometry,
        parameters=config.parameter_count,
        weight_bytes=weight_bytes,
        bundle_bytes=result.bundle.size,
        steps=options.steps,
        trajectories=options.trajectories,
        threads=options.threads,
        start_bytes=start,
        seconds=sum(stage.seconds for stage in meter.stages),
        peak_bytes=peak,
        ratio=peak / weight_bytes,
        stages=tuple(meter.stages),
    )


def peak_bytes() -> int:
    """Return the largest resident size of this process since the last reset."""
    peak = peak_resident_bytes()
    assert peak is not None, "main has made sure that the kernel tells"
    return peak


def markdown(row: Row) -> str:
    """Return one compilation as a table."""
    title = f"{row.model}: {row.parameters / 1e6:.1f} M parameters, {row.weight_bytes / 1e6:.0f} MB in float32"
    setting = f"{row.steps} steps, calibration trajectories: {row.trajectories}, threads: {row.threads}"
    sizes = f"{row.start_bytes / 1e6:.0f} MB before loading, bundle of {row.bundle_bytes / 1e6:.0f} MB"
    cells = [
        f"| {stage.name} | {stage.seconds:.1f} | {stage.seconds / row.seconds:.0%} "
        f"| {stage.peak_bytes / 1e6:.0f} | {stage.peak_bytes / row.weight_bytes:.2f}x |"
        for stage in (*row.stages, Stage("all", row.seconds, row.peak_bytes))
    ]
    lines = [
        f"### {title}",
        "",
        f"{setting}. {sizes}. Most time: {row.slowest.name}; most memory: {row.largest.name}.",
        "",
        "| stage | seconds | share | peak MB | of the weights |",
        "|---|---|---|---|---|",
        *cells,
    ]
    return "\n".join(lines)


def where(machine: Machine) -> str:
    """Describe the machine in one line, with a warning if other programs used it."""
    busy = f" Others used it (load {machine.load}): the seconds are contended." if machine.is_busy else ""
    return f"{machine.cpu}, {machine.cores} cores, {machine.system}.{busy}"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometries", nargs="*", metavar="GEOMETRY", help=f"of {', '.join(GEOMETRIES)}")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--trajectories", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--cache", default="interval=3")
    parser.add_argument("--compensate", default="vc")
    parser.add_argument("--target", default="onnxruntime-cpu")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", action="store_true", help="print the JSON document instead of tables")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the JSON document there")
    options = parser.parse_args()
    options.geometries = options.geometries or ["dit-s-2", "dit-b-2", "dit-l-2", "dit-xl-2"]
    if unknown := [name for name in options.geometries if name not in GEOMETRIES]:
        parser.error(f"no geometry {unknown[0]!r}; there are: {', '.join(GEOMETRIES)}")
    return options


if __name__ == "__main__":
    main()
