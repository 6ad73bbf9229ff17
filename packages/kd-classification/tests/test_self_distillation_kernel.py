"""Self-distillation in rounds: the closed form in numbers, the estimators, the alpha estimate, networks, whole runs."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_classification.data import Batch, DataConfig, load_data
from kd_classification.engine.kernel_rounds import (
    Validation,
    choose_alphas,
    coefficients,
    constant_filter,
    dual_coefficients,
    limit_filter,
    optimal_alpha,
    round_filters,
    spectrum,
)
from kd_classification.integrations import KernelSelfDistillationClassifier, KernelSelfDistiller
from kd_classification.methods.self_distillation_kernel import (
    SelfDistillation,
    estimate_alpha,
    norm_penalty,
    probability_error,
)
from kd_classification.testing import stock_classifier
from kdcore.config import read_yaml
from kdcore.errors import InputError
from kdcore.method import arm_config, find_config, load_config
from kdcore.run import train

TINY = ["train.epochs=2", "data.per_class=6", "student.args.channels=[4,4,8,8]", "student.args.stem_width=4"]


def double(values, **options) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, **options)


def problem(seed: int, points: int = 12, outputs: int = 3) -> tuple[Tensor, Tensor]:
    """A positive semi-definite kernel of rank below n, and targets."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(points, points - 2, generator=generator, dtype=torch.float64)
    return factor @ factor.T / points, torch.randn(points, outputs, generator=generator, dtype=torch.float64)


def iterated(kernel: Tensor, targets: Tensor, penalty: float, alphas: list[float]) -> list[Tensor]:
    """The rounds' predictions on the training points by solving each of them."""
    fitted, previous = [], targets
    ridge = kernel + penalty * torch.eye(len(kernel), dtype=torch.float64)
    for alpha in alphas:
        previous = kernel @ torch.linalg.solve(ridge, alpha * targets + (1 - alpha) * previous)
        fitted.append(previous)
    return fitted


# ---------------------------------------------------------------- the closed form


def test_the_two_by_two_example():
    basis = spectrum(double([[2.0, 1.0], [1.0, 2.0]]))
    y = double([[1.0], [0.0]])
    assert torch.allclose(basis.values, double([1.0, 3.0]))
    filters = round_filters(basis.values, 1.0, [0.25, 0.25])
    assert torch.allclose(filters, double([[0.5, 0.75], [0.3125, 0.609375]]), atol=1e-12)
    limit = limit_filter(basis.values, 1.0, 0.25)
    assert torch.allclose(limit, double([0.2, 3 / 7]), atol=1e-12)
    fits = [basis.vectors @ (f[:, None] * (basis.vectors.T @ y)) for f in (*filters, limit)]
    wanted = [[0.625, 0.125], [0.4609375, 0.1484375], [0.3142857143, 0.1142857143]]
    for fit, values in zip(fits, wanted, strict=True):
        assert torch.allclose(fit.flatten(), double(values), atol=1e-9)
    ratios = [float(f[1] / f[0]) for f in (*filters, limit)]
    assert ratios == pytest.approx([1.5, 1.95, 2.142857], abs=1e-6)
    assert ratios[2] == pytest.approx(3 * (0.25 * 1 + 1) / (1 * (0.25 * 3 + 1)))


