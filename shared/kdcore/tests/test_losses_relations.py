"""Relations and MMD: triple loops and numpy by the definitions, invariances, unbiasedness, gradients, extremes."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore import losses

seeds = st.integers(0, 10**6)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def orthogonal(n, seed):
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def huber(d):
    return 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5


def test_rkd_distance_by_loops():
    s, t = 3 * normal(5, 2, seed=1), normal(5, 4, seed=2)
    s[4] += 20  # makes some differences larger than the Huber corner
    pairs = list(itertools.permutations(range(5), 2))

    def scaled(x):
        d = {(i, j): math.dist(x[i].tolist(), x[j].tolist()) for i, j in pairs}
        mean = sum(d.values()) / len(d)
        return {key: value / mean for key, value in d.items()}

    a, b = scaled(s), scaled(t)
    assert max(abs(a[k] - b[k]) for k in pairs) > 1
    expected = sum(huber(a[k] - b[k]) for k in pairs) / len(pairs)
    assert losses.rkd_distance(s, t).item() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("coincident", [False, True])
def test_rkd_angle_by_loops(coincident):
    s, t = normal(5, 3, seed=1).numpy(), normal(5, 4, seed=2).numpy()
    if coincident:
        s[1] = s[0]  # no direction between 0 and 1: cosine 0 there, and nothing from repeated indices

    def cosine(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        norms = math.sqrt((a @ a) * (b @ b))
        return float(a @ b / norms) if norms else 0.0

    triples = list(itertools.permutations(range(5), 3))
    expected = sum(huber(cosine(s, *m) - cosine(t, *m)) for m in triples) / len(triples)
    value = losses.rkd_angle(torch.from_numpy(s), torch.from_numpy(t))
    assert value.item() == pytest.approx(expected, abs=1e-13)


@given(seed=seeds, scale=st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_rkd_ignores_rotation_scale_and_shift(seed, scale):
    s, t = normal(6, 4, seed=seed), normal(6, 3, seed=seed + 1)
    moved = scale * s @ orthogonal(4, seed + 2) + normal(4, seed=seed + 3)
    for function in (losses.rkd_distance, losses.rkd_angle):
        torch.testing.assert_close(function(moved, t), function(s, t), atol=1e-11, rtol=1e-9)
        assert function(moved, s).abs() < 1e-20 + 1e-13
        torch.testing.assert_close(function(s, t), function(t, s), atol=1e-14, rtol=0)


def test_rkd_with_coincident_examples_is_finite():
    s = torch.zeros(4, 3, requires_grad=True)
    t = normal(4, 3, dtype=torch.float32)
    t[1] = t[0]
    for function in (losses.rkd_distance, losses.rkd_angle):
        value = function(s, t)
        (gradient,) = torch.autograd.grad(value, s)
        assert torch.isfinite(value)
        assert (gradient == 0).all()


def test_similarity_preserving_by_numpy():
    s, t = normal(4, 3, 2, seed=1), normal(4, 5, seed=2)
    grams = []
    for x in (s.numpy().reshape(4, -1), t.numpy()):
        g = np.array([[x[i] @ x[j] for j in range(4)] for i in range(4)])
        grams.append(g / np.linalg.norm(g, axis=1, keepdims=True))
    expected = np.linalg.norm(grams[0] - grams[1], "fro") ** 2 / 16
    assert losses.similarity_preserving(s, t).item() == pytest.approx(expected, abs=1e-14)


@given(seed=seeds, scale=st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_similarity_preserving_ignores_rotation_and_scale(seed, scale):
    s, t = normal(5, 4, seed=seed), normal(5, 3, seed=seed + 1)
    value = losses.similarity_preserving(s, t)
    torch.testing.assert_close(
        losses.similarity_preserving(scale * s @ orthogonal(4, seed), t), value, atol=1e-12, rtol=1e-9
    )
    assert losses.similarity_preserving(s, scale * s) < 1e-20


def test_pearson_by_numpy():
    x, y = normal(3, 7, seed=1), normal(3, 7, seed=2)
    expected = [np.corrcoef(x[i], y[i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(losses.pearson_correlation(x, y).numpy(), expected, atol=1e-14)
    np.testing.assert_allclose(losses.pearson_correlation(x.T, y.T, dim=0).numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("constant", [0.0, 0.1, 100.1])
def test_pearson_of_a_constant_is_zero_without_gradient(constant):
    x = torch.full((1, 7), constant, requires_grad=True)
    rho = losses.pearson_correlation(x, normal(1, 7, dtype=torch.float32))
    rho.sum().backward()
    assert rho.item() == 0
    assert (x.grad == 0).all()


def test_cka_of_the_distill_nearest_spec():
    f = torch.tensor([[1, 0, 2], [2, 0, 2], [0, 3, 1], [0, 2, 0]], dtype=torch.float64)
    y = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=torch.float64)
    assert losses.cka_linear(f, y).item() == pytest.approx(0.9810807923, abs=1e-10)


@pytest.mark.parametrize("widths", [(3, 2), (3, 40), (40, 30)])  # 12 rows: feature side, then Gram side twice
def test_cka_by_centring_matrix(widths):
    x, y = normal(12, widths[0], seed=1).numpy(), normal(12, widths[1], seed=2).numpy()
    h = np.eye(12) - np.ones((12, 12)) / 12
    hsic = lambda a, b: np.trace(a @ a.T @ h @ b @ b.T @ h)  # noqa: E731
    expected = hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    value = losses.cka_linear(torch.from_numpy(x), torch.from_numpy(y))
    assert value.item() == pytest.approx(expected, abs=1e-13)


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_cka_ignores_rotation_scale_and_shift(seed, scale):
    x, y = normal(8, 4, seed=seed), normal(8, 3, seed=seed + 1)
    moved = scale * x @ orthogonal(4, seed + 2) + normal(4, seed=seed + 3)
    for function in (losses.cka_linear, losses.cka_unbiased):
        torch.testing.assert_close(function(moved, y), function(x, y), atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(function(y, x), function(x, y), atol=1e-13, rtol=0)
        assert function(moved, x).item() == pytest.approx(1.0, abs=1e-10)
    assert 0 <= losses.cka_linear(x, y) <= 1


def hsic_by_loops(k, l):
    """HSIC_1 as the U-statistic it is: averages of products over 2, 3 and 4 distinct indices."""
    n = len(k)
    mean = lambda r, f: np.mean([f(*m) for m in itertools.permutations(range(n), r)])  # noqa: E731
    return (
        mean(2, lambda i, j: k[i, j] * l[i, j])
        + mean(4, lambda i, j, q, r: k[i, j] * l[q, r])
        - 2 * mean(3, lambda i, j, q: k[i, j] * l[i, q])
    )


def test_hsic_is_the_u_statistic():
    x, y = normal(6, 3, seed=1), normal(6, 2, seed=2)
    k, l = x @ x.T, y @ y.T
    expected = hsic_by_loops(k.numpy(), l.numpy())
    assert losses.hsic_unbiased(k, l).item() == pytest.approx(expected, abs=1e-13)
    xy, xx, yy = (hsic_by_loops(a.numpy(), b.numpy()) for a, b in ((k, l), (k, k), (l, l)))
    assert losses.cka_unbiased(x, y).item() == pytest.approx(xy / math.sqrt(xx * yy), abs=1e-12)


def test_hsic_over_all_subsets_averages_to_the_whole():
    """Unbiased exactly: the mean over every sub-batch of 5 out of 8 is the value of all 8 (a U-statistic); the biased
    estimator's is not."""
    x, y = normal(8, 3, seed=3), normal(8, 2, seed=4)
    k, l = x @ x.T, y @ y.T
    h = torch.eye(5, dtype=torch.float64) - 1 / 5
    subsets = [list(c) for c in itertools.combinations(range(8), 5)]
    parts = [(k[c][:, c], l[c][:, c]) for c in subsets]
    unbiased = torch.stack([losses.hsic_unbiased(a, b) for a, b in parts]).mean()
    torch.testing.assert_close(unbiased, losses.hsic_unbiased(k, l), atol=1e-12, rtol=0)
    h8 = torch.eye(8, dtype=torch.float64) - 1 / 8
    biased = torch.stack([(a @ h @ b @ h).trace() / 16 for a, b in parts]).mean()
    assert (biased - (k @ h8 @ l @ h8).trace() / 49).abs() > 1e-3


