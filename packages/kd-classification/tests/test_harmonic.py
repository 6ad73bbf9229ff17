"""Harmonic heads: distances and losses in numbers, gradients, invariances, exports, timm networks, whole runs."""

from __future__ import annotations

import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_classification import heads
from kd_classification.data import Batch, DataConfig, load_data
from kd_classification.heads import (
    DISTANCES,
    LINEAR,
    HarmonicHead,
    bray_curtis,
    canberra,
    chebyshev_smooth,
    cosine,
    euclidean,
    hamming,
    load_harmonic,
    mahalanobis,
    minkowski,
    save_harmonic,
    with_harmonic_head,
)
from kd_classification.methods.harmonic import (
    Harmonic,
    features_of,
    harmonic_loss,
    prototype_metrics,
    spectrum_metrics,
)
from kd_classification.testing import stock_classifier
from kdcore.config import read_yaml
from kdcore.errors import InputError
from kdcore.losses import soft_target_kl
from kdcore.method import arm_config, find_config, load_config
from kdcore.run import train

TINY = ["train.epochs=2", "data.per_class=6", "student.args.channels=[4,4,8,8]", "student.args.stem_width=4"]


def double(values, **options) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, **options)


F1, W3 = double([[1.0, 2.0]]), double([[1.0, 0.0], [4.0, 6.0], [-1.0, 2.0]])
P2 = double([[2.0, 0.5], [0.5, 1.0]])
HAND = {
    "euclidean": (euclidean, (2, 5, 2), 0.7701082),
    "manhattan": (lambda f, w: minkowski(f, w, p=1.0), (2, 7, 2), 0.733153),
    "minkowski 3": (lambda f, w: minkowski(f, w, p=3.0), (2, 4.497941, 2), 0.787417),
    "chebyshev": (lambda f, w: minkowski(f, w, p=math.inf), (2, 4, 2), 0.810930),
    "cosine": (cosine, (0.552786, 0.007722, 0.4), 8.542332),
    "bray_curtis_standard": (lambda f, w: bray_curtis(f, w, form="standard"), (0.5, 0.538462, 0.5), 1.051606),
    "bray_curtis": (bray_curtis, (0.5, 0.538462, 0.333333), 1.413969),
    "canberra": (canberra, (1, 1.1, 1), 1.039020),
    "mahalanobis": (lambda f, w: mahalanobis(f, w, P2), (2, 6.782330, 2.828427), 0.461818),
}


