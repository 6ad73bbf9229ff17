"""AST: experts, the inner steps and the matching loss in numbers, gradients through all steps, whole runs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_classification.data import Batch
from kd_classification.engine.convnet import ConvNet
from kd_classification.engine.diff_augment import DiffAugment
from kd_classification.engine.experts import Trajectory, flat_parameters, load_parameters
from kd_classification.engine.synthetic import LearnableImages, Preprocessing, SyntheticSet
from kd_classification.methods.smooth_trajectories import (
    SmoothExpert,
    SmoothTrajectories,
    SmoothTrajectoriesConfig,
    Window,
    Windows,
    balance_weight,
    clipping_coefficient,
    gradient_penalty,
    match_loss,
    match_steps,
    perturb,
    perturbed,
    smoothness,
    unroll,
)
from kdcore.config import OptimizerConfig, ScheduleConfig, TrainConfig
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import evaluate, train

PLAIN = {"perturbation": 0.0, "balance": False, "intermediate": "none", "momentum": 0.0}
SHORT = [
    "train.steps=6",
    "experts.count=2",
    "experts.train.epochs=3",
    "experts.train.schedule.milestones=[2]",
    "evaluation.train.steps=10",
    "evaluation.repeats=2",
    "evaluation.networks={}",
    "network.args={width: 4, depth: 2}",
    "method_args.steps=4",
    "method_args.max_start_epoch=2",
]


# ---------------------------------------------------------------- pieces in numbers


@pytest.mark.parametrize(
    ("start", "expected"),
    [(0, 0.5132964062), (7, 0.5804820237), (14, 0.7324867604), (15, 1.2920296742), (20, 1.5936926412)],
)
def test_balance_over_the_start_epochs(start, expected):
    assert balance_weight(start, 30) == pytest.approx(expected, abs=1e-10)


def test_balance_is_largest_at_the_end():
    assert balance_weight(29, 30) == pytest.approx(1.9205726605, abs=5e-11)
    weights = [balance_weight(start, 31) for start in range(31)]
    assert weights == sorted(weights)
    assert weights[15] / weights[14] > 1.7, "it jumps in the middle"


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"), [(20, 2, [10]), (20, 3, [6, 12]), (40, 3, [13, 26]), (20, 1, [])]
)
def test_where_intermediate_epochs_are_matched(steps, epochs, expected):
    assert match_steps(steps, epochs) == expected


def test_perturbation():
    weight, direction = torch.tensor([[1.0, 1.0], [2.0, 0.5]]), torch.tensor([[1.0, -2.0], [2.0, 4.0]])
    torch.testing.assert_close(perturb(weight, direction), torch.tensor([[1.2, 0.6], [2.8, 0.9]]))
    assert (perturb(weight, direction) - weight).norm() <= weight.abs().max()
    torch.manual_seed(0)
    network = ConvNet(num_classes=3, in_chans=1, img_size=4, width=4, depth=1)
    flat = flat_parameters(network)
    moved = perturbed(flat, network)
    kernel = network.features[0].weight.numel()
    assert (moved != flat)[:kernel].all()
    assert torch.equal(moved[kernel:], flat[kernel:])
    assert perturbed(flat, network, 0.0) is flat


@pytest.mark.parametrize(("momentum", "expected"), [(0.9, [0.8, 0.46, 0.062]), (0.0, [0.8, 0.64, 0.512])])
def test_inner_steps_on_a_quadratic(momentum, expected):
    theta = torch.ones((), dtype=torch.float64)
    found = unroll(lambda theta, _: 2 * theta, theta, torch.tensor(0.1, dtype=torch.float64), momentum, 3)
    assert [float(value) for value in found] == pytest.approx(expected)


def test_match_loss():
    start, target = torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])
    assert match_loss(start, target, start) == 1
    assert match_loss(target, target, start) == 0
    assert match_loss(torch.tensor([3.0, 0.0]), target, start).item() == pytest.approx(16 / 25)


@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_match_loss_is_relative(seed, scale):
    student, target, start = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = [target + scale * (value - target) for value in (student, start)]
    assert match_loss(moved[0], target, moved[1]).item() == pytest.approx(match_loss(student, target, start).item())


def test_clipping_rises_to_one():
    found = [clipping_coefficient(epoch) for epoch in range(12)]
    assert found == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1, 1])
    assert clipping_coefficient(0, start=1.0) == 1


def test_gradient_penalty_in_numbers():
    inputs = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    penalty = 2 * gradient_penalty(inputs.flatten(1) @ weight.T, inputs)  # the classes' sum: (1, 3, 2)
    assert penalty.item() == pytest.approx(15.0333704529, abs=5e-11)
    assert torch.autograd.grad(penalty, weight)[0].abs().sum() > 0
    unit = inputs.flatten(1) @ torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64).T
    assert gradient_penalty(unit, inputs).item() == pytest.approx(0, abs=1e-25)


def test_gradient_penalty_is_by_pixel():
    inputs = torch.zeros(1, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([3.0, 0.0, 4.0, 1.0], dtype=torch.float64)  # norms over channels: 5 and 1
    assert gradient_penalty(inputs.flatten(1) @ weight, inputs).item() == pytest.approx((16 + 0) / 2)
    whole = gradient_penalty(inputs.flatten(1) @ weight, inputs, "image")  # one norm, sqrt(9 + 16 + 1)
    assert whole.item() == pytest.approx((26**0.5 - 1) ** 2)


# ---------------------------------------------------------------- experts


def expert(**changes) -> SmoothExpert:
    torch.manual_seed(0)
    network = ConvNet(num_classes=3, in_chans=1, img_size=4, width=4, depth=1).double()
    train_config = TrainConfig(
        epochs=4,
        optimizer=OptimizerConfig(name="sgd", lr=0.1, momentum=0.9),
        schedule=ScheduleConfig(name="multistep", milestones=[2], gamma=0.6),
    )
    made = SmoothExpert(
        network,
        args=SmoothTrajectoriesConfig(**changes),
        train=train_config,
        preprocessing=Preprocessing([0.5], [0.25]).double(),
        num_classes=3,
        augment=DiffAugment([]),
        epochs=4,
    )
    return made.double()


def batch() -> Batch:
    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(images, torch.arange(6) % 3, torch.arange(6))


def test_expert_minimises_damped_cross_entropy_and_the_penalty():
    distiller, data = expert(), batch()
    distiller.progress.epoch = 3
    terms = distiller.loss(data)
    inputs = (data.images - 0.5) / 0.25
    assert {name: weight for name, (weight, _) in terms.items()} == pytest.approx({"ce": 0.65, "penalty": 2.0})
    assert terms["ce"][1].item() == pytest.approx(F.cross_entropy(distiller.student(inputs), data.labels).item())
    seen = inputs.clone().requires_grad_()
    g = torch.autograd.grad(distiller.student(seen).sum(), seen)[0]
    assert terms["penalty"][1].item() == pytest.approx((g.abs() - 1).square().mean().item())
    assert list(expert(gradient_penalty=0.0).loss(data)) == ["ce"]
    whole = expert(penalty_norm="image")
    assert whole.loss(data)["penalty"][1].item() == pytest.approx((g.flatten(1).norm(dim=1) - 1).square().mean().item())


@pytest.mark.parametrize("restart", [True, False])
def test_momentum_restarts_where_the_rate_drops(restart):
    distiller = expert(restart_momentum=restart)
    player = distiller.players()[0]
    optimizer = player.optimizer([{"params": list(distiller.student.parameters())}])
    distiller.progress.epochs, distiller.progress.steps = 4, 8
    weight, moves = distiller.student.classifier.bias, []
    for step in range(6):
        distiller.progress.step = step
        for parameter in distiller.student.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = weight.detach().clone()
        optimizer.step()
        moves.append((before - weight).mean().item() / 0.1)
    expected = [1, 1.9, 2.71, 3.439]
    assert moves[:4] == pytest.approx(expected)
    assert moves[4:] == pytest.approx([1, 1.9] if restart else [4.0951, 4.68559])


# ---------------------------------------------------------------- alignment


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(images.flatten(1))))


def alignment(network: nn.Module | None = None, per_class: int = 1, **arguments) -> tuple[SmoothTrajectories, Window]:
    torch.manual_seed(0)
    network = (TwoLayers() if network is None else network).double()
    labels = torch.arange(3).repeat_interleave(per_class)
    images = LearnableImages(torch.randn(3 * per_class, 1, 2, 2, dtype=torch.float64), labels)
    arguments = {"steps": 6, "expert_epochs": 2, "max_start_epoch": 4, "rate": 0.3, **arguments}
    distiller = SmoothTrajectories(images, network, DiffAugment([]), **arguments).double()
    start = flat_parameters(network)
    rows = torch.stack([start + 0.1 * k * torch.randn_like(start) for k in range(distiller.args.expert_epochs + 1)])
    return distiller, Window(rows, 1)


def test_without_extras_it_is_mtt():
    distiller, window = alignment(**PLAIN)
    images, labels = distiller.student.images, distiller.student.labels
    network = TwoLayers().double()
    load_parameters(network, window.parameters[0])
    weights = list(network.parameters())
    for _ in range(6):
        w1, b1, w2, b2 = weights
        loss = F.cross_entropy(torch.tanh(images.flatten(1) @ w1.T + b1) @ w2.T + b2, labels)
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        weights = [w - distiller.rate * g for w, g in zip(weights, gradients, strict=True)]
    end, target = torch.cat([w.reshape(-1) for w in weights]), window.parameters[-1]
    expected = (end - target).square().sum() / (window.parameters[0] - target).square().sum()
    terms = distiller.loss(window)
    assert list(terms) == ["final"]
    assert terms.total().item() == pytest.approx(expected.item(), abs=1e-12)
    found, wanted = (torch.autograd.grad(loss, [images, distiller.rate]) for loss in (terms.total(), expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("what", ["rate", "images"])
def test_gradient_through_all_steps_by_finite_differences(what):
    distiller, window = alignment(perturbation=0.0)
    parameter = distiller.rate if what == "rate" else distiller.student.images
    gradient = torch.autograd.grad(distiller.loss(window).total(), parameter)[0].flatten()
    index = int(gradient.abs().argmax())
    values = []
    for sign in (1, -1):
        parameter.data.view(-1)[index] += sign * 1e-6
        values.append(distiller.loss(window).total().item())
        parameter.data.view(-1)[index] -= sign * 1e-6
    assert gradient[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_truncated_graph_changes_the_gradient_but_not_the_loss():
    exact, window = alignment(perturbation=0.0)
    short, _ = alignment(perturbation=0.0, graph_steps=2)
    losses = [distiller.loss(window).total() for distiller in (exact, short)]
    assert losses[0].item() == pytest.approx(losses[1].item())
    gradients = [
        torch.autograd.grad(loss, distiller.student.images)[0]
        for loss, distiller in zip(losses, (exact, short), strict=True)
    ]
    assert not torch.allclose(*gradients)
    whole, _ = alignment(perturbation=0.0, graph_steps=6)
    torch.testing.assert_close(torch.autograd.grad(whole.loss(window).total(), whole.student.images)[0], gradients[0])


@pytest.mark.parametrize(("intermediate", "weights"), [("aggregate", [1, 1]), ("adaptive", [1 / 3, 2 / 3])])
def test_intermediate_matches(intermediate, weights):
    distiller, window = alignment(expert_epochs=3, intermediate=intermediate, perturbation=0.0)
    start = window.parameters[0]
    thetas = [theta.detach() for theta in distiller.inner_steps(start, window.start)]
    expected = sum(
        b * match_loss(thetas[n - 1], window.parameters[i], start)
        for i, (n, b) in enumerate(zip([2, 4], weights, strict=True), start=1)
    )
    terms = distiller.loss(window)
    assert terms["middle"][1].item() == pytest.approx(expected.item())
    assert terms["final"][1].item() == pytest.approx(match_loss(thetas[-1], window.parameters[3], start).item())


def test_images_outside_the_mini_batches_have_no_gradient():
    distiller, window = alignment(per_class=4, batch_size=2, steps=3, perturbation=0.0)
    gradient = torch.autograd.grad(distiller.loss(window).total(), distiller.student.images)[0]
    assert int((gradient.flatten(1).abs().max(1).values > 0).sum()) == 6


def test_balance_scales_the_inner_loss():
    plain, window = alignment(**{**PLAIN, "steps": 2})
    balanced, _ = alignment(**{**PLAIN, "steps": 2, "balance": True, "rate": 0.3 / balance_weight(1, 4)})
    assert balanced.loss(window).total().item() == pytest.approx(plain.loss(window).total().item())


def test_a_student_that_does_what_the_expert_did_has_loss_zero():
    distiller, window = alignment(**PLAIN)
    start = window.parameters[0]
    end = [theta.detach() for theta in distiller.inner_steps(start, 1)][-1]
    loss = distiller.loss(Window(torch.stack([start, end, end]), 1)).total()
    assert loss.item() == pytest.approx(0, abs=1e-25)
    for gradient in torch.autograd.grad(loss, [distiller.student.images, distiller.rate]):
        assert gradient.abs().max() < 1e-10


def test_denominators_use_the_perturbed_start():
    network = ConvNet(num_classes=3, in_chans=1, img_size=2, width=2, depth=1)
    distiller, window = alignment(network, steps=2, rate=1e-12)
    torch.manual_seed(5)
    terms = distiller.loss(window)
    assert terms["final"][1].item() == pytest.approx(1)
    assert terms["middle"][1].item() == pytest.approx(1)


def test_the_player_moves_images_and_rate_and_nothing_else():
    distiller, window = alignment(rate_lr=1e-3)
    kept = window.parameters.clone()
    (player,) = distiller.players()
    assert [group.get("lr_scale", 1) for group in player.param_groups] == [1, pytest.approx(1e-6)]
    assert distiller.rate.is_leaf
    distiller.loss(window).total().backward()
    assert torch.equal(window.parameters, kept)
    assert all(parameter.grad is None for parameter in distiller.network.parameters())
    assert distiller.rate.grad.abs() > 0
    with pytest.raises(InputError, match=r"steps = 1: must be at least expert_epochs = 2"):
        alignment(steps=1)


def test_following_an_expert_becomes_possible():
    """Images learn to move a network as an expert moved: what is left of its way shrinks to less than a half."""
    distiller, _ = alignment(steps=8, **PLAIN, per_class=2)
    network = TwoLayers().double()
    inputs, labels = torch.randn(30, 1, 2, 2, dtype=torch.float64), torch.arange(30) % 3
    inputs += labels.view(-1, 1, 1, 1)
    optimizer, rows = torch.optim.SGD(network.parameters(), lr=0.3), [flat_parameters(network)]
    for step in range(16):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
        if step % 8 == 7:
            rows.append(flat_parameters(network))
    window = Window(torch.stack(rows), 0)
    outer = torch.optim.SGD([distiller.student.images], lr=2.0, momentum=0.5)
    losses = []
    for _ in range(60):
        outer.zero_grad()
        loss = distiller.loss(window).total()
        loss.backward()
        outer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


class Rows:
    """A trajectory of given rows."""

    def __init__(self, rows: Tensor):
        self.values = rows

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> Tensor:
        return self.values[row]

    def rows(self, first: int, end: int) -> Tensor:
        return self.values[first:end]


def test_windows_depend_on_seed_and_epoch_alone():
    pool = [Rows(torch.arange(6.0)[:, None] + 100 * k) for k in range(2)]
    windows = Windows(pool, max_start=4, epochs=2, seed=0, count=60)
    drawn = list(windows)
    assert {window.start for window in drawn} == {0, 1, 2, 3}
    assert {int(window.parameters[0, 0]) // 100 for window in drawn} == {0, 1}
    assert all(window.parameters[:, 0].diff().eq(1).all() and len(window.parameters) == 3 for window in drawn)
    assert all(torch.equal(a.parameters, b.parameters) for a, b in zip(drawn, windows, strict=True))
    windows.set_epoch(1)
    assert [window.start for window in windows] != [window.start for window in drawn]


def test_smoothness_in_numbers():
    found = smoothness([Rows(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]]))])
    assert found["step_length"] == pytest.approx(3)
    assert found["step_variation"] == pytest.approx(math.sqrt(8) / 3)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ast") / "run"
    method, config = load_config("smooth_trajectories/small", SHORT)
    return folder, train(method, config, folder, quiet=True, cpu=True)


def test_run_learns_saves_and_evaluates_again(run):
    folder, metrics = run
    saved = SyntheticSet.load(folder / "synthetic")
    assert len(saved.images) == metrics["images"] == 10
    assert saved.rate == metrics["learned_rate"] != 0.01
    assert metrics["student/accuracy"] > 0.1
    assert 0 < metrics["remaining_distance"] < 1.5
    assert metrics["teacher/step_length"] > 0
    assert Trajectory(folder / "experts" / "001").epochs == [0, 1, 2, 3]
    assert evaluate(folder) == pytest.approx(metrics)


def test_images_come_back_as_the_network_saw_them(run):
    folder, _ = run
    saved = SyntheticSet.load(folder / "synthetic")
    again = saved.preprocessing.pixels(saved.tensors()[0])
    torch.testing.assert_close(again, saved.images)


def test_whitened_run(tmp_path):
    method, config = load_config("smooth_trajectories/small", [*SHORT, "zca=0.1", "train.steps=2"])
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    saved = SyntheticSet.load(tmp_path / "run" / "synthetic")
    assert saved.preprocessing.whitened
    assert saved.tensors()[0].shape == (10, 1, 8, 8)
    torch.testing.assert_close(saved.tensors()[0].mean(), saved.preprocessing.inputs(saved.images).mean())
    assert 0 <= metrics["student/accuracy"] <= 1


class Stop(Exception):
    pass


def test_resume_is_bit_exact_and_goes_on_with_the_experts(run, tmp_path, monkeypatch):
    folder, metrics = run
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    overrides = ["train.checkpoint_every=2", "experts.train.checkpoint_every=5"]
    method, config = load_config("smooth_trajectories/small", [*SHORT, *overrides])
    for cls, limit in ((SmoothExpert, 60), (SmoothTrajectories, 4)):
        loss, calls = cls.loss, []

        def cut(self, batch, player="images", *, loss=loss, calls=calls, limit=limit):
            calls.append(1)
            if len(calls) == limit:
                raise Stop
            return loss(self, batch, player)

        monkeypatch.setattr(cls, "loss", cut)
        with pytest.raises(Stop):
            train(method, config, tmp_path / "run", quiet=True, cpu=True, resume=True)
        monkeypatch.setattr(cls, "loss", loss)
    resumed = train(method, config, tmp_path / "run", quiet=True, cpu=True, resume=True)
    for name in ("000", "001"):
        rows = [Trajectory(place / "experts" / name).rows(0, 4) for place in (folder, tmp_path / "run")]
        assert torch.equal(*rows)
    images = [SyntheticSet.load(place / "synthetic").images for place in (folder, tmp_path / "run")]
    assert torch.equal(*images)
    assert resumed["student/accuracy"] == metrics["student/accuracy"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method_args.max_start_epoch=3"],
            "method_args.max_start_epoch = 3: with expert_epochs = 2 it reaches epoch 4",
        ),
        (["method_args.steps=1"], "method_args.steps = 1: must be at least expert_epochs = 2"),
        (["synthetic.factor=2"], "synthetic.factor = 2: must be 1"),
        (["train.optimizer.name=adam"], "train.optimizer.name = 'adam': must be sgd"),
    ],
)
def test_run_errors(overrides, message, tmp_path):
    method, config = load_config("smooth_trajectories/small", [*SHORT, *overrides])
    with pytest.raises(InputError, match=message):
        train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert not (tmp_path / "run").exists()


def test_configs():
    _, mnist = load_config("smooth_trajectories/mnist")
    assert mnist.data.name == "idx"
    assert {"ce", "herding", "dm", "mtt"} <= set(mnist.compare)
    _, small = load_config("smooth_trajectories/small")
    arms = {"ce", "herding", "full", "mtt", "plain_experts", "final_only", "random_init", "no_perturbation"}
    arms |= {"no_penalty", "pixel_penalty"}
    assert arms <= set(small.compare)
    _, paper = load_config("smooth_trajectories/paper")
    defaults = SmoothTrajectoriesConfig()
    assert paper.method_args == defaults
    assert (paper.experts.count, paper.experts.train.epochs, paper.train.steps) == (100, 50, 5000)
    assert (paper.zca, paper.data.name, paper.synthetic.per_class) == (0.1, "cifar100", 1)
