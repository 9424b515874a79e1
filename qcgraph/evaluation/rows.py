"""Compute the metrics of one setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcgraph.evaluation.bootstrap import Bootstrap, BootstrapEstimate
from qcgraph.evaluation.metrics import Distances, Metric, peak, psnr, shown, spread, ssim
from qcgraph.evaluation.tally import Tally, Values, mean_squares
from qcgraph.models.judge import Judge
from qcgraph.plan.spec import ModelSpec
from qcgraph.sampling.runner import Array


@dataclass(frozen=True)
class EvaluatedSetting:
    """The measurements of one setting.

    Attributes:
        key: the name of the setting.
        title: the heading of the setting.
        cost: multiply-accumulates of a sample, in steps of the model.
        absent: the reason why the setting was not measured, or empty.
        metrics: estimates by the name of the metric.
        by_seed: the values of all seeds by the name of the metric.
        converged_psnr: PSNR of the mean squared error against the converged reference, dB.
        converged_spread: the median, and the tenth that is worst, of the PSNR of single samples against it, dB.
        psnr_spread: the same against full precision.
        latent_errors: relative L2 error of the latent after every step of the plan, if the setting passes its moments.
        deviations: standard deviation of the latents over that of full precision after every step of the plan, the mean
            over channels, if the setting passes its moments.
    """

    key: str
    title: str
    cost: float | None = None
    absent: str = ""
    metrics: Mapping[str, BootstrapEstimate] | None = None
    by_seed: Mapping[str, tuple[float, ...]] | None = None
    converged_psnr: float | None = None
    converged_spread: tuple[float, float] | None = None
    psnr_spread: tuple[float, float] | None = None
    latent_errors: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()


class Measuring:
    """Turns tallies into rows.

    Args:
        spec: the spec of the model.
        labels: the class of every sample of a seed.
        judge: features, classifier and real images; None where no metric needs them.
        bootstrap: computes intervals.
        reference: the tally of full precision.
        goal: samples of the converged reference from the first seed, or None.
    """

    def __init__(
        self,
        spec: ModelSpec,
        labels: Sequence[int],
        judge: Judge | None,
        bootstrap: Bootstrap,
        reference: Tally,
        goal: Array | None,
    ) -> None:
        self._spec = spec
        self._labels = np.asarray(labels)
        self._judge = judge
        self._distances = Distances(judge.features(judge.real)) if judge else None
        self._bootstrap = bootstrap
        self._reference = reference
        self._goal = goal
        self._exact = shown(reference.finals, spec)
        self._peak = peak(reference.finals, spec)

    def row(self, tally: Tally, metrics: Sequence[Metric]) -> EvaluatedSetting:
        """Return the row of a setting; full precision itself has no fidelity, because fidelity refers to it."""
        setting, itself = tally.setting, tally is self._reference
        estimates, by_seed = {}, {}
        for metric in metrics:
            if metric.judged or not itself:
                estimates[metric.name], values = self._measure(metric.name, tally)
                by_seed[metric.name] = tuple(float(value) for value in values)
        curves = bool(setting.moments) and not itself
        return EvaluatedSetting(
            key=setting.key,
            title=setting.title,
            cost=setting.cost,
            metrics=estimates,
            by_seed=by_seed,
            converged_psnr=None if self._goal is None else self.plain_psnr(tally.finals[0], self._goal),
            converged_spread=None if self._goal is None else self._spread(self._apart(tally.finals[0], self._goal)),
            psnr_spread=None if itself else self._spread(self.squared_errors(tally)),
            latent_errors=self._error_curve(tally) if curves else (),
            deviations=self._spread_curve(tally) if curves else (),
        )

    def _error_curve(self, tally: Tally) -> tuple[float, ...]:
        errors, powers = (values.mean(axis=(0, 2)) for values in (tally.errors, self._reference.errors))
        return tuple(np.sqrt(errors / powers).tolist())

    def _spread_curve(self, tally: Tally) -> tuple[float, ...]:
        return tuple((tally.deviations / self._reference.deviations).mean(axis=1).tolist())

    def plain_psnr(self, images: Array, reference: Array) -> float:
        """Return the PSNR of the mean squared error of images against their references, dB."""
        return float(psnr(self._apart(images, reference).mean(), self._peak))

    def _apart(self, images: Array, reference: Array) -> Values:
        """Return the mean squared error of each image against its reference, f64[N]."""
        one, other = (shown(part, self._spec) for part in (images[: len(reference)], reference))
        return mean_squares(one, other)

    def _spread(self, errors: Values) -> tuple[float, float]:
        """Return the median and the worst tenth of the PSNR of single samples, dB."""
        return spread(self.decibels(errors.reshape(-1)))

    def _measure(self, name: str, tally: Tally) -> tuple[BootstrapEstimate, Any]:
        """Return the estimate of a metric, and its value for every seed."""
        measures: dict[str, Callable[[Tally], tuple[BootstrapEstimate, Any]]] = {
            "psnr": self._psnr,
            "ssim": self._ssim,
            "latent_error": self._latent_error,
            "fid_small": self._fid_small,
            "kid": self._kid,
            "accuracy": self._accuracy,
        }
        return measures[name](tally)

    def squared_errors(self, tally: Tally) -> Values:
        """Return the mean squared error of every clipped image, f64[S,N], which PSNR averages."""
        return self._each(tally, mean_squares)

    def _psnr(self, tally: Tally) -> tuple[BootstrapEstimate, Any]:
        errors = self.squared_errors(tally)
        return self._bootstrap.estimate(self.decibels, errors), self.decibels(errors.mean(axis=1))

    def decibels(self, errors: Values) -> Values:
        """Return the PSNR of mean squared errors, dB."""
        return np.asarray(psnr(errors, self._peak))

    def _ssim(self, tally: Tally) -> tuple[BootstrapEstimate, Any]:
        values = self._each(tally, lambda one, other: ssim(one, other, self._peak))
        return self._bootstrap.estimate(np.asarray, values), values.mean(axis=1)

    def _each(self, tally: Tally, function: Callable[[Array, Array], Values]) -> Values:
        """Apply a function to images and those of full precision, f64[S,N]."""
        images = shown(tally.finals, self._spec)
        return np.stack([function(one, other) for one, other in zip(images, self._exact, strict=True)])

    def _latent_error(self, tally: Tally) -> tuple[BootstrapEstimate, Any]:
        errors, powers = tally.errors[:, -1], self._reference.errors[:, -1]
        return self._bootstrap.estimate(_root_ratio, errors, powers), _root_ratio(errors.mean(1), powers.mean(1))

    def _accuracy(self, tally: Tally) -> tuple[BootstrapEstimate, Any]:
        assert self._judge is not None
        judge = self._judge
        correct = np.stack([judge.classify(part) == self._labels for part in tally.finals]).astype(np.float64)
        return self._bootstrap.estimate(np.asarray, correct), correct.mean(axis=1)

    def _fid_small(self, tally: Tally) -> tuple[BootstrapEstimate, Any]:
        assert self._distances is not None
        return self._distance(tally, self._distances.fid_small)

    def _kid(self, tally: Tally) -> tuple[BootstrapEstimate, Any]:
        assert self._distances is not None
        return self._distance(tally, self._distances.kid)

    def _distance(self, tally: Tally, function: Callable[[Values], float]) -> tuple[BootstrapEstimate, Any]:
        assert self._judge is not None
        judge = self._judge
        features = np.stack([judge.features(part) for part in tally.finals]).astype(np.float64)
        return self._bootstrap.estimate_sets(function, features), [function(part) for part in features]


def _root_ratio(errors: Values, powers: Values) -> Values:
    return np.asarray(np.sqrt(errors / powers))