def pair(seed: int, batch: int = 5, classes: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return f, torch.randn(classes, width, generator=generator, dtype=torch.float64)


def head(distance: str, classes: int = 4, width: int = 6, **settings) -> HarmonicHead:
    torch.manual_seed(0)
    return HarmonicHead(width, classes, distance=distance, **settings).double()


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", HAND)
def test_distances_and_losses_by_hand(name):
    distance, wanted, loss = HAND[name]
    found = distance(F1, W3)
    assert found[0].tolist() == pytest.approx(wanted, abs=5e-7)
    assert harmonic_loss(found, torch.tensor([0]), 2.0).item() == pytest.approx(loss, abs=1e-6)


def test_euclidean_gradient_by_hand():
    f, w = F1.clone().requires_grad_(), W3.clone().requires_grad_()
    harmonic_loss(euclidean(f, w), torch.tensor([0]), 2.0).backward()
    assert f.grad[0].tolist() == pytest.approx([-0.4451852, 0.5607407], abs=1e-7)
    wanted = [[0.0, -0.5370370], [-0.0177778, -0.0237037], [0.4629630, 0.0]]
    torch.testing.assert_close(w.grad, double(wanted), atol=1e-7, rtol=0)
    assert (f.grad + w.grad.sum(0)).abs().max() < 1e-12, "moving features and prototypes together changes nothing"


@pytest.mark.parametrize("distance", DISTANCES)
def test_head_is_the_log_of_the_power_form(distance):
    """Log space against p = d^-n / sum d^-n, the released ratio form; and its gradient against finite differences."""
    module = head(distance, n=1.5).eval()
    f = pair(1)[0]
    d = module.distances(f)
    power = d**-1.5
    torch.testing.assert_close(module(f).softmax(1), power / power.sum(1, keepdim=True))
    smallest = d / d.min(1, keepdim=True).values
    torch.testing.assert_close(module(f).softmax(1), (smallest**-1.5) / (smallest**-1.5).sum(1, keepdim=True))
    if "hard" not in distance:  # whose gradient is another function's
        assert torch.autograd.gradcheck(module, f.requires_grad_())


def test_the_released_squared_form_is_twice_the_exponent():
    f = pair(2)[0]
    squared, plain = head("euclidean", n=1.5, exponent_on="squared"), head("euclidean", n=3.0)
    torch.testing.assert_close(squared(f), plain(f))
    w = plain.weight
    gram = f.square().sum(1, keepdim=True) + w.square().sum(1) - 2 * f @ w.T + 1e-4
    torch.testing.assert_close(squared(f).softmax(1), gram**-1.5 / (gram**-1.5).sum(1, keepdim=True))


# ---------------------------------------------------------------- properties


@given(seed=st.integers(0, 500), scale=st.floats(0.1, 10))
def test_homogeneous_distances_do_not_see_the_unit(seed, scale):
    f, w = pair(seed, width=2)
    for name, (distance, _, _) in HAND.items():
        before = (-2 * distance(f, w).log()).softmax(1)
        assert torch.allclose((-2 * distance(scale * f, scale * w).log()).softmax(1), before, atol=1e-9), name


@given(seed=st.integers(0, 500), scale=st.floats(0.1, 10))
def test_cosine_sees_directions_alone(seed, scale):
    f, w = pair(seed)
    stretched = torch.cat([scale * w[:1], w[1:]]).requires_grad_()
    loss = harmonic_loss(cosine(f, stretched), torch.tensor([0, 1, 2, 3, 0]))
    assert torch.allclose(loss, harmonic_loss(cosine(scale * f, w), torch.tensor([0, 1, 2, 3, 0])), atol=1e-10)
    loss.backward()
    assert (stretched.grad * stretched).sum(1).abs().max() < 1e-9


@given(seed=st.integers(0, 500))
def test_distances_are_related_as_they_should(seed):
    f, w = pair(seed)
    assert torch.allclose(minkowski(f, w, p=2.0), euclidean(f, w), atol=1e-7)
    assert torch.allclose(mahalanobis(f, w, torch.ones(6, dtype=torch.float64)), euclidean(f, w), atol=1e-7)
    assert torch.allclose(mahalanobis(f, w, torch.eye(6, dtype=torch.float64)), euclidean(f, w), atol=1e-7)
    largest, smooth = minkowski(f, w, p=math.inf), chebyshev_smooth(f, w)
    assert bool((largest <= smooth + 1e-12).all())
    assert bool((smooth <= largest + math.log(6) / 10 + 1e-12).all())
    share = bray_curtis(f, w)
    assert bool(((share >= 0) & (share <= 1 + 1e-12)).all())


def test_learned_precisions_start_where_they_should():
    f = pair(3)[0]
    diagonal = head("mahalanobis_diagonal", eps=1e-12)
    torch.testing.assert_close(diagonal.distances(f), euclidean(f, diagonal.weight))
    factor = head("mahalanobis_cholesky", eps=1e-12)
    torch.testing.assert_close(factor.precision(), 0.01 * torch.eye(6).double(), atol=1e-8, rtol=0)
    factor.metric.data = torch.eye(6).double() + torch.ones(6, 6).triu(1)  # above the diagonal nothing counts
    torch.testing.assert_close(factor.distances(f), euclidean(f, factor.weight))
    full = head("mahalanobis", eps=1e-12)
    torch.testing.assert_close(full.precision(), 1.02 * torch.eye(6).double(), atol=1e-6, rtol=0)
    full.metric.data = full.metric.data + torch.randn(6, 6).double()
    assert torch.equal(full.precision(), full.precision().T)


@given(temperature=st.floats(0.2, 10), seed=st.integers(0, 50))
def test_a_temperature_divides_the_exponent(temperature, seed):
    f, w = pair(seed)
    scores = -3.0 * euclidean(f, w).log()
    other = -3.0 / temperature * euclidean(f, w).log()
    assert torch.allclose((scores / temperature).softmax(1), other.softmax(1), atol=1e-12)
    teacher = torch.randn(5, 4, dtype=torch.float64)
    kd = soft_target_kl(scores, teacher, temperature)
    assert torch.allclose(kd, temperature**2 * soft_target_kl(other, teacher / temperature, 1.0))


def test_extremes_of_the_exponent():
    f, w = pair(4)
    d = euclidean(f, w)
    assert torch.equal((-500 * d.log()).softmax(1).round(), F.one_hot(d.argmin(1), 4).double())
    assert torch.allclose((-1e-12 * d.log()).softmax(1), torch.full((5, 4), 0.25).double(), atol=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_feature_on_its_prototype_is_finite(distance):
    losses = []
    for eps in (1e-2, 1e-4, 1e-6):
        module = head(distance, eps=eps).eval()
        f = module.weight.detach()[:1].clone().requires_grad_()
        loss = F.cross_entropy(module(f), torch.tensor([0]))
        loss.backward()
        losses.append(loss.item())
        assert bool(torch.isfinite(f.grad).all())
        assert all(bool(torch.isfinite(p.grad).all()) for p in module.parameters())
    assert losses[0] >= losses[1] >= losses[2]
    # bits of small prototypes are all alike when hard, and the smooth maximum of zeros is log(D) / a
    if distance not in ("hamming_hard", "chebyshev_smooth"):
        assert losses[2] < 0.1


def test_hard_and_noisy_bits():
    f, w = double([[0.9, 0.1, 0.7]]).requires_grad_(), double([[0.8, 0.9, -1.0], [0.0, 0.0, 0.0]])
    d = hamming(f, w, form="hard")
    assert d[0].tolist() == [2.0, 2.0]
    d[0, 0].backward()
    soft = torch.sigmoid(f.detach()) * (1 - torch.sigmoid(f.detach()))
    torch.testing.assert_close(f.grad, soft * double([[0.0, -1.0, 1.0]]))
    noisy = head("hamming_gumbel")
    g = pair(0)[0]
    assert not torch.equal(noisy(g), noisy(g))
    noisy.eval()
    assert torch.equal(noisy(g), noisy(g))


@pytest.mark.parametrize("distance", ["canberra", "canberra_robust", "canberra_weighted", "chebyshev_smooth"])
def test_classes_in_chunks_are_the_same(distance, monkeypatch):
    module = head(distance)
    results = []
    for block in (2**24, 40):
        monkeypatch.setattr(heads, "BLOCK", block)
        module.zero_grad()
        f = pair(5)[0].requires_grad_()
        scores = module(f)
        scores.square().sum().backward()
        results.append((scores.detach(), f.grad, module.weight.grad.clone()))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_linear_layer_has_the_same_argmax(distance):
    module = head(distance)
    if distance.startswith("mahalanobis_c"):
        module.metric.data = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()
    linear = module.linear()
    assert (linear is not None) == (distance in LINEAR)
    if linear is not None:
        f = torch.randn(1000, 6, generator=torch.Generator().manual_seed(2)).double()
        assert torch.equal(F.linear(f, *linear).argmax(1), module(f).argmax(1))


def test_half_precision_and_autocast_are_computed_in_float32():
    module = HarmonicHead(6, 4, n=28.0, distance="euclidean")
    f = pair(6)[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = module(f)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, module(f))
    assert bool(torch.isfinite(module(f.half())).all())


# ---------------------------------------------------------------- in networks


@pytest.mark.parametrize(
    "name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "pvt_v2_b0", "resnetv2_50", "convnext_atto"]
)
@pytest.mark.slow
def test_any_timm_network_takes_a_head_and_comes_back(name, tmp_path):
    data = load_data(DataConfig(image_size=32, channels=3, per_class=2))
    options = {"img_size": 32, "patch_size": 8} if name.startswith("vit") else {}
    images = next(iter(data.test.loader(8))).images
    for distance in ("euclidean", "bray_curtis"):
        model = with_harmonic_head(timm.create_model(name, num_classes=10, **options), distance=distance).eval()
        folder = tmp_path / distance
        save_harmonic(model, folder, data)
        torch.testing.assert_close(load_harmonic(folder).eval()(images), model(images))
        stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        if distance == "euclidean":
            assert torch.equal(stock(images).argmax(1), model(images).argmax(1))
        else:
            assert stock.num_classes == 0


def test_what_cannot_take_a_head_is_named():
    with pytest.raises(InputError, match="did you mean 'euclidean'"):
        HarmonicHead(4, 2, distance="euclid")
    with pytest.raises(InputError, match="n = 0"):
        HarmonicHead(4, 2, n=0)
    with pytest.raises(InputError, match="width 3; the prototypes have 4"):
        HarmonicHead(4, 2)(torch.zeros(1, 3))
    with pytest.raises(InputError, match="its classifier is NoneType; allowed: a linear layer"):
        with_harmonic_head(nn.Linear(2, 2))
    with pytest.raises(InputError, match="its classifier is Identity; allowed: a linear layer"):
        with_harmonic_head(timm.create_model("resnet10t", num_classes=0))


@pytest.mark.parametrize(
    ("name", "options", "places"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 1}, ["head", "head_dist"]),
        ("levit_128s", {"img_size": 64, "depth": (1, 1, 1)}, ["head.linear", "head_dist.linear"]),
        ("repvit_m0_9", {}, ["head.head.l", "head.head_dist.l"]),
    ],
)
@pytest.mark.slow
@torch.no_grad()
def test_classifiers_in_pairs_and_behind_a_norm(name, options, places, tmp_path):
    torch.manual_seed(0)
    data = load_data(DataConfig(image_size=64 if "levit" in name else 32, channels=3, per_class=2))
    model = timm.create_model(name, num_classes=10, **options)
    images = next(iter(data.test.loader(4))).images
    assert heads.classifier_names(model) == places
    with_harmonic_head(model, distance="euclidean").train()
    model(images)  # moves the statistics of a norm before the classifier
    model.eval()
    assert all(isinstance(model.get_submodule(place), HarmonicHead) for place in places)
    scores = [[] for _ in places]
    for place, seen in zip(places, scores, strict=True):
        model.get_submodule(place).register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
    torch.testing.assert_close(model(images), sum(seen[0] for seen in scores) / len(places))
    save_harmonic(model, tmp_path, data)
    torch.testing.assert_close(load_harmonic(tmp_path).eval()(images), model(images))
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 0
    with pytest.raises(InputError, match="no single classifier"):
        heads.classifier_name(model)


