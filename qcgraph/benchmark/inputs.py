"""Record the inputs of a denoiser along real trajectories, to calibrate quantizers and to compare predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcgraph.benchmark.workspace import Workspace
from qcgraph.sampling.calibration import sample_calibration
from qcgraph.sampling.runner import Array, Call, Runner

Inputs = dict[str, npt.NDArray[np.generic]]

# Trajectories that calibrate the quantizers of peers, in full precision, with the sampler of the bundle. Their noise is
# the calibration noise of qcgraph, which no evaluation and no other sample shares.
CALIBRATION_TRAJECTORIES = 4
CALIBRATION_STEPS = 16


class RecordingRunner:
    """Wraps a runner (see `qcgraph.sampling.runner.Runner`), and keeps the inputs and the prediction of every step."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.inputs: list[Inputs] = []
        self.predictions: list[Array] = []

    def run(self, call: Call) -> Array:
        """Run one variant, and keep copies of its inputs and its prediction."""
        result = self._runner.run(call)
        if call.is_step:
            self.inputs.append({name: value.copy() for name, value in call.inputs.items()})
            self.predictions.append(result.copy())
        return result


def write_calibration(workspace: Workspace, path: Path) -> None:
    """Sample in full precision, and write the inputs of evenly spaced steps, each f32[K,B,...], as an ``.npz`` file."""
    import torch

    from qcgraph.models.eager import EagerRunner

    torch.set_num_threads(workspace.threads)
    plan, spec = workspace.bundle.plan, workspace.model.spec
    recorder = RecordingRunner(EagerRunner(workspace.model))
    sample_calibration(recorder, plan, spec, CALIBRATION_TRAJECTORIES, 0)
    count = min(CALIBRATION_STEPS, len(plan))
    picked = np.unique(np.linspace(0, len(plan) - 1, count).round().astype(int))
    columns: dict[str, Any] = {
        name: np.stack([recorder.inputs[index][name] for index in picked]) for name in workspace.inputs
    }
    np.savez(path, **columns)


def read_calibration(path: Path) -> list[dict[str, npt.NDArray[np.generic]]]:
    """Read the inputs that `write_calibration` wrote, one dictionary for each step."""
    with np.load(path) as stored:
        columns = {name: stored[name] for name in stored.files}
    steps = min(map(len, columns.values()))
    return [{name: column[index] for name, column in columns.items()} for index in range(steps)]