@given(seed=st.integers(0, 1000), alphas=st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_filters_are_the_iterated_rounds(seed, alphas):
    kernel, y = problem(seed)
    basis = spectrum(kernel)
    for fit, filter_ in zip(iterated(kernel, y, 0.3, alphas), round_filters(basis.values, 0.3, alphas), strict=True):
        assert torch.allclose(basis.vectors @ (filter_[:, None] * (basis.vectors.T @ y)), fit, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
def test_constant_alpha_has_a_form_without_the_rounds_between(alpha):
    kernel, _ = problem(3)
    values = spectrum(kernel).values
    filters = round_filters(values, 0.3, [alpha] * 50)
    for t in (1, 2, 5, 50):
        assert torch.allclose(constant_filter(values, 0.3, alpha, t), filters[t - 1], atol=1e-10)


def test_the_rounds_end_at_the_ridge_fit_of_a_larger_penalty():
    kernel, y = problem(1)
    ridge = kernel @ torch.linalg.solve(kernel + 0.3 / 0.3 * torch.eye(12, dtype=torch.float64), y)
    assert (iterated(kernel, y, 0.3, [0.3] * 200)[-1] - ridge).abs().max() < 1e-8
    basis = spectrum(kernel)
    limit = limit_filter(basis.values, 0.3, 0.3)
    assert (basis.vectors @ (limit[:, None] * (basis.vectors.T @ y)) - ridge).abs().max() < 1e-10


def test_labels_alone_stay_and_no_labels_vanish():
    kernel, y = problem(2)
    values = spectrum(kernel).values
    labels = round_filters(values, 0.3, [1.0] * 5)
    assert torch.equal(labels, labels[:1].expand(5, -1))
    sizes = [float(fit.norm()) for fit in iterated(kernel, y, 0.3, [0.0] * 300)]
    assert all(after < before for before, after in pairwise(sizes))
    assert sizes[-1] < 1e-3 * sizes[0]
    assert limit_filter(values, 0.3, 0.0).abs().max() == 0


@given(low=st.floats(0.01, 5), more=st.floats(0.01, 5), alpha=st.floats(0, 0.9))
def test_later_rounds_are_sparser_in_the_eigenbasis_than_the_first(low, more, alpha):
    """The share of a larger eigenvalue grows from round 1 on; beyond round 2 steadily only without labels."""
    values = double([low, low + more])
    ratios = [float(f[1] / f[0]) for f in round_filters(values, 1.0, [alpha] * 8)]
    assert all(ratio > ratios[0] for ratio in ratios[1:])
    limit = (low + more) * (alpha * low + 1) / (low * (alpha * (low + more) + 1))
    far = round_filters(values, 1.0, [alpha] * 400)[-1]
    if alpha > 0.1:
        assert float(far[1] / far[0]) == pytest.approx(limit, rel=1e-9)
    steady = [float(f[1] / f[0]) for f in round_filters(values, 1.0, [0.0] * 8)]
    assert all(after > before for before, after in pairwise(steady))


X = np.linspace(0, 1, 11)[:, None]
Y = np.array(
    [
        *(0.38476636, 1.23339677, 1.33232242, 0.69201595, -0.29756146, -0.24189292),
        *(-0.79644858, -0.96164802, -0.49672510, -0.34690660, 0.55895127),
    ]
)
GOLDEN = {
    0.0: [0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251],
    0.25: [0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011],
    0.35: [0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948],
}
LIMITS = {0.0: 0.49505, 0.25: 0.15250, 0.35: 0.14959}


@pytest.mark.parametrize("alpha", GOLDEN)
def test_the_sine_of_the_paper(alpha):
    """The data of Mobahi et al. (2020): squared error to sin(2 pi x) of six rounds and of the limit."""
    grid = np.linspace(0, 1, 101)[:, None]
    truth = np.sin(2 * np.pi * grid[:, 0])
    model = KernelSelfDistiller(gamma=80.0, penalty=0.2, rounds=6, alpha=alpha).fit(X, Y)
    errors = [float(np.mean((fit - truth) ** 2)) for fit in model.staged_predict(grid)]
    assert errors == pytest.approx(GOLDEN[alpha], abs=6e-6)
    basis = spectrum(torch.from_numpy(np.exp(-80 * (X - X.T) ** 2)))
    against = torch.from_numpy(np.exp(-80 * (grid - X.T) ** 2))
    limit = limit_filter(basis.values, 0.2, alpha) / basis.values
    fit = against @ dual_coefficients(basis, limit, torch.from_numpy(Y)[:, None])
    assert float(((fit[:, 0].numpy() - truth) ** 2).mean()) == pytest.approx(LIMITS[alpha], abs=6e-6)


# ---------------------------------------------------------------- the best alpha


def round_two(seed: int, outputs: int = 2):
    """u, g and the targets of a held-out part, and the fit at any alpha."""
    kernel, y = problem(seed, points=20, outputs=outputs)
    inside, outside = kernel[:14, :14], kernel[14:, :14]
    basis, targets = spectrum(inside), y[:14]
    first = coefficients(basis.values, 0.3, 1.0)

    def fit(alpha: float) -> Tensor:
        second = coefficients(basis.values, 0.3, alpha, basis.values * first)
        return outside @ dual_coefficients(basis, second, targets)

    return basis, targets, Validation(outside, y[14:]), fit


@pytest.mark.parametrize("seed", range(4))
def test_alpha_is_the_minimum_of_the_validation_error(seed):
    basis, targets, held, fit = round_two(seed)
    u = held.kernel @ dual_coefficients(basis, coefficients(basis.values, 0.3, 1.0), targets)
    assert torch.allclose(fit(1.0), u, atol=1e-12)
    assert torch.allclose(fit(0.4), 0.4 * u + 0.6 * fit(0.0), atol=1e-10), "a linear smoother is linear in alpha"
    raw = optimal_alpha(held.targets, u, fit(0.0)).raw
    assert choose_alphas(basis, 0.3, targets, 2, held)[1].raw == pytest.approx(raw, abs=1e-8)

    def error(alpha: float) -> float:
        return float((fit(alpha) - held.targets).square().sum())

    around = [raw + step * 1e-3 for step in range(-3, 4)]
    assert min(around, key=error) == raw
    assert error(raw) <= min(error(0.0), error(1.0)) + 1e-12


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 100))
def test_alpha_does_not_depend_on_the_unit_of_the_targets(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    y, u, g = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
    assert optimal_alpha(scale * y, scale * u, scale * g).raw == pytest.approx(optimal_alpha(y, u, g).raw, rel=1e-9)


def test_alpha_is_clipped_for_use_and_one_where_undefined():
    y, u, g = double([1.0, 0.0]), double([0.5, 0.5]), double([0.0, 0.5])
    assert optimal_alpha(y, u, g) == optimal_alpha(y[:, None], u[:, None], g[:, None])
    assert (optimal_alpha(y, u, g).raw, optimal_alpha(y, u, g).alpha) == (2.0, 1.0)
    assert optimal_alpha(y, u, g, clip=False).alpha == 2.0
    assert optimal_alpha(y, u, u).alpha == 1.0
    with pytest.raises(InputError, match="one shape"):
        optimal_alpha(y, u[:1], g)


# ---------------------------------------------------------------- the estimators


@pytest.mark.parametrize("estimator", [KernelSelfDistiller, KernelSelfDistillationClassifier])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learns_own_checks(estimator):
    from sklearn.utils.estimator_checks import check_estimator

    results = check_estimator(estimator())
    skipped = {result["check_name"] for result in results if result["status"] == "skipped"}
    assert len(results) > 40
    assert skipped <= {"check_array_api_input"}, "array API input needs a switch in the environment"


def test_one_round_is_scikit_learns_kernel_ridge():
    from sklearn.kernel_ridge import KernelRidge

    ours = KernelSelfDistiller(gamma=20.0, penalty=0.2, rounds=1).fit(X, Y)
    theirs = KernelRidge(alpha=0.2, kernel="rbf", gamma=20.0).fit(X, Y)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), atol=1e-10)
    other = KernelSelfDistiller(kernel=lambda a, b: float(np.exp(-20 * (a - b) @ (a - b))), penalty=0.2, rounds=1)
    np.testing.assert_allclose(other.fit(X, Y).predict(X), theirs.predict(X), atol=1e-10)
    gram = np.exp(-20 * (X - X.T) ** 2)
    known = KernelSelfDistiller(kernel="precomputed", penalty=0.2, rounds=1).fit(gram, Y)
    np.testing.assert_allclose(known.predict(gram[:4]), theirs.predict(X[:4]), atol=1e-10)