def test_features_are_what_the_classifier_reads():
    data = load_data(DataConfig(image_size=32, channels=3, per_class=2))
    torch.manual_seed(0)
    model = with_harmonic_head(timm.create_model("resnet10t", num_classes=10), distance="cosine").eval()
    found, images = features_of(model, data.train_plain), next(iter(data.train_plain.loader(20))).images
    with torch.no_grad():
        torch.testing.assert_close(model.fc(found), model(images))


def test_a_broken_head_file_is_named(tmp_path):
    data = load_data(DataConfig(per_class=2))
    model = with_harmonic_head(timm.create_model("resnet10t", num_classes=10, in_chans=1))
    save_harmonic(model, tmp_path, data)
    (tmp_path / "harmonic.json").write_text(json.dumps({"heads": {"fc": {"width": 3}}, "linear_export": True}))
    with pytest.raises(InputError, match="not a harmonic head"):
        load_harmonic(tmp_path)


class Scores(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.fc = nn.Linear(1, 1)
        self.values = nn.Parameter(double(values))

    def get_classifier(self):
        return self.fc

    def forward(self, images):
        return self.values


def test_a_teacher_goes_on_top():
    student, teacher = [[1.0, 0.0, -1.0]], [[2.0, 0.0, -2.0]]
    distiller = Harmonic(Scores(teacher), Scores(student), kd_weight=0.7, temperature=4.0)
    batch = Batch(torch.zeros(1, 1), torch.tensor([0]), torch.tensor([0]))
    wanted = 0.3 * F.cross_entropy(double(student), torch.tensor([0])) + 0.7 * soft_target_kl(
        double(student), double(teacher), 4.0
    )
    assert distiller.loss(batch).total().item() == pytest.approx(float(wanted))
    with pytest.raises(InputError, match="needs a teacher"):
        Harmonic(None, Scores(student), kd_weight=0.5)


def test_metrics_of_prototypes_and_spectrum():
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    labels = torch.tensor([0, 0, 1, 1])
    exact = prototype_metrics(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), features, labels)
    assert exact == {"prototype_cosine": pytest.approx(1.0), "prototype_distance": 0.0}
    shifted = prototype_metrics(torch.tensor([[2.0, 2.0], [0.0, 2.0]]), features, labels)
    assert shifted["prototype_cosine"] == pytest.approx((math.sqrt(0.5) + 1) / 2)
    assert shifted["prototype_distance"] == pytest.approx(0.5)
    features[:2] = 0.0
    dead = prototype_metrics(torch.tensor([[0.1, 0.0], [0.0, 2.0]]), features, labels)
    assert dead == {"prototype_cosine": pytest.approx(1.0), "prototype_distance": pytest.approx(0.05)}
    flat = spectrum_metrics(torch.randn(400, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 5))
    assert flat["effective_rank"] == pytest.approx(1.0, abs=1e-6)
    assert (flat["dimensions_90"], flat["participation_ratio"]) == (1.0, pytest.approx(1.0))
    round_ = spectrum_metrics(torch.eye(4).repeat(50, 1) - 0.25)
    assert round_["effective_rank"] == pytest.approx(3.0, abs=1e-6)


