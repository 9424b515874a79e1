"""Running a bundle: its backends, and the denoiser as a callable that holds the state of one request. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qcgraph.bundle import Bundle
from qcgraph.errors import BundleError, UsageError, closest
from qcgraph.export.targets import target_named
from qcgraph.sampling import Request, Runner
from qcgraph.spec import ModelSpec
from qcgraph.steps import StepPlan

BACKENDS = ("onnxruntime", "torch")


def open_runner(bundle: Bundle, backend: str | None = None, threads: int | None = None) -> Runner:
    """A runner for a bundle.

    Args:
        bundle: what to run.
        backend: one of `BACKENDS`; by default the one of the bundle's target.
        threads: how many threads it may use; by default all cores.

    Raises:
        UsageError: the backend is unknown, or the number of threads is not positive.
        BundleError: the bundle was not exported for it.
    """
    name = backend or target_named(bundle.manifest.target).backend
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}", hint=closest(name, BACKENDS))
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads", hint="1 or more")
    if name == "torch":
        return _torch_runner(bundle, threads)
    missing = [f"{variant}.onnx" for variant in bundle.interfaces if f"{variant}.onnx" not in bundle.manifest.files]
    if missing:
        raise BundleError(
            f"the bundle has no {missing[0]}: it was compiled for target {bundle.manifest.target!r}",
            where=str(bundle.path),
            hint="use --backend torch, or compile with --target onnxruntime-cpu",
        )
    from qcgraph.export.run_onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(bundle.path, bundle.interfaces, threads)


def _torch_runner(bundle: Bundle, threads: int | None) -> Runner:
    import torch

    from qcgraph.ir.execute import TorchRunner
    from qcgraph.ir.serialize import load_program

    if threads is not None:
        torch.set_num_threads(threads)
    return TorchRunner(load_program(bundle.path))


@dataclass(frozen=True)
class DenoiserOutput:
    """What a diffusers transformer returns.

    Attributes:
        sample: the noise prediction [B,C_out,H,W].
    """

    sample: Any


class Denoiser:
    """A compiled denoiser with the call of a diffusers transformer, holding the cache state of one request.

    The state follows the rules of `qcgraph.sampling.Request`: the first timestep of the plan starts a new trajectory;
    trajectories that interleave need a `request` each.
    """

    def __init__(self, runner: Runner, plan: StepPlan, spec: ModelSpec) -> None:
        self._runner = runner
        self._request = Request(runner, plan)
        self.plan = plan
        self.spec = spec

    def request(self) -> Denoiser:
        """The same denoiser for another trajectory, with a state of its own; graphs and weights are shared."""
        return Denoiser(self._runner, self.plan, self.spec)

    def __call__(self, hidden_states: Any, timestep: Any, class_labels: Any, return_dict: bool = True) -> Any:
        """The noise prediction at one timestep of the plan.

        Args:
            hidden_states: the latent [B,C,H,W], NumPy or torch.
            timestep: a number, or one value a sample, all the same.
            class_labels: integers [B]; with guidance the batch holds both halves.
            return_dict: whether to return an object with ``.sample``, or a tuple.

        Returns:
            the noise prediction, of the kind, dtype and device of ``hidden_states``.

        Raises:
            BundleError: the timestep is not the next one of the plan.
            UsageError: the latent does not have the model's shape, or the timesteps of the batch differ.
        """
        latent = np.ascontiguousarray(_array(hidden_states), dtype=np.float32)
        if latent.ndim != 4 or latent.shape[1:] != self.spec.latent_shape:
            shape = ", ".join(map(str, self.spec.latent_shape))
            raise UsageError(f"the latent has shape {latent.shape}", hint=f"{self.spec.name} takes (batch, {shape})")
        values = np.unique(_array(timestep))
        if len(values) != 1:
            raise UsageError("the timesteps of a batch differ", hint="all samples of a call are at the same timestep")
        labels = np.broadcast_to(_array(class_labels).astype(np.int64), (len(latent),)).copy()
        prediction = self._request.denoise(latent, float(values[0]), labels)
        sample = _like(hidden_states, prediction)
        return DenoiserOutput(sample) if return_dict else (sample,)


def _array(value: Any) -> np.ndarray[Any, Any]:
    """A NumPy array from NumPy, a number, or a torch tensor."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _like(reference: Any, values: np.ndarray[Any, Any]) -> Any:
    """The values as the reference is: a torch tensor of its dtype and device, or NumPy."""
    if not hasattr(reference, "detach"):
        return values
    import torch

    return torch.from_numpy(values).to(device=reference.device, dtype=reference.dtype)
