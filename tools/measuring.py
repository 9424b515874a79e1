"""What the measuring tools share: runners to compare, paired timing, and image quality."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qcgraph.models import LoadedModel
from qcgraph.sampling import Array, Runner, State


class EagerRunner:
    """The PyTorch module as it is, without qcgraph: the baseline."""

    def __init__(self, model: LoadedModel) -> None:
        self._module = model.module

    def run(self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: State) -> Array:
        values = [torch.from_numpy(inputs[name]) for name in ("latent", "timestep", "class_label")]
        with torch.inference_mode():
            return self._module(*values).numpy()


class TimedRunner:
    """Another runner, with the seconds of every call by variant."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def run(self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: State) -> Array:
        start = time.perf_counter()
        result = self._runner.run(variant, inputs, state)
        self.seconds[variant].append(time.perf_counter() - start)
        return result


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        return cls(min(seconds), statistics.median(seconds), max(seconds))

    def __str__(self) -> str:
        return f"{self.minimum:.3f} / {self.median:.3f} / {self.maximum:.3f}"


def paired(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time candidates in turn, round after round, so that drift of the machine hits all alike. They are warm."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in seconds.items()}


def psnr(images: Array, reference: Array) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (peak 2), the squared error averaged over all images."""
    error = np.clip(images, -1, 1).astype(np.float64) - np.clip(reference, -1, 1)
    mean = float(np.mean(error**2))
    return float(10 * np.log10(4 / mean)) if mean else float("inf")
