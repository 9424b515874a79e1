"""Judge a compilation by samples of it, of its parts and of its rivals, all drawn from the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcgraph.errors import UsageError, closest, shown
from qcgraph.evaluation.bootstrap import LEVEL, Bootstrap, BootstrapEstimate
from qcgraph.evaluation.faults import Fault, error_ratio, find_faults, uncompensated
from qcgraph.evaluation.kept import kept
from qcgraph.evaluation.metrics import METRICS, Metric, check_installed, check_samples, choose_metrics, real_floor
from qcgraph.evaluation.rows import EvaluatedSetting, Measuring
from qcgraph.evaluation.scales import ScaleFit, fit_scales
from qcgraph.evaluation.settings import (
    RIVALS,
    Setting,
    Subject,
    compiled,
    converged,
    full_precision,
    parts,
    pin_threads,
    rivals,
)
from qcgraph.evaluation.sites import SAMPLES as SITE_SAMPLES
from qcgraph.evaluation.sites import SiteEffect, measure_sites
from qcgraph.evaluation.tally import Tally, Tallying, Trajectory, Values
from qcgraph.facts import encode
from qcgraph.files.atomic import scratch_folder
from qcgraph.pipeline.calibration_budget import affordable
from qcgraph.progress import Progress
from qcgraph.recipe.gate import Gate, Verdict
from qcgraph.sampling.conditions import Conditions, in_turn
from qcgraph.sampling.reference import CONVERGED_STEPS
from qcgraph.sampling.runner import Array

SAMPLES = 128  # default number of samples of each seed
CONVERGED_SAMPLES = 64  # samples of the converged reference, of the first seed only; it takes hundreds of steps
MACS = 1e13  # multiply-accumulates for samples or reference: two minutes on two cores; large models draw fewer
PICTURED = 10  # samples of every setting that are kept as pictures


@dataclass(frozen=True)
class Options:
    """The options of an evaluation.

    Attributes:
        samples: samples of each seed; None for `most_samples`, or as many as a fixed amount of arithmetic allows.
        most_samples: the most samples of each seed where their number is not given.
        seeds: number of seeds.
        seed: the seeds of the noise are ``seed * seeds``, ``seed * seeds + 1``, ...; another value shares none of them.
        metrics: names of metrics; None for all that apply.
        attribution: whether the parts and the rivals are measured in addition to the compilation.
        parts: the keys of the parts to measure where the compilation has them; None for all, and why one is missing.
        sites: whether every quantized layer is measured; it requires attribution.
        gate: conditions to meet, or None.
    """

    samples: int | None = None
    seeds: int = 3
    seed: int = 0
    metrics: tuple[str, ...] | None = None
    attribution: bool = True
    parts: tuple[str, ...] | None = None
    sites: bool = True
    gate: Gate | None = None
    most_samples: int = SAMPLES

    def __post_init__(self) -> None:
        for count, what in ((self.samples, "samples"), (self.seeds, "seeds")):
            if count is not None and count < 1:
                raise UsageError(f"{count} {what}", hint="1 or more")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative", hint="a seed is 0 or larger")
        for name in self.metrics or ():  # checked before a model is loaded
            if name not in METRICS:
                raise UsageError(f"unknown metric {shown(name)}", hint=closest(name, METRICS))

    @property
    def wanted(self) -> tuple[str, ...] | None:
        """The metrics to measure: the requested ones and those of the gate; None for all."""
        if self.metrics is None:
            return None
        return (*self.metrics, *(self.gate.metrics if self.gate else ()))

    @property
    def noise_seeds(self) -> tuple[int, ...]:
        """The seeds of the noise, one for each run."""
        return tuple(self.seed * self.seeds + index for index in range(self.seeds))


# The settings that decide whether a bundle is worth its quality: few samples of them, all from the same noise.
QUICK = Options(seeds=1, metrics=("psnr", "ssim"), parts=("quantization", "cache"), sites=False, most_samples=16)


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        seeds: the seeds of the noise.
        samples: samples of each seed.
        metrics: the metrics.
        rows: the settings, full precision first.
        interaction: the squared error of quantization and caching together over the sum of their own errors, dB: 0 if
            they do not interact; None if one of them is missing.
        compensation: the change of the squared error by compensation, dB; None without compensation.
        floors: FID-small and KID between real images.
        converging: the scheduler of the converged reference.
        converged_samples: the number of samples of the converged reference.
        converged_floor: PSNR between the converged reference and itself with half the steps, dB.
        sites: the cost of every quantized site, the worst first.
        scales: the fit of every activation scale.
        faults: the faults that were found.
        verdicts: the conditions of the gate.
        pictures: the first samples of every setting that was sampled, by its title.
    """

    seeds: tuple[int, ...]
    samples: int
    metrics: tuple[Metric, ...]
    rows: tuple[EvaluatedSetting, ...]
    interaction: BootstrapEstimate | None
    compensation: BootstrapEstimate | None
    floors: Mapping[str, float]
    converging: str
    converged_samples: int
    converged_floor: float | None
    sites: tuple[SiteEffect, ...]
    scales: tuple[ScaleFit, ...]
    faults: tuple[Fault, ...]
    verdicts: tuple[Verdict, ...]
    pictures: Mapping[str, Array]

    @property
    def passed(self) -> bool:
        """Whether there is no fault and the gate is met."""
        return not self.faults and all(verdict.passed for verdict in self.verdicts)

    def row(self, key: str) -> EvaluatedSetting:
        """Return the row of a setting."""
        return next(row for row in self.rows if row.key == key)

    def to_json(self) -> dict[str, Any]:
        """Return all results except the pictures as JSON data; the same measurement gives the same data."""
        return {
            "samples": self.samples,
            "seeds": self.seeds,
            "interval_level": LEVEL,
            "rows": [_without_nothing(asdict(row)) for row in self.rows],
            "interaction_db": asdict(self.interaction) if self.interaction else None,
            "compensation_db": asdict(self.compensation) if self.compensation else None,
            "real_floors": dict(self.floors),
            "converged_reference": {
                "solver": self.converging,
                "steps": CONVERGED_STEPS,
                "samples": self.converged_samples,
                "psnr_of_half_the_steps": self.converged_floor,
            },
            "sites": [asdict(site) for site in self.sites],
            "scales": [asdict(fit) for fit in self.scales],
            "faults": [asdict(fault) for fault in self.faults],
            "gate": [asdict(verdict) for verdict in self.verdicts],
            "passed": self.passed,
        }


