"""Distances agree with mpmath, with a closed form at 2048 dimensions, and with the packages that people publish numbers with."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from t2i_experts.evaluation.frechet import FEWEST_TO_EXTRAPOLATE, frechet_distance, frechet_infinity, gaussian_distance
from t2i_experts.evaluation.kid import kernel_distance
from t2i_experts.evaluation.precision_recall import precision_recall
from t2i_experts.evaluation.statistics import FeatureStatistics, Gaussian


def features(count: int, dimension: int, seed: int, decades: float = 1.0) -> Tensor:
    """Correlated, with scales over some powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))[0]
    scales = torch.logspace(0, -decades, dimension, dtype=torch.float64)
    rows = torch.randn(count, dimension, generator=generator, dtype=torch.float64) * scales @ mixed
    return rows + 0.1 * torch.randn(dimension, generator=generator, dtype=torch.float64)


def gaussian(rows: Tensor) -> Gaussian:
    statistics = FeatureStatistics(rows.shape[1])
    statistics.add(rows)
    return statistics.gaussian()


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), torch.cov(rows.T)


def with_fifty_digits(first: Tensor, second: Tensor) -> float:
    """By the eigenvalues of C1^(1/2) C2 C1^(1/2), from the features themselves."""
    with mpmath.workdps(50):
        (mean1, cov1), (mean2, cov2) = (_moments_with_fifty_digits(rows) for rows in (first, second))
        values, vectors = mpmath.eigsy(cov1)
        root = vectors * mpmath.diag([mpmath.sqrt(max(value, 0)) for value in values]) * vectors.T
        overlap = sum(mpmath.sqrt(max(value, 0)) for value in mpmath.eigsy(root * cov2 * root, eigvals_only=True))
        apart = sum((a - b) ** 2 for a, b in zip(mean1, mean2, strict=True))
        return float(apart + sum(cov1[i, i] + cov2[i, i] for i in range(len(mean1))) - 2 * overlap)


def _moments_with_fifty_digits(rows: Tensor) -> tuple[mpmath.matrix, mpmath.matrix]:
    count, dimension = rows.shape
    values = mpmath.matrix(rows.tolist())
    mean = mpmath.matrix([mpmath.fsum(values[:, i]) / count for i in range(dimension)])
    centred = values - mpmath.ones(count, 1) * mean.T
    return mean, centred.T * centred / (count - 1)


@pytest.mark.parametrize("decades", [0.5, 2, 4])
def test_it_is_the_exact_distance_to_ten_digits(decades: float) -> None:
    first, second = features(60, 16, 1, decades), features(90, 16, 2, decades)
    assert frechet_distance(*moments(first), *moments(second)) == pytest.approx(with_fifty_digits(first, second), rel=1e-10)


def test_2048_dimensions_with_a_known_distance() -> None:
    """C2 = T C1 T with a positive T is the image of C1 under the optimal map, and the last trace is tr T C1 (Olkin, Pukelsheim 1982)."""
    generator = torch.Generator().manual_seed(0)
    mirror = torch.randn(2, 2048, 1, generator=generator, dtype=torch.float64)
    mirror /= mirror.norm(dim=1, keepdim=True)

    def turned(scales: Tensor, axis: Tensor) -> Tensor:
        """The diagonal matrix of these scales, mirrored at the plane across an axis."""
        reflected = torch.diag(scales) - 2 * axis @ (axis.T * scales)
        return reflected - 2 * (reflected @ axis) @ axis.T

    first = turned(torch.logspace(1, -5, 2048, dtype=torch.float64), mirror[0])
    mapped = turned(torch.linspace(0.5, 1.5, 2048, dtype=torch.float64), mirror[1])
    second = mapped @ first @ mapped
    mean = torch.randn(2048, generator=generator, dtype=torch.float64)
    exact = float(mean.square().sum() + first.trace() + second.trace() - 2 * (mapped * first).sum())
    assert frechet_distance(mean, first, torch.zeros(2048), second) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("counts", [(10, 14), (10, 200), (200, 10), (24, 25), (3, 3)])
def test_fewer_images_than_dimensions(counts: tuple[int, int]) -> None:
    """From the images, and from the singular covariances alone."""
    first, second = features(counts[0], 24, 1), features(counts[1], 24, 2)
    exact = with_fifty_digits(first, second)
    assert gaussian_distance(gaussian(first), gaussian(second)) == pytest.approx(exact, rel=1e-10)
    assert frechet_distance(*moments(first), *moments(second)) == pytest.approx(exact, rel=1e-10)


def test_simple_properties() -> None:
    one, two = moments(features(50, 8, 1)), moments(features(40, 8, 2))
    assert frechet_distance(*one, *one) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-12)
    assert frechet_distance(one[0], one[1], one[0] + 2, one[1]) == pytest.approx(32, rel=1e-12)
    constant = torch.zeros(8, 8)
    assert frechet_distance(one[0], constant, one[0], one[1]) == pytest.approx(float(one[1].trace()), rel=1e-12)
    same = features(12, 24, 1)
    assert gaussian_distance(gaussian(same), gaussian(same)) == pytest.approx(0, abs=1e-12)


