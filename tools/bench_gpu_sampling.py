"""Sample for tools/bench_gpu.py: a model in PyTorch, and whole sampling with any denoiser."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from qcgraph.benchmark.timing import Timing
from qcgraph.capture.capture import example_inputs
from qcgraph.errors import UsageError
from qcgraph.models import LoadedModel
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.conditions import Conditions, in_turn, joined

WARM_UP = 3  # untimed runs of whole sampling: the second captures graphs, the third replays them
Values = Mapping[str, torch.Tensor]  # the conditions of a batch, by name
Denoise = Callable[[torch.Tensor, float, Values], torch.Tensor]


def guided_conditions(plan: StepPlan, spec: ModelSpec, samples: int) -> Conditions:
    """Return the conditions of a batch of a plan: of samples in turn, with guidance also their unconditional halves."""
    conditions = in_turn(samples, spec)
    return conditions if plan.halves == 1 else joined([conditions, conditions.unconditional(spec)])


def condition_tensors(plan: StepPlan, spec: ModelSpec, samples: int, device: torch.device) -> Values:
    """Return the conditions of `guided_conditions` as tensors of a device."""
    conditions = guided_conditions(plan, spec, samples)
    return {name: torch.from_numpy(values).to(device) for name, values in conditions.values.items()}


def torch_denoiser(model: LoadedModel, dtype: torch.dtype, mode: str | None, device: torch.device) -> Denoise:
    """Return a model in a type on a device, compiled if a mode is given."""
    module = copy.deepcopy(model.module).to(device, dtype)
    cast_inputs(module, model, device)
    call: Callable[..., torch.Tensor] = module
    if mode is not None:
        torch._dynamo.reset()
        call = torch.compile(module, dynamic=False, mode=mode)

    def denoise(latent: torch.Tensor, timestep: float, conditions: Values) -> torch.Tensor:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        timesteps = torch.full((len(latent),), timestep, device=device)
        given = (latent.to(dtype), timesteps, *(conditions[item.name] for item in model.spec.conditions))
        values = dict(zip(model.input_names, given, strict=True))
        return call(**values).float()

    return denoise


@torch.no_grad()
def cast_inputs(module: nn.Module, model: LoadedModel, device: torch.device) -> None:
    """Cast the inputs of linear layers from float32 to 16 bits where needed, as after the sines of a timestep."""
    found: set[nn.Module] = set()

    def cast(layer: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        wanted = layer.weight.dtype
        if inputs[0].dtype != wanted:
            found.add(layer)
        return tuple(value.to(wanted) for value in inputs)

    hooks = {each: each.register_forward_pre_hook(cast) for each in module.modules() if isinstance(each, nn.Linear)}
    dtype = next(module.parameters()).dtype
    latent, *others = (value.to(device) for value in example_inputs(model.spec, 1).values())
    module(**dict(zip(model.input_names, (latent.to(dtype), *others), strict=True)))
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
    conditions = condition_tensors(plan, spec, samples, device)
    for step in plan.steps:
        prediction = denoise(torch.cat([latent] * plan.halves), step.timestep, conditions)[:, : spec.latent_shape[0]]
        if plan.halves == 2:
            conditional, null = prediction.chunk(2)
            prediction = null + plan.fingerprint.guidance * (conditional - null)
        latent = step.update.latent * latent + step.update.noise_prediction * prediction
    return latent


def sampling_times(
    denoise: Denoise, plan: StepPlan, spec: ModelSpec, samples: int, rounds: int, device: torch.device
) -> Timing:
    """Measure the seconds of whole sampling, after everything is compiled and captured."""
    work = partial(draw, denoise, plan, spec, samples, device)
    for _ in range(WARM_UP if device.type == "cuda" else 1):
        work()
    return clock(work, rounds, device)


def clock(work: Callable[[], object], rounds: int, device: torch.device) -> Timing:
    """Measure the seconds of repeated runs, each until the device has finished."""
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def device_times(work: Callable[[], object], rounds: int, device: torch.device) -> Timing:
    """Measure the seconds of repeated runs on the device alone; on a CPU, of the whole runs."""
    return event_times(work, rounds) if device.type == "cuda" else clock(work, rounds, device)


def event_times(work: Callable[[], object], rounds: int) -> Timing:
    """Measure the seconds on the current stream, with each run between two events."""
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
