"""Compute the metrics of image quality, with torchmetrics where it has them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qcgraph.errors import UsageError, closest
from qcgraph.plan.spec import ModelSpec

Array = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]

KID_SUBSET = 100  # samples in a subset
KID_SUBSETS = 10
OWN = ("psnr", "latent_error", "accuracy")  # metrics that need no more than a mean
WORST_SHARE = 0.1  # share of the samples that are the worst ones: a mean follows single samples
STANDARD_SIGMA = 1.5  # of the standard SSIM window, which is 11 pixels wide
SMALL_SIGMA = 0.5  # of the window for images that are too small for the standard one


@dataclass(frozen=True)
class Metric:
    """A metric of image quality.

    Attributes:
        name: the name on the command line and in the JSON.
        title: the heading in tables.
        unit: the unit, or empty.
        higher_is_better: whether larger values are better.
        judged: whether the metric needs the judge of a model: features, a classifier, real images.
        samples: the fewest samples of a seed.
        samples_per_feature: the fewest samples of a seed for each feature of the judge.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    judged: bool
    samples: int
    samples_per_feature: int = 0

    def needed(self, feature_count: int) -> int:
        """Return the fewest samples of a seed, for a judge with a number of features."""
        return max(self.samples, self.samples_per_feature * feature_count)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("psnr", "PSNR", "dB", higher_is_better=True, judged=False, samples=4),
        Metric("ssim", "SSIM", "", higher_is_better=True, judged=False, samples=4),
        Metric("latent_error", "latent error", "", higher_is_better=False, judged=False, samples=4),
        # A covariance of F features has full rank from F + 1 samples on; about twice as many give a useful estimate.
        Metric("fid_small", "FID-small", "", False, judged=True, samples=4, samples_per_feature=2),
        Metric("kid", "KID", "", higher_is_better=False, judged=True, samples=KID_SUBSET),
        Metric("accuracy", "class accuracy", "", higher_is_better=True, judged=True, samples=50),
    )
}


def check_installed(metrics: Iterable[Metric]) -> None:
    """Refuse to begin if a metric needs a library that is not installed.

    Raises:
        UsageError: a metric needs torchmetrics, which is not installed.
    """
    needed = [metric.title for metric in metrics if metric.name not in OWN]
    if needed and find_spec("torchmetrics") is None:
        raise UsageError(
            f"{needed[0]} comes from torchmetrics, which is not installed",
            hint=f"pip install 'qcgraph[eval]', or only ask for {', '.join(OWN)}",
        )


def choose_metrics(names: Iterable[str] | None, *, judged: bool, model: str) -> tuple[Metric, ...]:
    """Return the requested metrics, or all metrics that apply to a model.

    Args:
        names: names of metrics, or None for all that apply.
        judged: whether the model has a judge.
        model: the name of the model, for errors.

    Raises:
        UsageError: a metric does not exist, or needs a judge that the model does not have.
    """
    if names is None:
        return tuple(metric for metric in METRICS.values() if judged or not metric.judged)
    chosen = []
    for name in dict.fromkeys(names):
        if name not in METRICS:
            raise UsageError(f"unknown metric {name!r}", hint=closest(name, METRICS))
        if METRICS[name].judged and not judged:
            raise UsageError(
                f"{METRICS[name].title} needs a feature network, a classifier and real images of the model's data",
                where=model,
                hint="leave it out, or load the model with a factory that gives a judge (see qcgraph.models.Judge)",
            )
        chosen.append(METRICS[name])
    if not chosen:
        raise UsageError("no metric", hint=f"choose from {', '.join(METRICS)}")
    return tuple(chosen)


def check_samples(metrics: Sequence[Metric], samples: int | None, feature_count: int) -> int:
    """Refuse an insufficient number of samples; None stands for a sufficient one.

    Returns:
        The number of samples that the metrics need.

    Raises:
        UsageError: a metric needs more samples; the message says how many.
    """
    needed = {metric.name: metric.needed(feature_count) for metric in metrics}
    short = {name: count for name, count in needed.items() if samples is not None and count > samples}
    if short:
        name = max(short, key=lambda item: short[item])
        enough = [metric.name for metric in metrics if metric.name not in short]
        instead = f", or only ask for --metrics {','.join(enough)}" if enough else ""
        raise UsageError(
            f"{METRICS[name].title} needs at least {short[name]} samples of each seed, not {samples}",
            hint=f"use --samples {short[name]}{instead}",
        )
    return max(needed.values())