def test_unbiased_cka_is_near_zero_for_independent_wide_features():
    values = [(normal(16, 500, seed=2 * i), normal(16, 500, seed=2 * i + 1)) for i in range(20)]
    biased = torch.stack([losses.cka_linear(x, y) for x, y in values]).mean()
    unbiased = torch.stack([losses.cka_unbiased(x, y) for x, y in values])
    assert biased > 0.9
    assert unbiased.mean().abs() < 3 * unbiased.std() / 20**0.5
    assert unbiased.abs().max() < 0.3


def test_minibatch_cka_over_random_splits_agrees_with_the_whole():
    x = normal(240, 6, seed=5)
    y = x[:, :3] @ normal(3, 4, seed=6) + normal(240, 4, seed=7)
    whole = losses.cka_unbiased(x, y).item()
    for size in (8, 24):
        values = []
        for seed in range(20):
            order = torch.randperm(240, generator=torch.Generator().manual_seed(seed))
            values.append(losses.cka_minibatch((x[i], y[i]) for i in order.split(size)).item())
        assert np.mean(values) == pytest.approx(whole, abs=0.02)
    torch.testing.assert_close(losses.cka_minibatch([(x, y)]), losses.cka_unbiased(x, y), atol=1e-12, rtol=0)


def test_minibatch_cka_is_the_ratio_of_mean_hsics():
    batches = [(normal(6, 3, seed=i), normal(6, 2, seed=i + 50)) for i in range(3)]
    mean = lambda f: np.mean([hsic_by_loops(*(g.numpy() for g in f(x @ x.T, y @ y.T))) for x, y in batches])  # noqa: E731
    xy, xx, yy = mean(lambda k, l: (k, l)), mean(lambda k, l: (k, k)), mean(lambda k, l: (l, l))
    assert losses.cka_minibatch(iter(batches)).item() == pytest.approx(xy / math.sqrt(xx * yy), abs=1e-12)


