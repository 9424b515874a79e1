"""Define the baselines: ways to run the model on a CPU without qcgraph, each built as its own documentation says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from qcgraph.benchmark import inputs, onnxruntime_peers, openvino_peers, torch_peers
from qcgraph.benchmark.workspace import Workspace
from qcgraph.errors import UsageError, closest
from qcgraph.sampling.runner import Runner

REFERENCE = "torch"  # the baseline that speed-ups refer to
DEFAULT = (REFERENCE, "onnxruntime-fp32")
ALL = "all"
FLOAT_TOLERANCE = 1e-4  # relative L2 error of a noise prediction by another order of float32 operations; measured: 1e-6


@dataclass(frozen=True)
class Baseline:
    """One way to run the model, without qcgraph.

    Attributes:
        name: the name on the command line.
        description: one line that describes it.
        open: returns its runner in the calling process, from the files in the workspace.
        runtime: the module of its runtime.
        files: the files that must be built before it can be opened, in this order; names of `BUILDERS`.
        packages: packages that it needs beyond the dependencies of qcgraph; pip and Python use the same names.
        tolerance: largest relative L2 error of a noise prediction against eager; None if it quantizes.
        lacks: returns further requirements that this machine lacks, or an empty text.
    """

    name: str
    description: str
    open: Callable[[Workspace], Runner]
    runtime: str
    files: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    tolerance: float | None = None
    lacks: Callable[[], str] = str

    def missing(self) -> str:
        """Return the packages that are not installed, and how to install them; empty if none is missing."""
        absent = [package for package in self.packages if util.find_spec(package) is None]
        if absent:
            return f"not installed: {', '.join(absent)}; pip install {' '.join(absent)}"
        return self.lacks()


BUILDERS: Mapping[str, Callable[[Workspace, Path], None]] = {
    onnxruntime_peers.CALIBRATION: inputs.write_calibration,
    onnxruntime_peers.FLOAT: onnxruntime_peers.export_float,
    onnxruntime_peers.DYNAMIC: onnxruntime_peers.quantize_dynamically,
    onnxruntime_peers.STATIC: onnxruntime_peers.quantize_statically,
    openvino_peers.FLOAT: openvino_peers.convert,
    openvino_peers.QUANTIZED: openvino_peers.quantize,
}

BASELINES: Mapping[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline(REFERENCE, "PyTorch eager, float32", torch_peers.open_eager, "torch", tolerance=FLOAT_TOLERANCE),
        Baseline(
            "torch-compile",
            "torch.compile, float32",
            torch_peers.open_compiled,
            "torch",
            tolerance=FLOAT_TOLERANCE,
            lacks=torch_peers.missing_compiler,
        ),
        Baseline(
            "onnxruntime-fp32",
            "ONNX Runtime, float32",
            onnxruntime_peers.open_float,
            "onnxruntime",
            files=(onnxruntime_peers.FLOAT,),
            tolerance=FLOAT_TOLERANCE,
        ),
        Baseline(
            "onnxruntime-dynamic",
            "ONNX Runtime, quantize_dynamic",
            onnxruntime_peers.open_dynamic,
            "onnxruntime",
            files=(onnxruntime_peers.FLOAT, onnxruntime_peers.DYNAMIC),
        ),
        Baseline(
            "onnxruntime-static",
            "ONNX Runtime, quantize_static (QDQ)",
            onnxruntime_peers.open_static,
            "onnxruntime",
            files=(onnxruntime_peers.FLOAT, onnxruntime_peers.CALIBRATION, onnxruntime_peers.STATIC),
        ),
        Baseline(
            "openvino-fp32",
            "OpenVINO, float32",
            openvino_peers.open_float,
            "openvino",
            files=(openvino_peers.FLOAT,),
            packages=("openvino",),
            tolerance=FLOAT_TOLERANCE,
        ),
        Baseline(
            "nncf-int8",
            "OpenVINO, nncf.quantize for transformers",
            openvino_peers.open_quantized,
            "openvino",
            files=(openvino_peers.FLOAT, onnxruntime_peers.CALIBRATION, openvino_peers.QUANTIZED),
            packages=("openvino", "nncf"),
        ),
    )
}


def parse_baselines(text: str) -> tuple[Baseline, ...]:
    """Return the baselines of a list such as ``torch,onnxruntime-fp32``, or of ``all``; empty text names none.

    Raises:
        UsageError: a name is unknown, or given twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == [ALL]:
        return tuple(BASELINES.values())
    for name in names:
        if name not in BASELINES:
            raise UsageError(f"unknown baseline {name!r}", where="--baselines", hint=closest(name, [ALL, *BASELINES]))
        if names.count(name) > 1:
            raise UsageError(f"{name} is named twice", where="--baselines", hint="name each baseline once")
    return tuple(BASELINES[name] for name in names)