def shown(images: Array, spec: ModelSpec) -> Array:
    """Return images clipped to [-1, 1], as a picture shows them; latents of an autoencoder are unchanged."""
    return np.clip(images, -1, 1) if spec.is_image else images


def peak(reference: Array, spec: ModelSpec) -> float:
    """Return the range that PSNR and SSIM refer to: 2 for images in [-1, 1], the range of the reference for latents."""
    return 2.0 if spec.is_image else float(reference.max() - reference.min())


def psnr(mean_squared_error: Any, peak: float) -> Any:
    """Return the peak signal-to-noise ratio in dB, ``10 log10(peak^2 / MSE)``; infinite if there is no error.

    The squared error is averaged over samples before the logarithm, so that single bad samples count.
    """
    with np.errstate(divide="ignore"):
        return 10 * np.log10(peak**2 / np.asarray(mean_squared_error, dtype=np.float64))


def spread(decibels: Values) -> tuple[float, float]:
    """Return the median and the worst tenth of the PSNR [N] of single samples, dB."""
    return float(np.median(decibels)), float(np.quantile(decibels, WORST_SHARE))


def ssim(images: Array, reference: Array, peak: float) -> Values:
    """Return the structural similarity of each image, f64[N], with a Gaussian window of sigma 1.5 (Wang et al., 2004).

    Images of less than 16 pixels take a sigma of 0.5, because the standard window would not fit into them.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = STANDARD_SIGMA if min(reference.shape[-2:]) >= 16 else SMALL_SIGMA
    values = structural_similarity_index_measure(
        torch.from_numpy(images), torch.from_numpy(reference), sigma=sigma, data_range=peak, reduction="none"
    )
    assert isinstance(values, torch.Tensor)
    return values.reshape(-1).double().numpy()


class _Identity(torch.nn.Module):
    """Passes features on unchanged, in the form that torchmetrics requires."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class Distances:
    """Computes distances between distributions of features and one set of real features.

    Args:
        real: features f32[M,F] of real images.
    """

    def __init__(self, real: Array) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        values = torch.from_numpy(real).double()
        features = _Identity(real.shape[1])
        self._fid = FrechetInceptionDistance(feature=features, input_img_size=real.shape[1:], reset_real_features=False)
        self._fid.update(values, real=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it keeps all features, which are small
            self._kid = KernelInceptionDistance(
                feature=features, subsets=KID_SUBSETS, subset_size=KID_SUBSET, reset_real_features=False
            )
        self._size = float(values.square().mean().sqrt())
        self._kid.update(values / self._size, real=True)

    def fid_small(self, features: npt.NDArray[Any]) -> float:
        """Return the Frechet distance of features [N,F] of a small classifier (as FID; Heusel et al., 2017)."""
        return self._compute(self._fid, features)

    def kid(self, features: npt.NDArray[Any]) -> float:
        """Return the kernel distance of features [N,F], polynomial kernel of degree 3 (KID; Binkowski et al., 2018).

        The kernel is made for features of about unit size, so they are divided by the root mean square of the real
        features. The estimate is unbiased: for equal distributions it scatters around zero.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)  # seeds the choice of subsets
            return self._compute(self._kid, features / self._size)

    @staticmethod
    def _compute(metric: Any, features: npt.NDArray[Any]) -> float:
        metric.reset()
        metric.update(torch.from_numpy(features).double(), real=False)
        value = metric.compute()
        return float(value[0] if isinstance(value, tuple) else value)


def real_floor(real: Array, samples: int) -> dict[str, float]:
    """Return FID-small and KID between disjoint parts of the real images; no generator is expected to be below them.

    One part has as many images as a seed has samples (at most half of them), because FID falls with the sample size.

    Args:
        real: features f32[M,F] of real images.
        samples: number of samples of a seed.
    """
    order = np.random.default_rng(0).permutation(len(real))
    size = max(min(samples, len(real) // 2), KID_SUBSET)
    distances = Distances(real[order[size:]])
    part = real[order[:size]]
    return {"fid_small": distances.fid_small(part), "kid": distances.kid(part)}