def test_outputs_are_fitted_column_by_column_with_one_alpha():
    y = np.stack([Y, Y[::-1]], axis=1)
    both = KernelSelfDistiller(gamma=80.0, penalty=0.2, rounds=3, alpha="auto", random_state=0).fit(X, y)
    for column in range(2):
        alone = KernelSelfDistiller(gamma=80.0, penalty=0.2, rounds=3, alpha=both.alphas_).fit(X, y[:, column])
        np.testing.assert_allclose(both.predict(X)[:, column], alone.predict(X), atol=1e-10)


def test_effective_degrees_fall_and_stop_with_labels():
    model = KernelSelfDistiller(gamma=80.0, penalty=0.2, rounds=40, alpha=0.3).fit(X, Y)
    assert np.all(np.diff(model.effective_degrees_) < 0)
    limit = limit_filter(torch.from_numpy(model.eigenvalues_), 0.2, 0.3)
    assert model.effective_degrees_[-1] == pytest.approx(float(limit.sum()), abs=1e-6)


def test_estimators_name_what_is_wrong():
    with pytest.raises(InputError, match="one of each of the 3 rounds"):
        KernelSelfDistiller(rounds=3, alpha=[0.5, 0.5]).fit(X, Y)
    with pytest.raises(ValueError, match="'penalty' parameter"):
        KernelSelfDistiller(penalty=0.0).fit(X, Y)
    with pytest.raises(InputError, match="not symmetric"):
        KernelSelfDistiller(kernel="precomputed", alpha=0.5).fit(np.triu(np.ones((3, 3))), Y[:3])
    with pytest.raises(InputError, match="smallest eigenvalue"):
        KernelSelfDistiller(kernel="precomputed", alpha=0.5).fit(np.array([[0.0, 1.0], [1.0, 0.0]]), Y[:2])