# ---------------------------------------------------------------- runs


def run(folder, *overrides):
    method, config = load_config("harmonic/small", [*TINY, *overrides])
    return method, config, train(method, config, folder, quiet=True, cpu=True)


def test_a_run_ships_a_stock_network_and_its_head(tmp_path):
    method, config, metrics = run(tmp_path / "run")
    assert metrics["export_agreement"] == 1.0
    student = timm.create_model(f"local-dir:{tmp_path / 'run/student'}", pretrained=True).eval()
    data = load_data(config.data, config.seed)
    with torch.no_grad():
        answers = torch.cat([student(b.images).argmax(1) for b in data.test.loader(512)])
    assert float((answers == data.test.labels).double().mean()) == pytest.approx(metrics["student/accuracy"])
    assert json.loads((tmp_path / "run/student/harmonic.json").read_text())["heads"]["fc"]["distance"] == "cosine"
    samples = method.predict(config, {"student": tmp_path / "run/student"}, 4)
    assert len(samples) == 4


def test_linear_arm_and_a_distance_without_export(tmp_path):
    _, _, linear = run(tmp_path / "linear", "method_args.head=linear")
    assert "export_agreement" not in linear
    assert not (tmp_path / "linear/student/harmonic.json").exists()
    _, _, manhattan = run(tmp_path / "manhattan", "method_args.head=manhattan")
    assert "export_agreement" not in manhattan
    assert manhattan["student/accuracy"] > 0


