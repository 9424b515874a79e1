"""Measure the effect of quantizing each linear layer alone on a sampling step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from qcgraph.evaluation.ablation import (
    dequantized_weight,
    float_weight,
    without_compensation,
    without_quantization,
)
from qcgraph.evaluation.scales import decibels
from qcgraph.evaluation.settings import Subject
from qcgraph.evaluation.tally import Trajectory
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import QuantizedSite, quantized_sites, record
from qcgraph.ir.structure import find_sites, total_macs
from qcgraph.pipeline.calibration_budget import affordable
from qcgraph.plan.spec import PREDICTION_NAME
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import step_inputs

STEPS = 4  # steps at which the effect of a site is measured
SAMPLES = 16  # samples of each step; fewer for large models
MACS = 1e12  # multiply-accumulates for measuring all sites, about a minute on two cores


@dataclass(frozen=True)
class SiteEffect:
    """The cost of quantizing one site.

    Attributes:
        site: the name of the site.
        effect: relative L2 error of the latent after one sampling step in which this site alone is quantized, the root
            mean square over a few steps. It weighs the noise prediction as the sampler does.
        weight_snr: signal-to-quantization-noise of its result if only its weight is quantized, dB.
        weight_attainable: the same ratio for min-max scales with as many codes, dB.
    """

    site: str
    effect: float
    weight_snr: float
    weight_attainable: float


def measure_sites(
    subject: Subject, trajectory: Trajectory, conditions: Conditions, seed: int, progress: Progress
) -> tuple[SiteEffect, ...]:
    """Measure the cost of every quantized site; the worst comes first.

    Args:
        subject: the compilation.
        trajectory: latents of full precision.
        conditions: the conditions of the latents.
        seed: the seed of the latents.
        progress: receives progress messages.
    """
    program = without_compensation(subject.program)
    variant = subject.plan.computing
    sites = quantized_sites(program, variant)
    if not sites:
        return ()
    probes = [
        replace(probe, inputs=program.prepared(variant, probe.inputs))
        for probe in _probes(subject, trajectory, conditions, seed, len(sites))
    ]
    exact = without_quantization(program, subject.origin)
    expected = [exact.run(variant, probe.inputs)[PREDICTION_NAME] for probe in probes]
    entering = _entering(exact, variant, probes[len(probes) // 2], sites)
    found = []
    for site in progress.track(sites, "sites"):
        alone = without_quantization(program, subject.origin, keep=(site.name,))
        errors = [
            probe.weight * float((alone.run(variant, probe.inputs)[PREDICTION_NAME] - wanted).norm())
            for probe, wanted in zip(probes, expected, strict=True)
        ]
        effect = float(np.sqrt(np.mean(np.square(errors))))
        fit = _weight_fit(program, variant, site, subject.origin, entering[site.entering])
        found.append(SiteEffect(site.name, effect, *fit))
    return tuple(sorted(found, key=lambda item: -item.effect))


@dataclass(frozen=True)
class _Probe:
    """The denoiser's inputs at one step, and the weight of its output error in the next latent."""

    inputs: dict[str, torch.Tensor]
    weight: float


def _probes(
    subject: Subject, trajectory: Trajectory, conditions: Conditions, seed: int, sites: int
) -> tuple[_Probe, ...]:
    """Return inputs at a few steps of the full-precision trajectory; every second sample is unconditional."""
    plan, spec = subject.plan, subject.spec
    cost = total_macs(find_sites(subject.origin.variants[subject.origin.computing])) * (sites + 1) * STEPS
    count = affordable(cost, MACS, (1, min(SAMPLES, len(conditions))))
    initial = Noise(seed, range(count), spec.latent_shape).initial()
    latents = [initial, *(latent[:count] for latent in trajectory.latents)]
    told = conditions[:count].copy()
    for name, null in told.unconditional(spec).values.items():
        told.values[name][1::2] = null[1::2]
    probes = []
    for index in sorted({int(index) for index in np.linspace(0, len(plan) - 1, STEPS).round()}):
        given = step_inputs(plan, spec, index, latents[index], told)
        inputs = {name: torch.from_numpy(value) for name, value in given.items()}
        weight = abs(plan.steps[index].update.noise_prediction) / float(np.linalg.norm(latents[index + 1]))
        probes.append(_Probe(inputs, weight))
    return tuple(probes)


def _entering(exact: Program, variant: str, probe: _Probe, sites: Sequence[QuantizedSite]) -> dict[str, torch.Tensor]:
    """Return the activation that enters every site at one step, by node."""
    wanted = [frozenset(site.entering for site in sites)]
    ((_, values),) = record(exact, variant, probe.inputs, wanted)
    return {name: torch.from_numpy(value) for name, value in values.items()}


def _weight_fit(
    program: Program, variant: str, site: QuantizedSite, model: Program, value: torch.Tensor
) -> tuple[float, float]:
    """Return the signal-to-quantization-noise of a result in dB, with the compiled weight and with min-max scales.

    The ratio is that of the result, not of the weight: codes may be chosen so that their errors cancel.
    """
    codes = program.constants[site.codes]
    weight = float_weight(site, model, program)
    used = dequantized_weight(program, variant, site)
    inputs = 0 if site.transposed else 1
    largest = weight.abs().amax(dim=inputs, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scale = largest / max(int(codes.short().abs().max()), 1)
    attainable = torch.round(weight / scale) * scale
    flat = value.flatten(0, -2)
    signal, *noise = (
        float((flat @ (matrix if inputs == 0 else matrix.t())).double().square().sum())
        for matrix in (weight, weight - used, weight - attainable)
    )
    return decibels(signal, noise[0]), decibels(signal, noise[1])