def evaluate(subject: Subject, options: Options, progress: Progress) -> Evaluation:
    """Judge a compilation.

    Args:
        subject: the compilation.
        options: the measurements to make.
        progress: receives progress messages.

    Raises:
        UsageError: a metric does not exist, does not apply, or needs more samples.
    """
    return _Run(subject, options, progress).evaluation()


class _Run:
    """One evaluation: its samples, and the results computed from them."""

    def __init__(self, subject: Subject, options: Options, progress: Progress) -> None:
        make_judge = subject.model.judge
        self._metrics = choose_metrics(options.wanted, judged=make_judge is not None, model=subject.spec.name)
        check_installed(self._metrics)
        judged = any(metric.judged for metric in self._metrics)
        self._judge = make_judge() if judged and make_judge is not None else None
        needed = check_samples(self._metrics, options.samples, self._judge.feature_count if self._judge else 0)
        macs = subject.macs(len(subject.run_plan)) * options.seeds
        samples = options.samples or affordable(macs, MACS, (needed, max(needed, options.most_samples)))
        pin_threads(subject.threads)
        self._subject, self._options, self._progress = subject, options, progress
        self._conditions = in_turn(samples, subject.spec)
        self._labels = self._conditions.labels(subject.spec).tolist()
        self._bootstrap = Bootstrap(options.seeds, self._labels)

    def evaluation(self) -> Evaluation:
        """Draw all samples, and compute all results."""
        with scratch_folder() as folder:
            settings = self._settings(folder)
            tallies, trajectory = self._sample(settings)
        reference, goal, half = tallies["full_precision"], *self._converged(settings)
        spec, judge = self._subject.spec, self._judge
        measuring = Measuring(spec, self._labels, judge, self._bootstrap, reference, goal)
        rows = tuple(
            measuring.row(tallies[setting.key], self._metrics)
            if setting.key in tallies
            else EvaluatedSetting(setting.key, setting.title, absent=setting.absent)
            for setting in settings
        )
        errors = {key: measuring.squared_errors(tally) for key, tally in tallies.items()}
        sites, fits = self._sites(trajectory) if self._options.attribution and self._options.sites else ((), ())
        return Evaluation(
            seeds=self._options.noise_seeds,
            samples=len(self._labels),
            metrics=self._metrics,
            rows=rows,
            interaction=interaction(self._bootstrap, errors),
            compensation=self._compensation(errors),
            floors=real_floor(judge.features(judge.real), len(self._labels)) if judge else {},
            converging=self._subject.converging,
            converged_samples=0 if goal is None else len(goal),
            converged_floor=None if goal is None or half is None else measuring.plain_psnr(half, goal),
            sites=sites,
            scales=fits,
            faults=find_faults(self._subject, tallies, errors, self._bootstrap, fits, sites),
            verdicts=self._options.gate.check(_gate_values(rows)) if self._options.gate else (),
            pictures={tally.setting.title: tally.finals[0, :PICTURED] for tally in tallies.values()},
        )

    def _settings(self, folder: Path) -> tuple[Setting, ...]:
        alone = (full_precision(self._subject), compiled(self._subject))
        if not self._options.attribution:
            return alone
        found, chosen = parts(self._subject, folder, self._progress), self._options.parts
        if chosen is not None:
            found = tuple(part for part in found if part.key in chosen and part.draw is not None)
        return (alone[0], *found, alone[1], *rivals(self._subject, self._progress))

    def _sample(self, settings: Sequence[Setting]) -> tuple[dict[str, Tally], Trajectory]:
        """Sample every setting from every seed and compare it with full precision; also return the first trajectory."""
        steps, channels = len(self._subject.plan), self._subject.spec.latent_shape[0]
        drawn = {setting.key: Tallying(setting, steps, channels) for setting in settings if setting.draw is not None}
        first: Trajectory | None = None
        for seed in self._options.noise_seeds:
            self._progress.note(f"  seed {seed}: {len(self._labels)} samples of {len(drawn)} settings")
            exact = Trajectory.draw(settings[0], self._conditions, seed)
            first = first or exact
            for key, tallying in self._progress.track(list(drawn.items()), "sampling"):
                if key == settings[0].key:
                    tallying.take(exact)
                else:
                    tallying.add(self._conditions, seed, exact)
        assert first is not None
        return {key: tallying.tally() for key, tallying in drawn.items()}, first

    def _converged(self, settings: Sequence[Setting]) -> tuple[Array | None, Array | None]:
        """Return samples of the converged reference, and samples with half its steps."""
        if not any(setting.key in RIVALS and setting.draw for setting in settings):
            return None, None
        self._progress.note(
            f"  converged reference: {CONVERGED_STEPS} and {CONVERGED_STEPS // 2} steps, drawn once and kept"
        )
        count = affordable(self._subject.macs(CONVERGED_STEPS * 3 // 2), MACS, (1, CONVERGED_SAMPLES))
        told, seed = self._conditions[:count], self._options.noise_seeds[0]
        goal, half = (self._kept(setting, told, seed) for setting in converged(self._subject))
        return goal, half

    def _kept(self, setting: Setting, conditions: Conditions, seed: int) -> Array:
        """Return samples of the model itself, which no bundle changes, as an earlier evaluation drew them or anew."""
        mark, spec, draw = self._subject.plan.fingerprint, self._subject.spec, setting.draw
        assert draw is not None
        key = [mark.model, mark.guidance, encode(spec), setting.title, seed, len(conditions)]
        return kept(key, lambda: draw(conditions, seed, None), spec.latent_shape)

    def _sites(self, trajectory: Trajectory) -> tuple[tuple[SiteEffect, ...], tuple[ScaleFit, ...]]:
        told, seed = self._conditions[:SITE_SAMPLES], self._options.noise_seeds[0]
        sites = measure_sites(self._subject, trajectory, told, seed, self._progress)
        return sites, fit_scales(self._subject, told, seed, self._progress) if sites else ()

    def _compensation(self, errors: Mapping[str, Values]) -> BootstrapEstimate | None:
        bare = uncompensated(errors)
        if bare is None or not self._subject.is_compensated:
            return None
        return error_ratio(self._bootstrap, errors["compiled"], errors[bare])


def interaction(bootstrap: Bootstrap, errors: Mapping[str, Values]) -> BootstrapEstimate | None:
    """Return the squared error of quantization and caching together over the sum of their own errors, dB.

    Args:
        bootstrap: computes the interval.
        errors: squared errors f64[S,N] by the keys of the settings.
    """
    if not {"quantization", "cache", "both"} <= set(errors):
        return None

    def decibels(both: Values, quantization: Values, cache: Values) -> Values:
        return np.asarray(10 * np.log10(both / (quantization + cache)))

    return bootstrap.estimate(decibels, *(errors[key] for key in ("both", "quantization", "cache")))


def _gate_values(rows: Sequence[EvaluatedSetting]) -> dict[str, float]:
    """Return the values of the terms of a gate."""
    found = {row.key: row.metrics for row in rows if row.metrics is not None}
    own, exact = found["compiled"], found["full_precision"]
    values = {name: estimate.value for name, estimate in own.items()}
    if "accuracy" in own:
        values["accuracy_drop"] = exact["accuracy"].value - own["accuracy"].value
    if "fid_small" in own:
        values["fid_rise"] = own["fid_small"].value - exact["fid_small"].value
    return values


def _without_nothing(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without its empty fields."""
    return {name: value for name, value in row.items() if value not in (None, "", (), {})}
