"""NCFM: the discrepancy in numbers, the two players, an iteration, whole runs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kd_classification.engine.convnet import ConvNet
from kd_classification.engine.diff_augment import DiffAugment
from kd_classification.engine.experts import flat_parameters
from kd_classification.engine.real_images import ClassBatch, ClassSteps, RealImages
from kd_classification.engine.synthetic import LearnableImages, Preprocessing, SyntheticSet
from kd_classification.methods.ncfm import (
    METHOD,
    NCFM,
    FrequencySampler,
    mean_distance,
    ncfd,
)
from kdcore.compare import load_arms
from kdcore.config import OptimizerConfig
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import evaluate, train

FLOOR = math.sqrt(0.5 * 1e-12)
SHORT = [
    "train.epochs=3",
    "experts.count=2",
    "experts.train.epochs=1",
    "evaluation.train.steps=10",
    "evaluation.repeats=2",
    "evaluation.networks={}",
    "synthetic.per_class=2",
    "network.args={width: 8, depth: 2}",
    "method_args.frequencies=32",
    "method_args.real_batch=16",
]


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def features(seed: int, rows: int, width: int = 3) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- the discrepancy


@pytest.mark.parametrize(
    ("real", "synthetic", "t", "alpha", "expected"),
    [
        (column(0.0), column(math.pi / 2), 1.0, 0.5, 1.0),  # amp 0, pha 2
        (column(0.0), column(math.pi / 2), 1.0, 1.0, 1e-6),
        (column(0.0), column(math.pi / 2), 1.0, 0.0, 1.4142135624),
        (column(0.0, math.pi), column(math.pi / 2), 1.0, 0.5, 0.7071067812),  # amp 1, pha at its floor
        (column(-1.0, 1.0), column(0.0), 0.5, 0.5, 0.0865622),  # equal means, other spread
        (column(-1.0, 1.0), column(0.0), 1.0, 0.5, 0.3250554),
        (column(-1.0, 1.0), column(0.0), 2.0, 0.5, 1.0013670),
    ],
)
def test_values(real, synthetic, t, alpha, expected):
    assert ncfd(real, synthetic, column(t), alpha).item() == pytest.approx(expected, abs=6e-8, rel=1e-6)


def test_mean_matching_does_not_see_the_spread():
    assert mean_distance(column(-1.0, 1.0), column(0.0)).item() == 0
    assert mean_distance(column(1.0, 3.0), column(0.0)).item() == 4


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 6))
def test_at_one_half_it_is_the_distance_of_the_two_functions(seed, n, k):
    real, synthetic, t = features(seed, n), features(seed + 1, k), features(seed + 2, 20)
    difference = torch.exp(1j * (t @ real.T)).mean(1) - torch.exp(1j * (t @ synthetic.T)).mean(1)
    assert ncfd(real, synthetic, t).item() == pytest.approx(math.sqrt(0.5) * difference.abs().mean().item(), rel=1e-5)


@given(st.integers(0, 1000), st.floats(0, 1))
def test_symmetries(seed, alpha):
    real, synthetic, t = features(seed, 5), features(seed + 1, 3), features(seed + 2, 8)
    value = ncfd(real, synthetic, t, alpha).item()
    assert ncfd(synthetic, real, t, alpha).item() == pytest.approx(value, rel=1e-9)
    assert ncfd(real, synthetic, -t, alpha).item() == pytest.approx(value, rel=1e-9)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    assert ncfd(real, synthetic[order].repeat(2, 1), t, alpha).item() == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize(("alpha", "floor"), [(0.5, FLOOR), (0.0, 1e-6), (1.0, 1e-6)])
def test_equal_sets_are_at_the_floor_with_a_finite_gradient(alpha, floor):
    real, t = features(0, 4), features(1, 16)
    synthetic = real[[2, 0, 3, 1]].repeat(2, 1).requires_grad_()
    value = ncfd(real, synthetic, t, alpha)
    assert value.item() == pytest.approx(floor, rel=1e-3)
    assert torch.autograd.grad(value, synthetic)[0].isfinite().all()
    zero = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)  # phi of {0, pi} at 1 is exactly 0
    gradient = torch.autograd.grad(ncfd(column(0.0, 1.0), zero + column(0.0, math.pi), column(1.0)), zero)[0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradients(alpha):
    real, synthetic, t = features(0, 4), features(1, 3).requires_grad_(), features(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, f: ncfd(real, s, f, alpha), (synthetic, t))


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match=r"shapes \(2, 3\), \(2, 4\), \(5, 3\)"):
        ncfd(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(5, 3))
    with pytest.raises(InputError, match=r"alpha = 1\.5"):
        ncfd(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(5, 3), 1.5)


# ---------------------------------------------------------------- the sampling network


def test_sampler_tiles_or_mixes():
    torch.manual_seed(0)
    tiled = FrequencySampler(6, 48, sampling="tiled")
    t = tiled(*tiled.noise(torch.device("cpu")))
    assert t.shape == (48, 6)
    assert tiled.components == 3
    assert torch.equal(t[:3], t[45:])
    assert t.abs().max() < 1
    mixture = FrequencySampler(6, 48, components=4, sampling="scale_mixture")
    noise, normals = mixture.noise(torch.device("cpu"))
    t = mixture(noise, normals)
    scales = mixture.layers(noise)
    torch.testing.assert_close(t[5], scales[1] * normals[5])
    assert len(t.unique(dim=0)) == 48
    assert [type(layer).__name__ for layer in tiled.layers] == [
        *("Linear", "BatchNorm1d", "LeakyReLU") * 2,
        *("Linear", "BatchNorm1d", "Tanh"),
    ]


def test_psi_raises_the_discrepancy_of_frozen_images():
    torch.manual_seed(0)
    real, synthetic = (F.normalize(torch.randn(n, 8) + shift, dim=1) for n, shift in ((60, 0.0), (6, 0.3)))
    sampler = FrequencySampler(8, 64, sampling="scale_mixture")
    optimizer = torch.optim.SGD(sampler.parameters(), lr=0.1, momentum=0.5)

    noises = [sampler.noise(real.device) for _ in range(30)]

    def found() -> Tensor:
        with torch.no_grad():
            return torch.stack([ncfd(real, synthetic, sampler(*noise)) for noise in noises])

    before = found()
    for _ in range(100):
        optimizer.zero_grad()
        (-ncfd(real, synthetic, sampler(*sampler.noise(real.device)))).backward()
        optimizer.step()
    gain = found() - before  # paired: the same noise
    assert gain.mean() > 3 * gain.std() / math.sqrt(30)


# ---------------------------------------------------------------- the distiller


def problem(**arguments) -> tuple[NCFM, ClassSteps]:
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    real = RealImages((torch.rand(40, 1, 8, 8) * 120 + 100 * labels.view(-1, 1, 1, 1)).byte(), labels, 2)
    network = ConvNet(num_classes=2, in_chans=1, img_size=8, width=4, depth=2)
    initial = flat_parameters(network)[None]
    trained = initial + 0.1 * torch.randn_like(initial)
    factor = arguments.pop("factor", 1)
    arguments = {"frequencies": 32, "components": 4, "real_batch": 10, **arguments}
    operations = arguments.pop("operations", ["color", "crop"])
    images = LearnableImages(torch.rand(6, 1, 8, 8), torch.tensor([0, 0, 0, 1, 1, 1]))
    distiller = NCFM(
        images,
        network,
        initial,
        trained,
        Preprocessing([0.5], [0.25]),
        DiffAugment(operations, "layered", siamese=True),
        factor=factor,
        fresh=lambda: ConvNet(num_classes=2, in_chans=1, img_size=8, width=4, depth=2),
        optimizer=OptimizerConfig(name="adamw", lr=1e-2),
        **arguments,
    )
    distiller.epoch_start()
    return distiller, ClassSteps(real, 10, distiller.args.calibration_passes, seed=0)


def test_networks_of_an_iteration(monkeypatch):
    distiller, _ = problem()
    between = flat_parameters(distiller.network)
    start, end = distiller.initial[0], distiller.trained[0]
    share = ((between - end) / (start - end)).median().item()
    assert 0 < share < 1
    torch.testing.assert_close(between, share * start + (1 - share) * end)
    torch.testing.assert_close(flat_parameters(distiller.classifier), end)
    distiller.epoch_start()
    assert torch.equal(flat_parameters(distiller.network), between), "the draw is a function of seed and epoch"
    distiller.progress.epoch = 1
    distiller.epoch_start()
    assert not torch.equal(flat_parameters(distiller.network), between)
    for share, weights in ((1.0, start), (0.0, end)):  # l = 1 is the initial network, l = 0 the trained one
        monkeypatch.setattr(torch, "rand", lambda *_, share=share, **__: torch.tensor(share))
        distiller.epoch_start()
        torch.testing.assert_close(flat_parameters(distiller.network), weights, rtol=0, atol=0)
    monkeypatch.undo()
    last, _ = problem(networks="trained")
    torch.testing.assert_close(flat_parameters(last.network), last.trained[0])
    fresh, _ = problem(networks="random")
    assert not torch.equal(flat_parameters(fresh.network), fresh.trained[0])


def test_only_the_images_of_the_class_and_psi_get_gradients():
    distiller, steps = problem(factor=2)
    batch = list(steps)[1]
    distiller.loss(batch).total().backward()
    gradient = distiller.student.images.grad
    assert gradient[:3].abs().max() == 0
    assert gradient[3:].flatten(1).abs().max(1).values.min() > 0
    assert all(parameter.grad is None for parameter in distiller.network.parameters())
    assert all(parameter.grad is None for parameter in distiller.sampler.parameters())
    kept = gradient.clone()
    distiller.loss(batch, "frequencies").total().backward()
    assert torch.equal(distiller.student.images.grad, kept), "psi's turn leaves the images' gradient alone"
    assert sum(parameter.grad.abs().sum() for parameter in distiller.sampler.parameters()) > 0


def test_both_players_move_the_same_loss_at_the_same_time():
    distiller, steps = problem(operations=[])
    batch = next(iter(steps))
    images, sampler = distiller.student.images, distiller.sampler
    value = distiller.loss(batch)["match"][1]
    noise = distiller.held[2]

    def again() -> float:
        distiller.sampler.noise, kept = (lambda device: noise), distiller.sampler.noise
        found = distiller.match(batch).item()
        distiller.sampler.noise = kept
        return found

    assert again() == pytest.approx(value.item())
    with torch.no_grad():  # what the images' optimiser may do between the two turns does not matter to psi's
        moved = images.add(0.0).clone()
        images.add_(0.3)
    ascent = distiller.loss(batch, "frequencies")["ascent"][1]
    with torch.no_grad():
        images.copy_(moved)
    assert ascent.item() == pytest.approx(-value.item())
    image_gradient = torch.autograd.grad(value, images)[0]
    psi_gradients = torch.autograd.grad(ascent, list(sampler.parameters()))
    with torch.no_grad():
        images.sub_(1e-4 * image_gradient)
    assert again() < value.item()
    with torch.no_grad():
        images.copy_(moved)
        for parameter, gradient in zip(sampler.parameters(), psi_gradients, strict=True):
            parameter.sub_(1e-4 * gradient)
    assert again() > value.item()


def test_an_iteration_in_a_loop_of_ones_own():
    distiller, steps = problem()
    players = {player.name: player for player in distiller.players()}
    assert list(players) == ["images", "frequencies"]
    optimizers = {
        "images": players["images"].optimizer([{"params": [distiller.student.images]}]),
        "frequencies": players["frequencies"].optimizer([{"params": list(distiller.sampler.parameters())}]),
    }
    assert [batch.label for batch in steps] == [0, 1, 0, 1]
    assert [len(batch.real) for batch in steps] == [10, 10, 0, 0]
    psi = []
    for batch in steps:
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            distiller.loss(batch, name).total().backward()
            optimizer.step()
        psi.append(flat_parameters(distiller.sampler))
    assert not torch.equal(psi[0], psi[1])
    assert torch.equal(psi[1], psi[3]), "calibration leaves psi alone"
    with torch.no_grad():
        distiller.student.images.add_(2)
    distiller.epoch_end()
    assert distiller.student.images.max() <= 1


@pytest.mark.parametrize("rate", [1e-3, 0.0])
def test_psi_moves_by_its_own_rate_alone(rate):
    distiller, steps = problem(sampling="tiled", sampler_lr=rate)
    (player,) = (player for player in distiller.players() if player.name == "frequencies")
    optimizer = player.optimizer([{"params": list(distiller.sampler.parameters())}])
    before = flat_parameters(distiller.sampler)
    for batch in list(steps)[:2]:
        distiller.loss(batch)
        optimizer.zero_grad()
        distiller.loss(batch, "frequencies").total().backward()
        optimizer.step()
    assert torch.equal(flat_parameters(distiller.sampler), before) == (rate == 0)


def test_terms_always_have_both_names_and_the_right_gradient():
    distiller, steps = problem(calibration_weight=0.5)
    match, _, calibrate, _ = steps
    terms = distiller.loss(match)
    assert list(terms) == ["match", "calibrate"]
    assert not terms["calibrate"][1].requires_grad
    terms = distiller.loss(calibrate)
    assert terms["calibrate"][0] == 0.5
    assert not terms["match"][1].requires_grad
    gradient = torch.autograd.grad(terms.total(), distiller.student.images)[0]
    assert gradient[:3].abs().sum() > 0
    assert gradient[3:].abs().max() == 0
    without, steps = problem(calibration_passes=0)
    assert list(without.loss(next(iter(steps)))) == ["match"]
    assert len(steps) == 2


def test_psi_asks_for_its_turn():
    distiller, steps = problem()
    batch = next(iter(steps))
    distiller.loss(batch)
    distiller.loss(batch, "frequencies")
    with pytest.raises(InputError, match="follows that of player 'images'"):
        distiller.loss(batch, "frequencies")


def test_images_permute_with_their_gradients():
    distiller, steps = problem(operations=[], sampling="gaussian")
    assert [player.name for player in distiller.players()] == ["images"]
    distiller, batch = distiller.double(), next(iter(steps))
    batch = batch._replace(real=batch.real.double())

    def gradient() -> Tensor:
        torch.manual_seed(3)
        return torch.autograd.grad(distiller.match(batch), distiller.student.images)[0][:3]

    before = gradient()
    with torch.no_grad():
        distiller.student.images[:3] = distiller.student.images[[2, 0, 1]]
    torch.testing.assert_close(gradient(), before[[2, 0, 1]])


def test_dm_is_the_distance_of_the_mean_features():
    distiller, steps = problem(matching="mean", operations=[])
    batch = next(iter(steps))
    with torch.no_grad():
        real, synthetic = distiller.features(batch.real), distiller.features(distiller.student.of_class(0))
    assert distiller.match(batch).item() == pytest.approx((real.mean(0) - synthetic.mean(0)).square().sum().item())
    assert distiller.sampler is None


def test_rate_is_halved_on_a_plateau():
    distiller, _ = problem(plateau_patience=2)
    optimizer = distiller.players()[0].optimizer([{"params": [distiller.student.images]}])
    seen = []
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(opt.param_groups[0]["lr"]))
    factors = []
    for total in (8.0, 6.0, 6.0, 7.0, 6.0, 5.0, 5.0):
        distiller.loss_sum.fill_(total)
        distiller.epoch_end()
        distiller.epoch_start()
        factors.append(distiller.rate_factor)
    assert factors == [1, 1, 1, 1, 0.5, 0.5, 0.5]
    before = distiller.student.images.detach().clone()
    distiller.student.images.grad = torch.ones_like(before)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert (before - distiller.student.images).mean().item() == pytest.approx(0.5e-2, rel=1e-2)


def test_class_batches_depend_on_seed_and_epoch_alone():
    _, steps = problem()
    first = [batch.real for batch in steps]
    again = [batch.real for batch in steps]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    steps.set_epoch(1)
    assert not torch.equal(next(iter(steps)).real, first[0])
    assert isinstance(next(iter(steps)), ClassBatch)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ncfm") / "run"
    method, config = load_config("ncfm/small", SHORT)
    return folder, train(method, config, folder, quiet=True, cpu=True)


def test_run_learns_saves_and_evaluates_again(run):
    folder, metrics = run
    saved = SyntheticSet.load(folder / "synthetic")
    assert saved.images.shape[1:] == (1, 8, 8)
    assert saved.images.min() >= 0
    assert saved.images.max() <= 1
    assert torch.bincount(saved.labels).tolist() == [metrics["images"] // 10] * 10
    assert 0 < metrics["student/accuracy"] <= 1
    assert 0.1 < metrics["teacher/accuracy"] <= 1
    assert evaluate(folder)["student/accuracy"] == metrics["student/accuracy"]
    rows = METHOD.predict(load_config("ncfm/small", SHORT)[1], {"synthetic": folder / "synthetic"}, 3)
    assert [row["caption"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["images"]["real"].shape == (8, 8)


class Stop(Exception):
    pass


def test_mtt_is_an_arm_of_the_same_config(tmp_path):
    (arm,) = (arm for arm in load_arms("ncfm/small", SHORT) if arm.name == "mtt")
    config = arm.config.model_copy(deep=True)
    config.train.steps, config.experts.train.epochs = 2, 9
    metrics = train(arm.method, config, tmp_path / "run", quiet=True, cpu=True)
    assert metrics["images"] == 20
    assert metrics["remaining_distance"] > 0


def test_resume_is_bit_exact(run, tmp_path, monkeypatch):
    folder, metrics = run
    method, config = load_config("ncfm/small", [*SHORT, "train.checkpoint_every=13"])
    loss, calls = NCFM.loss, []

    def cut(self, batch, player="images"):
        calls.append(player)
        if len(calls) == 70:
            raise Stop
        return loss(self, batch, player)

    monkeypatch.setattr(NCFM, "loss", cut)
    with pytest.raises(Stop):
        train(method, config, tmp_path / "run", quiet=True, cpu=True)
    monkeypatch.setattr(NCFM, "loss", loss)
    resumed = train(method, config, tmp_path / "run", quiet=True, cpu=True, resume=True)
    images = [SyntheticSet.load(place / "synthetic").images for place in (folder, tmp_path / "run")]
    assert torch.equal(*images)
    assert resumed["student/accuracy"] == metrics["student/accuracy"]


@pytest.mark.parametrize("arm", ["ce", "herding", "full"])
def test_baselines_are_chosen_not_learned(arm, tmp_path):
    _, config = load_config("ncfm/small", SHORT)
    overrides = [f"{key}={str(value).lower()}" for key, value in config.compare[arm].items()]
    method, config = load_config("ncfm/small", [*SHORT, *overrides])
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert metrics["images"] == (20 if arm != "full" else 899)
    assert metrics["spread"] == pytest.approx(1, abs=0.01) if arm == "full" else 0 < metrics["spread"] < 3
    assert metrics["student/accuracy"] > 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["synthetic.init=full"], "init: full is a baseline"),
        (["experts.train.steps=5"], "train needs epochs and no steps"),
        (["method_args.alpha=2"], "method_args.alpha"),
        (["synthetic.init=best"], "allowed: 'random'"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(InputError, match=message):
        load_config("ncfm/small", overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["network.name=resnet18", "network.args={}"], "running statistics"),
        (["network.name=resnet81"], "network.name = 'resnet81': not a timm model"),
        (["network.args={width: 8, depth: 5}"], "depth = 5 halves an image of 8 pixels"),
        (["data.augment.hflip=0.5"], "data.augment: give augment"),
        (["train.accumulation=2"], "train.accumulation = 2"),
        (["evaluation.learned_rate=true"], "ncfm learns no rate"),
        (["evaluation.networks={std: {name: resnet18}}"], "not a name for a network"),
    ],
)
def test_run_errors(overrides, message, tmp_path):
    method, config = load_config("ncfm/small", [*SHORT, *overrides])
    with pytest.raises(InputError, match=message):
        train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert not (tmp_path / "run").exists()


def test_configs():
    _, small = load_config("ncfm/small")
    assert {"ce", "herding", "full", "gaussian", "mean_matching", "dm", "mtt"} <= set(small.compare)
    _, mnist = load_config("ncfm/mnist")
    assert (mnist.data.name, mnist.synthetic.per_class, mnist.synthetic.factor) == ("idx", 10, 1)
    assert {"ce", "herding", "dm", "mtt"} <= set(mnist.compare)
    _, paper = load_config("ncfm/paper")
    assert (paper.method_args.frequencies, paper.method_args.sampling) == (1024, "scale_mixture")
    assert (paper.synthetic.per_class, paper.synthetic.factor, paper.train.epochs) == (10, 2, 20000)
    assert (paper.experts.count, paper.data.name) == (20, "cifar10")