@pytest.mark.parametrize(("penalty", "helps"), [(0.01, True), (10.0, False)])
def test_on_digits_rounds_help_when_under_regularised_and_the_automatic_alpha_never_hurts(penalty, helps):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images / 16
    errors = []
    for seed in range(3):
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(images))
        train_, held, test = order[:150], order[150:250], order[250:]
        one_hot = np.eye(10)[labels]
        noisy = one_hot.copy()
        wrong = train_[generator.random(len(train_)) < 0.3]
        noisy[wrong] = np.eye(10)[generator.integers(0, 10, len(wrong))]
        runs = []
        for alpha in ("auto", 0.0):
            model = KernelSelfDistiller(gamma=0.1, penalty=penalty, rounds=3, alpha=alpha)
            model.fit(images[train_], noisy[train_], validation=(images[held], one_hot[held]))
            runs.append([float(np.mean((fit - one_hot[test]) ** 2)) for fit in model.staged_predict(images[test])])
        errors.append(runs)
    automatic, without_labels = np.mean(errors, axis=0)
    assert automatic[2] <= 1.01 * automatic[0]
    if helps:
        assert automatic[2] < 0.97 * automatic[0]
    else:
        assert without_labels[2] > 1.05 * without_labels[0]


# ---------------------------------------------------------------- networks


class Logits(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(double(values))

    def forward(self, images):
        return self.values


def batch(labels) -> Batch:
    return Batch(torch.zeros(len(labels), 1), torch.tensor(labels), torch.arange(len(labels)))


def test_the_networks_loss_by_hand():
    student, teacher = [[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [3.0, 0.0]]
    distiller = SelfDistillation(Logits(teacher), Logits(student), alpha=0.3, penalty=0.1)
    p, q = double(student).softmax(1), double(teacher).softmax(1)
    wanted = 0.3 * ((p - torch.eye(2)) ** 2).mean() + 0.7 * ((p - q) ** 2).mean() + 0.1 * double(student).norm()
    total = distiller.loss(batch([0, 1])).total()
    assert total.item() == pytest.approx(float(wanted), abs=1e-12)
    total.backward()
    assert distiller.teacher.values.grad is None
    assert distiller.train().teacher.training is False


def test_where_the_teacher_is_right_alpha_does_not_matter():
    teacher = Logits([[800.0, 0.0], [0.0, 800.0]])
    totals = [
        SelfDistillation(teacher, Logits([[1.0, 0.0], [0.0, 2.0]]), alpha=alpha).loss(batch([0, 1])).total().item()
        for alpha in (0.0, 0.4, 1.0)
    ]
    assert totals == pytest.approx([totals[0]] * 3, abs=1e-12)


def test_mixed_labels_and_shapes():
    z = double([[1.0, 0.0, 0.5]])
    mixed = double([[0.5, 0.5, 0.0]])
    assert probability_error(z, mixed).item() == pytest.approx(float(((z.softmax(1) - mixed) ** 2).mean()))
    with pytest.raises(InputError, match="allowed"):
        probability_error(z, mixed[:, :2])


def test_the_penalty_is_a_sum_of_norms_and_safe_at_zero():
    a, b = double([3.0, 4.0], requires_grad=True), double([[0.0, 0.0]], requires_grad=True)
    value = norm_penalty([a, b])
    value.backward()
    assert value.item() == 5.0
    assert torch.allclose(a.grad, double([0.6, 0.8]))
    assert torch.equal(b.grad, torch.zeros_like(b))
    assert torch.autograd.gradcheck(lambda x: norm_penalty([x]), double([1.0, -2.0, 0.5], requires_grad=True))


def test_loss_gradient_is_the_numerical_one():
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True, generator=None)
    q = torch.rand(3, 4, dtype=torch.float64).softmax(1)
    assert torch.autograd.gradcheck(lambda x: probability_error(x, q), z)


def test_alpha_of_two_networks_is_the_formula_on_their_probabilities():
    data = load_data(DataConfig(per_class=5, validation=0.1))
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    found = estimate_alpha(*networks, data.validation)
    images = next(iter(data.validation.loader(1000))).images
    with torch.no_grad():
        u, g = (network(images).softmax(1) for network in networks)
    y = F.one_hot(data.validation.labels, 10)
    assert found.raw == pytest.approx(float(((y - g) * (u - g)).sum() / ((u - g) ** 2).sum()), rel=1e-5)
    # the same as an option of the distiller
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))
    options = {"fits": tuple(networks), "held_out": data.validation}
    automatic = SelfDistillation(teacher, student, alpha="auto", **options)
    assert (automatic.alpha, automatic.estimate) == (found.alpha, found)
    free = SelfDistillation(teacher, student, alpha="auto", clip=False, **options)
    assert free.alpha == found.raw
    batch_ = Batch(images[:4], torch.arange(4), torch.arange(4))
    given = SelfDistillation(teacher, student, alpha=found.raw).loss(batch_)
    torch.testing.assert_close(free.loss(batch_).total(), given.total())
    with pytest.raises(InputError, match="needs fits"):
        SelfDistillation(teacher, student, alpha="auto", held_out=data.validation)


