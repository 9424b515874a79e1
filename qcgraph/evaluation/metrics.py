"""The metrics of image quality: what each needs and computes, from torchmetrics where it has them."""

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

KID_SUBSET = 100  # samples a subset
KID_SUBSETS = 10
OWN = ("psnr", "latent_error", "accuracy")  # what takes no more than a mean
STANDARD_SIGMA = 1.5  # of the SSIM window, which is 11 pixels wide then
SMALL_SIGMA = 0.5  # of images too small for that one


@dataclass(frozen=True)
class Metric:
    """A metric that can be asked for.

    Attributes:
        name: its name on the command line and in the JSON.
        title: its heading.
        unit: its unit, or nothing.
        higher_is_better: which way is better.
        judged: whether it needs the judge of a model: features, a classifier, real images.
        samples: how many samples of a seed it needs.
        samples_per_feature: and how many for each feature of the judge.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    judged: bool
    samples: int
    samples_per_feature: int = 0

    def needed(self, feature_count: int) -> int:
        """How many samples of a seed it needs, with a judge of so many features."""
        return max(self.samples, self.samples_per_feature * feature_count)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("psnr", "PSNR", "dB", higher_is_better=True, judged=False, samples=4),
        Metric("ssim", "SSIM", "", higher_is_better=True, judged=False, samples=4),
        Metric("latent_error", "latent error", "", higher_is_better=False, judged=False, samples=4),
        # A covariance of F features has full rank from F + 1 samples on; its estimate is of use from about twice that.
        Metric("fid_small", "FID-small", "", False, judged=True, samples=4, samples_per_feature=2),
        Metric("kid", "KID", "", higher_is_better=False, judged=True, samples=KID_SUBSET),
        Metric("accuracy", "class accuracy", "", higher_is_better=True, judged=True, samples=50),
    )
}


def check_installed(metrics: Iterable[Metric]) -> None:
    """Refuse to begin without the library that some metrics come from.

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
    """The metrics asked for, or all that apply to a model.

    Args:
        names: names, or None for all that apply.
        judged: whether the model has a judge.
        model: its name, for errors.

    Raises:
        UsageError: there is no such metric, or it needs a judge that the model does not have.
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
    """Refuse too few samples; None stands for enough of them.

    Returns:
        How many the metrics need.

    Raises:
        UsageError: a metric needs more samples; says how many.
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
    """Images as they are looked at: clipped to [-1, 1]; latents of an autoencoder as they are."""
    return np.clip(images, -1, 1) if spec.is_image else images


def peak(reference: Array, spec: ModelSpec) -> float:
    """The range that PSNR and SSIM refer to: 2 of images in [-1, 1], of latents the one they have."""
    return 2.0 if spec.is_image else float(reference.max() - reference.min())


def psnr(mean_squared_error: Any, peak: float) -> Any:
    """Peak signal-to-noise ratio in dB, ``10 log10(peak^2 / MSE)``; infinite where there is no error.

    The squared error is averaged over samples before the logarithm, so single bad samples count.
    """
    with np.errstate(divide="ignore"):
        return 10 * np.log10(peak**2 / np.asarray(mean_squared_error, dtype=np.float64))


def ssim(images: Array, reference: Array, peak: float) -> Values:
    """Structural similarity of each image, f64[N], with a Gaussian window of sigma 1.5 (Wang et al., 2004).

    Images of less than 16 pixels take a sigma of 0.5, because the standard window would leave nothing of them.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = STANDARD_SIGMA if min(reference.shape[-2:]) >= 16 else SMALL_SIGMA
    values = structural_similarity_index_measure(
        torch.from_numpy(images), torch.from_numpy(reference), sigma=sigma, data_range=peak, reduction="none"
    )
    assert isinstance(values, torch.Tensor)
    return values.reshape(-1).double().numpy()


class _Identity(torch.nn.Module):
    """Features as they are, in the form that torchmetrics asks for."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class Distances:
    """Distances of distributions to one set of real features.

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
            warnings.simplefilter("ignore")  # says that it keeps all features; they are small
            self._kid = KernelInceptionDistance(
                feature=features, subsets=KID_SUBSETS, subset_size=KID_SUBSET, reset_real_features=False
            )
        self._size = float(values.square().mean().sqrt())
        self._kid.update(values / self._size, real=True)

    def fid_small(self, features: npt.NDArray[Any]) -> float:
        """Frechet distance of the features [N,F] of a small classifier (the formula of FID; Heusel et al., 2017)."""
        return self._compute(self._fid, features)

    def kid(self, features: npt.NDArray[Any]) -> float:
        """Kernel distance of the features [N,F], polynomial kernel of degree 3 (KID; Binkowski et al., 2018).

        The kernel is made for features of about unit size, so they are divided by the root mean square of the real
        ones. It is unbiased: where there is no distance it scatters around zero.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of the subsets
            return self._compute(self._kid, features / self._size)

    @staticmethod
    def _compute(metric: Any, features: npt.NDArray[Any]) -> float:
        metric.reset()
        metric.update(torch.from_numpy(features).double(), real=False)
        value = metric.compute()
        return float(value[0] if isinstance(value, tuple) else value)


def real_floor(real: Array, samples: int) -> dict[str, float]:
    """FID-small and KID between disjoint parts of the real images: what no generator can be expected to be below.

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