def test_it_is_pytorch_fids_number() -> None:
    sets = moments(features(300, 48, 1)), moments(features(200, 48, 2))
    theirs = calculate_frechet_distance(*(array.numpy() for pair in sets for array in pair))
    assert frechet_distance(*sets[0], *sets[1]) == pytest.approx(float(theirs), rel=1e-7)


def test_what_cannot_be_compared_is_named() -> None:
    mean, cov = moments(features(50, 4, 1))
    for arguments, said in (
        ((mean, cov, *moments(features(50, 5, 1))), "first set has features of 4 dimensions, the second of 5"),
        ((mean[:3], cov, mean, cov), r"the first set: mean of shape \(3,\) and covariance of shape \(4, 4\)"),
        ((mean, cov, mean * torch.nan, cov), "the second set: its mean holds NaN"),
        ((mean, -cov, mean, cov), "the first set: its covariance has the negative eigenvalue -"),
        ((mean, cov.tril(), mean, cov), "the first set: its covariance is not symmetric"),
    ):
        with pytest.raises(ValueError, match=said):
            frechet_distance(*arguments)


def test_infinitely_many_images_have_the_true_distance() -> None:
    """Of two normal distributions, which is known: 400 images have too large a one, and the extrapolation takes most of that off."""
    dimension = 32
    reference = Gaussian(torch.zeros(dimension, dtype=torch.float64), torch.eye(dimension, dtype=torch.float64))
    generator = torch.Generator().manual_seed(3)
    found = [frechet_infinity(1.5 * torch.randn(400, dimension, generator=generator), reference, points=8, seed=i) for i in range(5)]
    true = dimension * 0.5**2
    assert [len(result.distances) for result in found] == [8] * 5
    biased = np.mean([result.distances[-1] for result in found]) - true
    assert biased > 0.5
    assert abs(np.mean([result.value for result in found]) - true) < 0.25 * biased
    slope, intercept = np.polyfit(1 / np.array(found[0].counts), found[0].distances, 1)
    covariance = np.polyfit(1 / np.array(found[0].counts), found[0].distances, 1, cov=True)[1]
    assert found[0].value == pytest.approx(intercept, rel=1e-8) and slope > 0
    assert found[0].error == pytest.approx(covariance[1, 1] ** 0.5, rel=1e-8)
    with pytest.raises(ValueError, match="5 images are too few for 15 different counts"):
        frechet_infinity(torch.zeros(5, dimension), reference)
    assert len(frechet_infinity(torch.randn(FEWEST_TO_EXTRAPOLATE, dimension), reference).counts) == 15


@pytest.mark.parametrize("size", [30, 1000])
def test_the_kernel_distance_is_torch_fidelitys(size: int) -> None:
    first, second = features(70, 32, 1).float(), features(50, 32, 2).float()
    settings = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    theirs = kid_features_to_metric(
        first.double(), second.double(), kid_subsets=7, kid_subset_size=min(size, 50), rng_seed=2020, verbose=False, **settings
    )
    ours = kernel_distance(first, second, subsets=7, size=size)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours.spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)
    assert (ours.subsets, ours.size) == (7, min(size, 50))


def test_precision_and_recall_are_torch_fidelitys() -> None:
    generated, reference = 0.6 * torch.randn(120, 4), torch.randn(90, 4)
    for k in (1, 3):
        theirs = prc_features_to_metric(generated, reference, prc_neighborhood=k, prc_batch_size=50, save_cpu_ram=False, verbose=False)
        ours = precision_recall(generated, reference, neighbours=k)
        assert ours.precision == pytest.approx(theirs["precision"], abs=1e-6)
        assert ours.recall == pytest.approx(theirs["recall"], abs=1e-6)
        assert ours.precision > ours.recall
    for metric in (kernel_distance, precision_recall):
        with pytest.raises(ValueError, match=r"\(120, 4\) and \(90, 3\)"):
            metric(generated, reference[:, :3])
        with pytest.raises(ValueError, match=r"image 0 .* of the second set hold NaN"):
            metric(generated, reference * torch.nan)
    with pytest.raises(ValueError, match="at least 4 are needed"):
        precision_recall(generated, reference[:3])


def test_precision_and_recall_know_no_offset() -> None:
    """Features far from zero, which float32 still tells apart: the squares of distances would not."""
    generator = torch.Generator().manual_seed(0)
    generated, reference = 0.7 * torch.randn(200, 64, generator=generator), torch.randn(200, 64, generator=generator)
    expected = precision_recall(generated, reference)
    assert precision_recall(generated + 1e4, reference + 1e4) == expected
    assert precision_recall(reference, reference).precision == precision_recall(reference, reference).recall == 1