# ---------------------------------------------------------------- runs


def run(folder, *overrides):
    method, config = load_config("self_distillation_kernel/small", [*TINY, *overrides])
    return method, config, train(method, config, folder, quiet=True, cpu=True)


def test_a_run_in_rounds_ships_a_stock_timm_network(tmp_path):
    method, config, metrics = run(tmp_path / "run", "method_args.rounds=2")
    assert {"round_1/accuracy", "round_2/squared_error", "round_2/alpha", "round_2/alpha_raw"} <= set(metrics)
    assert 0 <= metrics["round_2/alpha"] <= 1
    assert json.loads((tmp_path / "run/alpha-2.json").read_text())["raw"] == metrics["round_2/alpha_raw"]
    student = timm.create_model(f"local-dir:{tmp_path / 'run/student'}", pretrained=True).eval()
    data = load_data(config.data, config.seed)
    with torch.no_grad():
        answers = torch.cat([student(b.images).argmax(1) for b in data.test.loader(512)])
    assert float((answers == data.test.labels).double().mean()) == pytest.approx(metrics["student/accuracy"])
    from kdcore.run import load_run

    samples = method.predict(config, load_run(tmp_path / "run")[2], 4)
    assert len(samples) == 4


def test_round_one_alone_is_the_baseline_and_the_best_round_can_ship(tmp_path):
    _, _, alone = run(tmp_path / "alone", "method_args.rounds=1")
    _, _, best = run(tmp_path / "best", "method_args.rounds=2", "method_args.alpha=[0.5]", "method_args.ship=best")
    assert alone["student/accuracy"] == alone["round_1/accuracy"] == best["round_1/accuracy"]
    assert best["round_2/alpha"] == 0.5
    assert best["student/squared_error"] in (best["round_1/squared_error"], best["round_2/squared_error"])


@pytest.mark.slow
def test_the_student_loads_where_kd_cannot_be_imported(tmp_path):
    run(tmp_path / "run", "method_args.rounds=1")
    opened = stock_classifier(tmp_path / "run/student", (1, 16, 16))
    assert opened == ([2, 10], "ResNet", ["Linear"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_args.alpha=1.5", "method_args.alpha"),
        ("method_args.alpha=[0.5]", "rounds - 1"),
        ("data.validation=0", "data.validation"),
        ("train.monitor=accurcy", "did you mean 'accuracy'"),
        ("method_args.rounds=0", "method_args.rounds"),
    ],
)
def test_bad_input_is_named_before_anything_trains(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_configs_say_what_they_are():
    values = read_yaml(find_config("self_distillation_kernel/small"))
    assert {"ce", "no_labels", "half", "labels_only"} == set(values["compare"])
    for name in ("small", "paper"):
        values = read_yaml(find_config(f"self_distillation_kernel/{name}"))
        for overrides in ({}, *values["compare"].values()):
            arm_config(values, overrides)
    _, paper = load_config("self_distillation_kernel/paper")
    assert (paper.student.name, paper.method_args.rounds, paper.method_args.penalty) == ("resnet50", 5, 1e-4)


def test_label_noise_moves_the_given_share_and_leaves_validation_clean():
    clean, noisy = (load_data(DataConfig(per_class=20, validation=0.1, label_noise=share)) for share in (0.0, 0.25))
    assert int((clean.train.labels != noisy.train.labels).sum()) == 50
    assert torch.equal(clean.train.split.images, noisy.train.split.images)
    assert torch.equal(clean.validation.labels, noisy.validation.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)