def test_with_a_teacher(tmp_path):
    teacher = "teacher={name: resnet18, args: {layers: [1,1,1,1], channels: [4,4,8,8]}, train: {epochs: 1}}"
    _, _, metrics = run(tmp_path / "run", teacher, "method_args.kd_weight=0.5")
    assert {"teacher/accuracy", "agreement", "norm_growth"} <= set(metrics)


@pytest.mark.slow
def test_prototypes_come_to_lie_at_the_class_means(tmp_path):
    """The mechanism: harmonic prototypes are class centres, a linear layer's rows are not."""
    full = ["data.per_class=30", "train.epochs=60"]
    wide = ["student.args.channels=[8,16,32,64]", "student.args.stem_width=8"]
    _, _, harmonic = run(tmp_path / "harmonic", *full, *wide, "method_args.head=euclidean")
    _, _, linear = run(tmp_path / "linear", *full, *wide, "method_args.head=linear")
    assert harmonic["prototype_cosine"] > 0.9 > 0.6 > linear["prototype_cosine"]
    assert harmonic["prototype_distance"] < linear["prototype_distance"]


@pytest.mark.slow
def test_the_export_loads_where_kd_cannot_be_imported(tmp_path):
    run(tmp_path / "run", "method_args.head=euclidean")
    opened = stock_classifier(tmp_path / "run/student", (1, 16, 16))
    assert opened == ([2, 10], "ResNet", ["Linear"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_args.head=euclid", "method_args.head"),
        ("method_args.n=0", "method_args.n"),
        ("method_args.kd_weight=0.5", "teacher and method_args.kd_weight"),
        ("student.name=deit_tiny_distilled_patch16_224", "no single classifier"),
    ],
)
def test_bad_input_is_named_before_anything_trains(tmp_path, override, message):
    extra = ["student.args={img_size: 16}"] if "deit" in override else []
    with pytest.raises(InputError, match=message):
        train(*load_config("harmonic/small", [override, *extra]), tmp_path / "run", quiet=True, cpu=True)
    assert not (tmp_path / "run").exists()


def test_configs_say_what_they_are():
    for name in ("small", "paper"):
        values = read_yaml(find_config(f"harmonic/{name}"))
        assert values["compare"]["ce"] == {"method_args.head": "linear"}
        for overrides in ({}, *values["compare"].values()):
            arm_config(values, overrides)
    _, paper = load_config("harmonic/paper")
    assert (paper.student.name, paper.method_args.head, paper.method_args.n) == ("pvt_v2_b0", "cosine", 1.0)
