"""Check the predictions of engines and time their steps, for tools/bench_gpu.py."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from bench_gpu_sampling import event_times, guided_conditions

from qcgraph.benchmark.timing import Timing
from qcgraph.bundle import Bundle
from qcgraph.errors import VerificationError
from qcgraph.export.run.engines import EngineRunner
from qcgraph.export.run.tensorrt import TensorRTCall
from qcgraph.ir.graph import DTYPES
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import BATCH
from qcgraph.sampling.loop import Request
from qcgraph.sampling.runner import Runner, step_call

AGREES = 5e-2  # relative; rounding moves some values to the next code of 8 bits
MOST_STEPS = 8  # steps that are compared; with a reference on the CPU each may take seconds
UNTIL_CAPTURED = 16  # calls after which every address of a variant has been used twice


def compare(runner: Runner, reference: Runner, bundle: Bundle, seed: int = 0) -> dict[str, float]:
    """Return the relative L2 errors of predictions at the first steps of the plan, from the same latents.

    Raises:
        VerificationError: an error is larger than rounding explains.
    """
    plan, spec = bundle.plan, bundle.spec
    generator, requests = np.random.default_rng(seed), [Request(each, plan, spec) for each in (runner, reference)]
    conditions = guided_conditions(plan, spec, 1)
    errors = {}
    for index, step in enumerate(islice(plan.steps, MOST_STEPS)):
        latent = np.repeat(generator.standard_normal((1, *spec.latent_shape), dtype=np.float32), plan.halves, axis=0)
        ours, theirs = (request.denoise(index, latent, conditions) for request in requests)
        errors[f"{index} {step.variant}"] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    worst = max(errors, key=lambda step: errors[step] if np.isfinite(errors[step]) else np.inf)
    if not errors[worst] <= AGREES:
        raise VerificationError(f"step {worst} is {errors[worst]:.2g} off, relative; {AGREES:g} is allowed: {errors}")
    return errors


def step_times(runner: EngineRunner, bundle: Bundle, samples: int, rounds: int) -> tuple[dict[str, Timing], int]:
    """Measure the seconds of every variant on the device by CUDA events, and count those that ran as CUDA graphs."""
    plan, state, found, graphs = bundle.plan, dict[tuple[str, int], object](), {}, 0
    for variant in plan.variants:
        index = next(index for index, step in enumerate(plan.steps) if step.variant == variant)
        call = step_call(plan, index, variant_inputs(bundle, variant, samples * plan.halves), state)
        for _ in range(UNTIL_CAPTURED):
            runner.run_tensors(call)
        bound = runner.calls[-1]
        assert isinstance(bound, TensorRTCall)
        graphs += bound.is_graph
        with runner.engines.stream():
            found[variant] = event_times(bound.run, rounds)
    return found, graphs


def variant_inputs(bundle: Bundle, variant: str, batch: int) -> dict[str, torch.Tensor]:
    """Return the inputs of a variant except its cached values: a random latent, and zeros."""
    inputs = {}
    for spec in bundle.interfaces[variant].inputs:
        if spec.role is TensorRole.CACHE:
            continue
        shape = [batch if dim == BATCH else int(dim) for dim in spec.shape]
        inputs[spec.name] = torch.zeros(shape, dtype=DTYPES[spec.dtype])
        if spec.role is TensorRole.STATE:
            inputs[spec.name].normal_(generator=torch.Generator().manual_seed(0))
    return inputs
