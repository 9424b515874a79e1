"""The sampling part of tools/bench_gpu.py: a model in PyTorch, and whole sampling with whatever denoises."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from qcgraph.benchmark.timing import Timing
from qcgraph.errors import UsageError
from qcgraph.models import LoadedModel
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan

WARM_UP = 3  # untimed runs of whole sampling: the second captures graphs, the third replays them
Denoise = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]


def torch_denoiser(model: LoadedModel, dtype: torch.dtype, mode: str | None, device: torch.device) -> Denoise:
    """A model in a type on a device, compiled where a mode is given."""
    module = copy.deepcopy(model.module).to(device, dtype)
    cast_inputs(module, model, device)
    call: Callable[..., torch.Tensor] = module
    if mode is not None:
        torch._dynamo.reset()
        call = torch.compile(module, dynamic=False, mode=mode)

    def denoise(latent: torch.Tensor, timestep: float, labels: torch.Tensor) -> torch.Tensor:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        timesteps = torch.full((len(latent),), timestep, device=device)
        values = dict(zip(model.input_names, (latent.to(dtype), timesteps, labels), strict=True))
        return call(**values).float()

    return denoise


@torch.no_grad()
def cast_inputs(module: nn.Module, model: LoadedModel, device: torch.device) -> None:
    """Let linear layers that are given float32, as the one after the sines of a timestep, take it in 16 bits."""
    found: set[nn.Module] = set()

    def cast(layer: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        wanted = layer.weight.dtype
        if inputs[0].dtype != wanted:
            found.add(layer)
        return tuple(value.to(wanted) for value in inputs)

    hooks = {each: each.register_forward_pre_hook(cast) for each in module.modules() if isinstance(each, nn.Linear)}
    dtype = next(module.parameters()).dtype
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    latent = torch.zeros((1, *model.spec.latent_shape), dtype=dtype, device=device)
    module(**dict(zip(model.input_names, (latent, torch.zeros(1, device=device), labels), strict=True)))
    for layer, hook in hooks.items():
        if layer not in found:
            hook.remove()


@torch.no_grad()
def draw(denoise: Denoise, plan: StepPlan, spec: ModelSpec, samples: int, device: torch.device) -> torch.Tensor:
    """Sample latents [N,C,H,W] without leaving the device.

    Raises:
        UsageError: the updates of the plan look back, or add noise.
    """
    if any(step.update.history or step.update.noise for step in plan.steps):
        raise UsageError(f"samples with ddim alone, not as {plan.describe()}", hint="compile with --scheduler ddim")
    latent = torch.randn((samples, *spec.latent_shape), generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(samples, device=device) % spec.class_count
    if plan.halves == 2:
        labels = torch.cat([labels, torch.full_like(labels, spec.null_class)])
    for step in plan.steps:
        prediction = denoise(torch.cat([latent] * plan.halves), step.timestep, labels)[:, : spec.latent_shape[0]]
        if plan.halves == 2:
            conditional, null = prediction.chunk(2)
            prediction = null + plan.fingerprint.guidance * (conditional - null)
        latent = step.update.latent * latent + step.update.noise_prediction * prediction
    return latent


def sampling_times(
    denoise: Denoise, plan: StepPlan, spec: ModelSpec, samples: int, rounds: int, device: torch.device
) -> Timing:
    """Seconds of whole sampling, once everything was compiled and captured."""
    work = partial(draw, denoise, plan, spec, samples, device)
    for _ in range(WARM_UP if device.type == "cuda" else 1):
        work()
    return clock(work, rounds, device)


def clock(work: Callable[[], object], rounds: int, device: torch.device) -> Timing:
    """Seconds of repeated runs, each until the device is done."""
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def device_times(work: Callable[[], object], rounds: int, device: torch.device) -> Timing:
    """Seconds of repeated runs on the device alone; on a CPU, of the whole."""
    return event_times(work, rounds) if device.type == "cuda" else clock(work, rounds, device)


def event_times(work: Callable[[], object], rounds: int) -> Timing:
    """Seconds on the current stream, each run between two events."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in pairs:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return Timing.of([start.elapsed_time(end) / 1e3 for start, end in pairs])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
