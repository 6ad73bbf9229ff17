"""Metrics of generated samples: closed forms, definitions by brute force, independent libraries, bad input."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats
from torch import Tensor

import kd_diffusion.metrics._sets as sets
from kd_diffusion.metrics import (
    FeatureNet,
    attribute_rates,
    class_accuracy,
    density_coverage,
    diversity,
    diversity_ratio,
    energy_distance,
    frechet_distance,
    kernel_distance,
    mode_coverage,
    prdc,
    precision_recall,
    seconds_per_sample,
    sliced_wasserstein,
    train_features,
    variance_ratio,
)
from kdcore.errors import InputError
from kdcore.losses import mmd

DISTANCES = [frechet_distance, kernel_distance, energy_distance, sliced_wasserstein]


def normal(seed: int, rows: int, columns: int, *, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.fixture
def small_blocks(monkeypatch):
    """Distances come in blocks of few rows, so that their seams are met."""
    monkeypatch.setattr(sets, "BLOCK_BYTES", 8 * 40 * 3)


# ---------------------------------------------------------------- Fréchet distance


def test_frechet_of_moments_by_scipy():
    x, y = normal(0, 80, 6) @ normal(1, 6, 6), normal(2, 50, 6, shift=0.4)
    cov_x, cov_y = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = linalg.sqrtm(cov_x @ cov_y).real
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(cov_x + cov_y - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_two_gaussians_in_closed_form():
    # For commuting covariances: |m|^2 + sum_i (s_i - r_i)^2. The sample is whitened, so its moments are exact.
    white = normal(0, 200, 3)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / 199)).T
    s, r, m = torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, 0.1], [1.0, -2.0, 0.0]], dtype=torch.float64)
    assert frechet_distance(white * s + m, white * r) == pytest.approx(5 + 4 + 0.16, rel=1e-10)


def test_frechet_of_equal_sets_is_zero_even_where_the_covariance_is_singular():
    flat = normal(0, 20, 4) @ normal(1, 4, 64)  # rank 4 of 64
    assert frechet_distance(flat, flat) < 1e-10 * float(flat.square().mean())
    assert frechet_distance(flat + 1, flat) == pytest.approx(64, rel=1e-10)


# ---------------------------------------------------------------- kernel distance


def test_kernel_distance_by_its_definition():
    x, y = normal(0, 9, 3).numpy(), normal(1, 7, 3, shift=1).numpy()

    def mean(a, b, skip):
        values = [(p @ q / 3 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not (skip and i == j)]
        return np.mean(values)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_in_blocks_estimates_the_same(monkeypatch):
    x, y = normal(0, 600, 4), normal(1, 500, 4, shift=0.5)
    whole = kernel_distance(x, y)
    assert whole == pytest.approx(float(mmd(x, y, "poly", unbiased=True)))
    monkeypatch.setattr("kd_diffusion.metrics.features.KERNEL_BLOCK", 100)
    parts = [kernel_distance(x, y, seed=seed) for seed in range(20)]
    assert len(set(parts)) > 1
    assert kernel_distance(x, y, seed=3) == parts[3]
    assert np.mean(parts) == pytest.approx(whole, abs=4 * np.std(parts) / math.sqrt(20))
    assert math.isfinite(kernel_distance(x, y[:3]))  # a small set allows one block only


def test_kernel_distance_of_sets_sorted_by_class_deals_the_classes_to_every_block(monkeypatch):
    x = torch.cat((normal(0, 200, 2), normal(1, 200, 2, shift=4)))
    y = torch.cat((normal(2, 200, 2, shift=4), normal(3, 200, 2)))  # the same mixture, the other order
    monkeypatch.setattr("kd_diffusion.metrics.features.KERNEL_BLOCK", 200)
    assert abs(kernel_distance(x, y)) < 0.05 * kernel_distance(x[:200], y[:200])


# ---------------------------------------------------------------- precision, recall, density, coverage


def brute_prdc(samples: Tensor, reference: Tensor, k: int) -> tuple[float, float, float, float]:
    """The definitions, pair by pair."""
    y, x = samples.numpy(), reference.numpy()

    def ball(points, i):
        others = sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)
        return others[k - 1]

    balls_x, balls_y = [ball(x, i) for i in range(len(x))], [ball(y, j) for j in range(len(y))]
    inside = [[np.linalg.norm(p - q) <= r for q in y] for p, r in zip(x, balls_x, strict=True)]
    precision = np.mean([any(row[j] for row in inside) for j in range(len(y))])
    recall = np.mean([any(np.linalg.norm(p - q) <= r for q, r in zip(y, balls_y, strict=True)) for p in x])
    return precision, recall, np.sum(inside) / (k * len(y)), np.mean([any(row) for row in inside])


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(("n", "m"), [(20, 20), (31, 12), (8, 40)])
def test_prdc_by_its_definitions(small_blocks, n, m, k):
    y, x = normal(n, n, 2, shift=0.7), normal(m + 100, m, 2)
    found = prdc(y, x, k)
    assert found == pytest.approx(brute_prdc(y, x, k))
    assert precision_recall(y, x, k) == (found.precision, found.recall)
    assert density_coverage(y, x, k) == (found.density, found.coverage)


def test_prdc_of_a_set_with_itself():
    x = normal(0, 50, 3)
    assert prdc(x, x, 4) == (1.0, 1.0, 5 / 4, 1.0)  # a closed ball holds its centre and k neighbours


def test_prdc_of_sets_far_apart_and_of_a_collapsed_one():
    x = normal(0, 50, 3)
    assert prdc(x + 100, x, 3) == (0.0, 0.0, 0.0, 0.0)
    collapsed = prdc(x[:1].repeat(50, 1), x, 3)
    assert collapsed.precision == 1.0
    assert collapsed.recall == 1 / 50
    assert collapsed.coverage < 0.2


def test_density_and_coverage_of_equal_distributions_have_the_expectations_of_the_paper():
    # Lemmas 1 and 2 of arXiv 2002.09797: E density = 1, E coverage = 1 - prod_{i<k} (M - 1 - i) / (N + M - 1 - i).
    n, m, k, trials = 60, 50, 3, 60
    found = np.array([density_coverage(normal(2 * t, n, 4), normal(2 * t + 1, m, 4), k) for t in range(trials)])
    expected = 1.0, 1 - math.prod((m - 1 - i) / (n + m - 1 - i) for i in range(k))
    error = found.std(0) / math.sqrt(trials)
    assert np.abs(found.mean(0) - expected) == pytest.approx(0, abs=4 * error.max())


# ---------------------------------------------------------------- diversity


def test_diversity_by_its_definition(small_blocks):
    x, labels = normal(0, 12, 3), torch.tensor([0, 1, 2] * 4)
    expected = {
        c: np.mean([float((a - b).norm()) for i, a in enumerate(x[c::3]) for j, b in enumerate(x[c::3]) if i != j])
        for c in range(3)
    }
    assert diversity(x, labels) == pytest.approx(expected)
    assert diversity(x, torch.tensor([0] * 11 + [7])).keys() == {0}
    assert diversity(x)[0] == pytest.approx(diversity(x, torch.zeros(12, dtype=torch.long))[0])


def test_ratios_of_diversity_and_variance():
    x, labels = normal(0, 40, 5).view(40, 5, 1, 1), torch.tensor([0, 1] * 20)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)[labels].view(-1, 1, 1, 1)
    assert diversity_ratio(x * scale, x, labels, labels) == pytest.approx({0: 0.5, 1: 2.0})
    assert variance_ratio(x * scale, x, labels, labels) == pytest.approx({0: 0.25, 1: 4.0})
    assert variance_ratio(x * 0 + 1, x) == {0: 0.0}
    assert diversity_ratio(x, x, labels, torch.ones(40, dtype=torch.long)).keys() == {1}
    with pytest.raises(InputError, match="reference: all samples of class 0 are equal"):
        variance_ratio(x, x * 0)
    with pytest.raises(InputError, match="no class has two samples in both sets"):
        diversity_ratio(x, x, labels, labels + 2)
    with pytest.raises(InputError, match="no class has two samples"):
        diversity(x, torch.arange(40))


# ---------------------------------------------------------------- points


def test_energy_distance_agrees_with_scipy_in_one_dimension(small_blocks):
    x, y = normal(0, 40, 1), normal(1, 25, 1, shift=0.3)
    expected = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert energy_distance(x, y, squared=False) == pytest.approx(expected, rel=1e-10)
    assert energy_distance(x, y) == pytest.approx(expected**2, rel=1e-10)


def test_energy_distance_of_two_gaussians_in_closed_form():
    # E|N(m, s^2)| = s sqrt(2/pi) exp(-m^2 / 2 s^2) + m erf(m / s sqrt(2)), here with s = sqrt(2) for the difference.
    # At the quantiles of the law instead of random draws the sums over pairs are a quadrature.
    quantiles = torch.tensor(stats.norm.ppf((np.arange(2000) + 0.5) / 2000))[:, None]
    m = 1.5
    cross = 2 / math.sqrt(math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)
    expected = 2 * cross - 4 / math.sqrt(math.pi)
    assert energy_distance(quantiles + m, quantiles) == pytest.approx(expected, rel=1e-3)


def test_sliced_wasserstein_agrees_with_scipy_in_one_dimension():
    x, y = normal(0, 30, 1), normal(1, 17, 1, shift=0.3)
    expected = stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert sliced_wasserstein(x, y, projections=3, order=1) == pytest.approx(expected, rel=1e-10)
    repeated = sliced_wasserstein(x.repeat(17, 1), y.repeat(30, 1), projections=3)
    assert sliced_wasserstein(x, y, projections=3) == pytest.approx(repeated, rel=1e-10)


def test_sliced_wasserstein_of_a_translation():
    # W_2 along u is |<u, m>|, and E <u, m>^2 = |m|^2 / D over the sphere.
    x, m = normal(0, 50, 3), torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    assert sliced_wasserstein(x + m, x, projections=20_000) == pytest.approx(3 / math.sqrt(3), rel=0.02)


MEANS = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)


def test_modes_that_are_all_there():
    points = MEANS.repeat(2000, 1) + normal(0, 6000, 2, scale=0.5)
    found = mode_coverage(points.view(-1, 2, 1, 1), MEANS, 0.5)
    assert found.coverage == 1.0
    assert found.shares.tolist() == pytest.approx([1 / 3] * 3)
    assert found.kl == pytest.approx(0, abs=1e-12)
    # Within 3 std of a 2-D Gaussian: 1 - exp(-9/2); four standard errors around it.
    inside = 1 - math.exp(-4.5)
    assert found.precision == pytest.approx(inside, abs=4 * math.sqrt(inside * (1 - inside) / 6000))
    assert set(found.metrics()) == {"mode_coverage", "mode_kl", "mode_precision"}


def test_a_mode_that_is_missing_one_that_is_rare_and_points_between():
    points = torch.cat((MEANS[:1].repeat(90, 1), MEANS[1:2].repeat(2, 1), torch.tensor([[0.0, 5.5]] * 8)))
    found = mode_coverage(points, MEANS, 0.5, [0.5, 0.25, 0.25], threshold=0.1)
    assert found.covered.tolist() == [True, False, False]
    assert found.coverage == pytest.approx(1 / 3)
    assert found.shares.tolist() == pytest.approx([0.9, 0.02, 0.08])
    assert found.precision == pytest.approx(0.92)
    expected = sum(p * math.log(p / w) for p, w in ((0.9, 0.5), (0.02, 0.25), (0.08, 0.25)))
    assert found.kl == pytest.approx(expected)
    assert mode_coverage(points, MEANS, 0.5, threshold=0.01).covered.tolist() == [True, True, False]
    assert mode_coverage(points, MEANS, [0.5, 0.5, 2.0]).precision == 1.0
    lone = mode_coverage(points[:5], MEANS, 0.5)
    assert lone.kl == pytest.approx(math.log(3))


# ---------------------------------------------------------------- properties

seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("distance", DISTANCES)
@given(seed=seeds, n=st.integers(2, 12), m=st.integers(2, 12), d=st.integers(1, 4))
@settings(max_examples=25)
def test_distances_are_symmetric_blind_to_order_and_not_below_zero(distance, seed, n, m, d):
    x, y = normal(seed, n, d, shift=0.5), normal(seed + 1, m, d)
    value = distance(x, y)
    tolerance = 1e-6  # a root of rounding errors
    assert distance(y, x) == pytest.approx(value, abs=tolerance)
    assert distance(x.flip(0), y.roll(1, 0)) == pytest.approx(value, abs=tolerance)
    if distance is not kernel_distance:  # unbiased, so it may be negative
        assert value >= 0
        assert distance(x, x.flip(0)) == pytest.approx(0, abs=tolerance)


@given(seed=seeds, n=st.integers(4, 14), m=st.integers(4, 14), k=st.integers(1, 3))
@settings(max_examples=40)
def test_prdc_is_blind_to_order_and_exchanges_precision_and_recall(seed, n, m, k):
    y, x = normal(seed, n, 3, shift=0.5), normal(seed + 1, m, 3)
    found, exchanged = prdc(y, x, k), prdc(x, y, k)
    assert prdc(y.flip(0), x.roll(2, 0), k) == pytest.approx(found)
    assert (exchanged.precision, exchanged.recall) == (found.recall, found.precision)
    assert all(0 <= value <= 1 for value in (found.precision, found.recall, found.coverage))
    assert 0 <= found.density <= m / k
    assert prdc(4 * y + 1, 4 * x + 1, k) == pytest.approx(found)  # a power of two rounds nothing


@pytest.mark.parametrize("metric", [*DISTANCES, partial(prdc, k=2), diversity_ratio, variance_ratio])
def test_bad_sets_are_refused_by_name(metric):
    x = normal(0, 6, 3)
    broken = x.clone()
    broken[2, 1] = math.nan
    with pytest.raises(InputError, match="samples: given 2 values a sample, allowed: 3 as in reference"):
        metric(x[:, :2], x)
    with pytest.raises(InputError, match="samples: 1 of 6 samples hold NaN"):
        metric(broken, x)
    with pytest.raises(InputError, match="reference: 1 of 6"):
        metric(x, broken)
    with pytest.raises(InputError, match="samples: given 0 samples"):
        metric(x[:0], x)
    with pytest.raises(InputError, match=r"samples: given \(6,\) torch.float64"):
        metric(x[:, 0], x)
    with pytest.raises(InputError, match=r"reference: given \(6, 3\) torch.int64"):
        metric(x, x.long())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: prdc(x, x, 6), "k: given 6 with 6 samples"),
        (lambda x: prdc(x, x[:4], 5), "k: given 5 with 4 reference"),
        (lambda x: prdc(x, x, 0), "k: given 0"),
        (lambda x: prdc(x, x, 2.0), "k: given 2.0"),
        (lambda x: frechet_distance(x[:1], x), "samples: given 1 samples, allowed: at least 2"),
        (lambda x: kernel_distance(x, x[:1]), "reference: given 1 samples, allowed: at least 2"),
        (lambda x: sliced_wasserstein(x, x, projections=0), "projections: given 0"),
        (lambda x: sliced_wasserstein(x, x, order=0.5), "order: given 0.5"),
        (lambda x: mode_coverage(x, x, 0.0), "std: given 0.0"),
        (lambda x: mode_coverage(x, x, [1.0, 2.0]), "std: given .*allowed: one or 6 positive"),
        (lambda x: mode_coverage(x, x, 1.0, [1.0] * 5 + [-1.0]), "weights: given"),
        (lambda x: mode_coverage(x, x, 1.0, radius=0.0), "radius: given 0.0"),
        (lambda x: mode_coverage(x, x, 1.0, threshold=math.nan), "threshold: given nan"),
        (lambda x: diversity(x, torch.zeros(5, dtype=torch.long)), r"labels: given \(5,\)"),
        (lambda x: diversity(x, torch.zeros(6)), "labels: given .* torch.float32"),
        (lambda x: class_accuracy(x, torch.tensor([0, 1, 2, 3, 0, 0])), "labels: given 0 to 3, allowed: 0 to 2"),
        (lambda x: class_accuracy(x[0], torch.zeros(3, dtype=torch.long)), "logits: given"),
        (lambda x: attribute_rates(x, {"a": lambda z: z[:, 0]}), "predicates.a: given .*float64"),
        (lambda x: attribute_rates(x[:0], {}), "samples: given"),
        (lambda x: seconds_per_sample(lambda n: None, 0), "count: given 0"),
        (lambda x: seconds_per_sample(lambda n: None, 1, repeats=0), "repeats: given 0"),
        (lambda x: FeatureNet(1, 4, 10), "image_size: given 4, allowed: an integer >= 8"),
        (lambda x: FeatureNet(1, 8, 1), "num_classes: given 1"),
        (lambda x: train_features(x, torch.zeros(6), 2), r"pixels: given \(6, 3\)"),
        (lambda x: train_features(x.view(6, 3, 1, 1), torch.tensor([0, 2] * 3), 2), "labels: given 0 to 2"),
        (lambda x: train_features(x.view(6, 3, 1, 1), torch.tensor([0, 1] * 3), 2, steps=0), "steps: given 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(InputError, match=message):
        call(normal(0, 6, 3))
