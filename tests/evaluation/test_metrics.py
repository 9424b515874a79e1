"""Metrics against values known by hand, and their refusals."""

from __future__ import annotations

import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.evaluation.metrics import (
    METRICS,
    Distances,
    check_samples,
    choose_metrics,
    peak,
    psnr,
    real_floor,
    shown,
    ssim,
)
from qcgraph.plan.spec import ModelSpec

SPEC = ModelSpec.class_conditional("toy", (1, 8, 8), 10, 10, output_channels=1, is_image=True)
LATENT_SPEC = ModelSpec.class_conditional("toy", (4, 8, 8), 10, 10, output_channels=4)


def images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_psnr() -> None:
    assert psnr(0.04, 2.0) == pytest.approx(20)
    assert psnr(0.0, 2.0) == np.inf
    np.testing.assert_allclose(psnr(np.array([4.0, 0.4]), 2.0), [0, 10])


def test_images_are_clipped_and_latents_are_not() -> None:
    values = np.array([[[[-3.0, 0.5]]]], dtype=np.float32)
    assert shown(values, SPEC).tolist() == [[[[-1.0, 0.5]]]]
    assert shown(values, LATENT_SPEC) is values
    assert peak(values, SPEC) == 2.0
    assert peak(values, LATENT_SPEC) == 3.5


@pytest.mark.parametrize("size", [8, 32])
def test_ssim(size: int) -> None:
    one = images(0, 5, 1, size, size)
    np.testing.assert_allclose(ssim(one, one, 2.0), 1, atol=1e-6)
    noisy = ssim(one + images(1, *one.shape), one, 2.0)
    assert noisy.shape == (5,)
    assert (noisy < 0.95).all()


def test_fid_small_of_two_normals_is_the_formula() -> None:
    generator = np.random.default_rng(0)
    real = generator.normal(size=(20_000, 3)).astype(np.float32)
    shifted = generator.normal(loc=2.0, scale=3.0, size=(20_000, 3))
    # |mean difference|^2 + trace(S1 + S2 - 2 sqrt(S1 S2)) with unit and ninefold covariance
    assert Distances(real).fid_small(shifted) == pytest.approx(3 * 4 + 3 * (1 + 9 - 2 * 3), rel=0.03)
    assert Distances(real).fid_small(real) == pytest.approx(0, abs=1e-6)


def test_kid_scatters_around_zero_without_a_distance() -> None:
    generator = np.random.default_rng(0)
    distances = Distances(generator.normal(size=(2000, 16)).astype(np.float32))
    same = [distances.kid(generator.normal(size=(200, 16))) for _ in range(10)]
    far = distances.kid(generator.normal(loc=1.0, size=(200, 16)))
    assert abs(np.mean(same)) < far / 20
    assert distances.kid(same_values := generator.normal(size=(200, 16))) == distances.kid(same_values)


def test_the_floor_is_that_of_disjoint_parts() -> None:
    real = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    small, large = real_floor(real, 50), real_floor(real, 300)
    assert small["fid_small"] > large["fid_small"] > 0  # it falls with the sample size


def test_metrics_by_default() -> None:
    assert [metric.name for metric in choose_metrics(None, judged=True, model="m")] == list(METRICS)
    assert [metric.name for metric in choose_metrics(None, judged=False, model="m")] == ["psnr", "ssim", "latent_error"]


def test_metrics_that_do_not_exist_or_apply() -> None:
    with pytest.raises(UsageError, match="unknown metric 'fid'") as caught:
        choose_metrics(["fid"], judged=True, model="m")
    assert "fid_small" in str(caught.value.hint)
    with pytest.raises(UsageError, match="feature network"):
        choose_metrics(["fid_small"], judged=False, model="m")


def test_too_few_samples_are_refused_with_the_number_needed() -> None:
    metrics = choose_metrics(["psnr", "fid_small"], judged=True, model="m")
    with pytest.raises(UsageError, match="FID-small needs at least 128 samples of each seed, not 100") as caught:
        check_samples(metrics, 100, 64)
    assert caught.value.hint == "use --samples 128, or only ask for --metrics psnr"
    assert check_samples(metrics, 128, 64) == 128
    assert check_samples(metrics, None, 64) == 128