@pytest.mark.parametrize("function", [losses.cka_linear, losses.cka_unbiased])
@pytest.mark.parametrize("constant", [0.0, 0.1, 7.3])
def test_cka_of_constant_features_is_zero(function, constant):
    x = torch.full((7, 3), constant, requires_grad=True)
    value = function(x, torch.full((7, 2), 0.3))
    value.backward()
    assert value.item() == 0
    assert (x.grad == 0).all()


def test_unbiased_cka_of_a_simplex_is_zero():
    """One-hot rows that are all different: every off-diagonal similarity is equal, so there is no relation to match."""
    for dtype in (torch.float32, torch.float64):
        assert losses.cka_unbiased(torch.eye(7, dtype=dtype), normal(7, 3, dtype=dtype)).item() == 0


def test_cka_float32_survives_a_large_offset_and_any_scale():
    x, y = normal(32, 20, seed=1), normal(32, 10, seed=2)
    for function in (losses.cka_linear, losses.cka_unbiased):
        expected = function(x, y).item()
        for changed in (x.float() * 1e-15, x.float() * 1e15, x.float() + 100):
            assert function(changed, y.float()).item() == pytest.approx(expected, abs=2e-4)


def test_autocast_does_not_round_gram_matrices():
    x, y = normal(16, 8, seed=1, dtype=torch.float32), normal(16, 8, seed=2, dtype=torch.float32)
    functions = (
        losses.cka_linear,
        losses.cka_unbiased,
        losses.similarity_preserving,
        losses.rkd_angle,
        losses.rkd_distance,
        lambda x, y: losses.mmd(x, y, "poly"),
        lambda x, y: losses.mmd(x, y, "rbf"),
    )
    for function in functions:
        plain = function(x, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(function(x, y), plain, atol=1e-6, rtol=1e-6)


def mmd_by_loops(x, y, kernel, unbiased):
    def mean(a, b, skip):
        values = [kernel(a[i], b[j]) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        return sum(values) / len(values)

    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


KERNELS = {
    "linear": lambda a, b: float(a @ b),
    "poly": lambda a, b: float(a @ b / 3 + 1) ** 3,
    "rbf": lambda a, b: math.exp(-(math.dist(a, b) ** 2) / (2 * 1.5**2)),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_mmd_by_loops(kernel, unbiased):
    x, y = normal(5, 3, seed=1), 0.5 + normal(4, 3, seed=2)
    expected = mmd_by_loops(x.numpy(), y.numpy(), KERNELS[kernel], unbiased)
    assert losses.mmd(x, y, kernel, unbiased=unbiased, bandwidth=1.5).item() == pytest.approx(expected, abs=1e-12)


def test_mmd_poly_options():
    x, y = normal(5, 3, seed=1), normal(4, 3, seed=2)
    expected = mmd_by_loops(x.numpy(), y.numpy(), lambda a, b: float(a @ b / 3) ** 2, False)
    assert losses.mmd(x, y, "poly", degree=2, offset=0.0).item() == pytest.approx(expected, abs=1e-12)


def test_mmd_median_bandwidth():
    x, y = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[3.0]]).double()  # distances 1, 3, 2: median 2
    torch.testing.assert_close(losses.mmd(x, y, "rbf"), losses.mmd(x, y, "rbf", bandwidth=2.0), atol=1e-15, rtol=0)


@given(seed=seeds, shift=st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_mmd_properties(seed, shift):
    x, y = normal(6, 3, seed=seed), normal(5, 3, seed=seed + 1) + shift
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    for kernel in KERNELS:
        assert losses.mmd(x, y, kernel) >= -1e-12
        assert losses.mmd(x, x[order], kernel).abs() < 1e-11
        torch.testing.assert_close(losses.mmd(x, y, kernel), losses.mmd(y, x, kernel), atol=1e-9, rtol=1e-9)
    assert losses.mmd(x, y, "linear") == pytest.approx(((x.mean(0) - y.mean(0)) ** 2).sum().item(), abs=1e-12)


def test_unbiased_mmd_over_all_splits_averages_to_zero():
    """Under exchangeability the unbiased form has mean 0: exactly so over all splits of one sample into halves."""
    z = normal(8, 2, seed=9)
    for kernel in KERNELS:
        values, biased = [], []
        for c in itertools.combinations(range(8), 4):
            rest = [i for i in range(8) if i not in c]
            values.append(losses.mmd(z[list(c)], z[rest], kernel, unbiased=True, bandwidth=1.0))
            biased.append(losses.mmd(z[list(c)], z[rest], kernel, bandwidth=1.0))
        assert torch.stack(values).mean().abs() < 1e-12
        assert torch.stack(biased).mean() > 1e-3


GRADIENTS = {
    "rkd_distance": losses.rkd_distance,
    "rkd_angle": losses.rkd_angle,
    "similarity_preserving": losses.similarity_preserving,
    "pearson": lambda x, y: losses.pearson_correlation(x, y),
    "cka_linear_gram": losses.cka_linear,
    "cka_linear_features": lambda x, y: losses.cka_linear(x[:, :2], y[:, :2]),
    "cka_unbiased": losses.cka_unbiased,
    "cka_minibatch": lambda x, y: losses.cka_minibatch([(x, y), (2 * y, x.square())]),
    "mmd_linear": losses.mmd,
    "mmd_linear_unbiased": lambda x, y: losses.mmd(x, y, unbiased=True),
    "mmd_poly": lambda x, y: losses.mmd(x, y, "poly"),
    "mmd_rbf": lambda x, y: losses.mmd(x, y, "rbf", bandwidth=1.3, unbiased=True),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(name):
    x, y = normal(5, 6, seed=1).requires_grad_(), normal(5, 6, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(GRADIENTS[name], (x, y))


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_features_stay_finite(name, dtype, scale):
    x = (scale * normal(5, 6, seed=1)).to(dtype)
    x[0] = 0
    x.requires_grad_()
    value = GRADIENTS[name](x, normal(5, 6, seed=2).to(dtype)).sum()
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()


def test_messages():
    x = torch.zeros(5, 3)
    for function in (losses.rkd_distance, losses.rkd_angle, losses.similarity_preserving):
        with pytest.raises(ValueError, match=r"teacher has 4 examples but student has 5"):
            function(x, x[:4])
        with pytest.raises(ValueError, match=r"student has dtype torch.int64"):
            function(x.long(), x)
    for function in (losses.cka_linear, losses.cka_unbiased, lambda a, b: losses.cka_minibatch([(a, b)])):
        with pytest.raises(ValueError, match=r"y has 4 examples but x has 5"):
            function(x, x[:4])
    for function, least in ((losses.rkd_distance, 2), (losses.rkd_angle, 3), (losses.cka_unbiased, 4)):
        with pytest.raises(ValueError, match=rf"has {least - 1} examples; this term needs at least {least}"):
            function(x[: least - 1], x[: least - 1])
    with pytest.raises(ValueError, match=r"batches is empty"):
        losses.cka_minibatch([])
    with pytest.raises(ValueError, match=r"k has shape \(3, 3\); it must be \(n, n\) with n >= 4"):
        losses.hsic_unbiased(torch.zeros(3, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"kernel is 'cubic'; allowed: 'linear', 'poly', 'rbf'"):
        losses.mmd(x, x, "cubic")
    with pytest.raises(ValueError, match=r"y has shape \(5, 2\) but x has \(5, 3\)"):
        losses.mmd(x, x[:, :2])
    with pytest.raises(ValueError, match=r"bandwidth is -1.0"):
        losses.mmd(x, x, "rbf", bandwidth=-1.0)
    with pytest.raises(ValueError, match=r"y has 1 example; the unbiased form"):
        losses.mmd(x, x[:1], unbiased=True)
    with pytest.raises(ValueError, match=r"y has shape \(3,\) but x has \(4,\)"):
        losses.pearson_correlation(torch.zeros(4), torch.zeros(3))
