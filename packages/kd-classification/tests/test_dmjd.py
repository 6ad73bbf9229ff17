"""DMJD: views that cover an image together, the losses of hidden and visible patches, and whole runs."""

import json
import os

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kd_classification.data import Batch, DataConfig, load_data
from kd_classification.engine import masked_vit as mv
from kd_classification.engine.hog import hog_targets
from kd_classification.engine.mae import DecoderConfig, masked_square_error
from kd_classification.engine.probing import LinearProbe
from kd_classification.methods.dmjd import (
    DMJD,
    disjoint_views,
    distance,
    expand_blocks,
    masked_loss,
    newly_hidden,
    scaled_learning_rate,
    visible_loss,
)
from kd_classification.testing import check_stock_encoder
from kdcore.compare import load_arms
from kdcore.config import OptimizerConfig
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.optim import make_optimizer
from kdcore.run import train

DECODER = DecoderConfig(width=16, depth=1, heads=2)


def vit(seed=0, width=16, depth=2, **args):
    torch.manual_seed(seed)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": width, "depth": depth, "num_heads": 2, **args}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=1, **size).double()


def batch(count=3):
    pixels = torch.randint(0, 256, (count, 1, 32, 32), generator=torch.Generator().manual_seed(5)).double()
    return Batch((pixels / 255 - 0.3) / 0.4, torch.zeros(count, dtype=torch.long), torch.arange(count))


def toy(student=None, teacher=None, **args):
    torch.manual_seed(3)
    given = {"mean": [0.3], "std": [0.4], "mask_type": "random", "decoder": DECODER, **args}
    return DMJD(student or vit(), teacher, **given).double()


def hidden_of(views, patches):
    return torch.stack([mv.mask_of(keep, patches).hidden for keep in views])


# ---------------------------------------------------------------- views


@pytest.mark.parametrize(
    ("patches", "m", "q", "kept", "extra", "union"),
    [
        (196, 0.6, 1.0, 78, 78, 196),
        (196, 0.75, 1.0, 49, 49, 196),
        (196, 0.6, 0.8, 78, 39, 157),
        (196, 0.4, 1.0, 117, 78, 157),
        (49, 0.6, 1.0, 19, 19, 49),
        (50, 0.9, 1.0, 5, 5, 50),  # 50 * (1 - 0.9) falls short of 5
    ],
)
def test_counts_of_two_views(patches, m, q, kept, extra, union):
    views = disjoint_views(4, patches, m, q)
    assert [view.shape for view in views] == [(4, kept)] * 2
    assert newly_hidden(patches, m, q, 2) == extra
    hidden = hidden_of(views, patches)
    assert (hidden.sum(2) == patches - kept).all()
    assert (hidden.any(0).sum(1) == union).all()
    if union == patches:
        assert not (~hidden[0] & ~hidden[1]).any()


@given(st.integers(0, 300), st.integers(8, 40), st.floats(0.2, 0.8), st.floats(0, 1), st.integers(1, 4))
def test_views_keep_their_count_and_cover_more_with_each(seed, patches, m, more, views):
    q = m + more * (1 - m)
    torch.manual_seed(seed)
    kept = disjoint_views(3, patches, m, q, views=views)
    hidden = hidden_of(kept, patches)
    assert (hidden.sum(2) == patches - mv.visible_count(patches, m)).all()
    union = patches - mv.visible_count(patches, m)
    for view in range(2, views + 1):
        union += min(newly_hidden(patches, m, q, view), patches - union)
        assert (hidden[:view].any(0).sum(1) == union).all()


def test_four_views_of_a_fifth_hide_four_fifths_and_five_hide_all():
    for views, union in ((4, 16), (5, 20), (6, 20)):
        hidden = hidden_of(disjoint_views(2, 20, 0.2, 1.0, views=views), 20)
        assert (hidden.any(0).sum(1) == union).all()


def test_without_more_to_predict_the_views_are_the_same_set():
    first, second = disjoint_views(5, 16, 0.5, 0.5)
    assert torch.equal(first.sort(1).values, second.sort(1).values)


def test_independent_views_cover_what_chance_covers():
    torch.manual_seed(0)
    hidden = hidden_of(disjoint_views(4000, 16, 0.625, disjoint=False), 16)
    share = hidden.any(0).double().mean().item()
    assert share == pytest.approx(1 - 0.375**2, abs=0.01)
    assert hidden_of(disjoint_views(4000, 16, 0.625), 16).any(0).all()


def test_every_image_and_every_patch_alike():
    torch.manual_seed(0)
    hidden = hidden_of(disjoint_views(8000, 16, 0.75, 0.9), 16).double()
    for view in hidden:
        torch.testing.assert_close(view.mean(0), torch.full((16,), 0.75).double(), rtol=0, atol=0.03)
    assert len({tuple(row.tolist()) for row in hidden[1]}) > 300


def test_blocks_are_hidden_whole():
    assert expand_blocks(torch.tensor([[0, 3, 4]]), (6, 6)).tolist() == [
        [0, 1, 6, 7, 12, 13, 18, 19, 14, 15, 20, 21]
    ]  # fmt: skip
    hidden = toy(vit(patch_size=4), mask_type="block", cells=1).draw(batch().images).hidden
    cells = hidden.view(2, 3, 4, 2, 4, 2).double().mean((3, 5))
    assert ((cells == 0) | (cells == 1)).all()
    assert (cells.sum((2, 3)) == 10).all()  # of 16 blocks, 6 are kept
    assert hidden.any(0).all()


# ---------------------------------------------------------------- losses


def test_huber_by_hand():
    errors = torch.tensor([1.0, -3, 2, 0.5], dtype=torch.float64)
    found = distance(errors, torch.zeros(4, dtype=torch.float64), "smooth_l1")
    assert found.tolist() == [0.25, 2, 1, 0.0625]
    assert found.mean().item() == 0.828125
    assert distance(errors, torch.zeros(4, dtype=torch.float64), "l2").tolist() == [1, 9, 4, 0.25]


def test_both_losses_by_hand():
    prediction = torch.tensor([[[[1.0, 1], [2, 0]]], [[[3, 3], [0, 0]]]], dtype=torch.float64)  # two views, one image
    target = torch.tensor([[[0.0, 1], [0, 0]]], dtype=torch.float64)
    hidden = torch.tensor([[[True, True]], [[True, False]]])
    assert masked_loss(prediction, target, hidden).item() == pytest.approx((0.5 + 2 + (9 + 4) / 2) / 3)
    keep = torch.tensor([[[1]], [[0]]])
    own = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 4.0]]]], dtype=torch.float64)
    assert visible_loss(own, target, keep).item() == pytest.approx((0.25 + 0 + 0 + 2) / 4)


def test_visible_patches_and_the_target_get_no_gradient():
    torch.manual_seed(0)
    prediction = torch.randn(2, 3, 8, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 8, 5, dtype=torch.float64, requires_grad=True)
    keep = torch.stack(disjoint_views(3, 8, 0.6))
    hidden = hidden_of(keep, 8)
    masked_loss(prediction, target, hidden).backward()
    assert (prediction.grad[~hidden] == 0).all()
    assert (prediction.grad[hidden] != 0).all()
    visible_loss(prediction[:, :, : keep.shape[2]], target, keep).backward()
    assert target.grad is None


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    prediction, target = 3 * torch.randn(2, 2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    hidden = torch.rand(2, 2, 4) < 0.5
    keep = torch.stack([torch.rand(2, 4).argsort(1) for _ in range(2)])
    for loss in ("l2", "smooth_l1"):

        def total(x, loss=loss):
            return masked_loss(x, target, hidden, loss) + visible_loss(x, target, keep, loss)

        assert torch.autograd.gradcheck(total, prediction.clone().requires_grad_())


def test_learning_rate_rule():
    assert scaled_learning_rate(6e-4, 512, 0.6, 1.0) == pytest.approx(2.0e-3)


# ---------------------------------------------------------------- the step


def test_the_loss_is_that_of_both_views_in_turn():
    distiller, x = toy(theta=0.7), batch()
    torch.manual_seed(0)
    terms = distiller.loss(x)
    torch.manual_seed(0)
    mask = distiller.draw(x.images)
    target = hog_targets(((x.images * 0.4 + 0.3) * 255).round(), 8)
    torch.testing.assert_close(distiller.targets(x.images), target)
    predicted, visible = [], []
    for keep in mask.keep:
        encoded = distiller.student.norm(mv.encode(distiller.student, x.images, keep).tokens)
        predicted.append(distiller.decoder(encoded, keep))
        visible.append(F.smooth_l1_loss(distiller.visible(encoded[:, 1:]), mv.gather_tokens(target, keep), beta=2.0))
    hidden = masked_square_error(torch.cat(predicted), target.repeat(2, 1, 1), mask.hidden.flatten(0, 1))
    torch.testing.assert_close(terms["masked"][1], hidden)
    torch.testing.assert_close(terms.total(), hidden + 0.7 * sum(visible) / 2)


def test_each_loss_reaches_its_own_head():
    distiller, x = toy(), batch()
    terms = distiller.loss(x)
    for term, silent in (("masked", "visible."), ("visible", "decoder.")):
        parameters = dict(distiller.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        found = torch.autograd.grad(terms[term][1], trained.values(), retain_graph=True, allow_unused=True)
        for name, gradient in zip(trained, found, strict=True):
            assert (gradient is None) == name.startswith(silent), (term, name)
    assert list(toy(theta=0.0).loss(x)) == ["masked"]


@pytest.mark.parametrize("theta", [0.0, 0.7])
def test_one_view_is_plain_masked_feature_prediction(theta):
    distiller, x = toy(views=1, theta=theta, prediction=0.6), batch()
    torch.manual_seed(0)
    total = distiller.loss(x).total()
    torch.manual_seed(0)
    keep, target = distiller.draw(x.images).keep[0], distiller.targets(x.images)
    encoded = distiller.student.norm(mv.encode(distiller.student, x.images, keep).tokens)
    expected = masked_square_error(distiller.decoder(encoded, keep), target, mv.mask_of(keep, 16).hidden)
    own = F.smooth_l1_loss(distiller.visible(encoded[:, 1:]), mv.gather_tokens(target, keep), beta=2.0)
    torch.testing.assert_close(total, expected + theta * own)


def test_without_theta_the_encoder_learns_from_the_hidden_patches_alone():
    found = []
    for theta in (0.0, 1.0):
        distiller = toy(theta=theta)
        torch.manual_seed(0)
        masked = distiller.loss(batch())["masked"][1] if theta else distiller.loss(batch()).total()
        parameters = [p for p in distiller.student.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(masked, parameters))
        assert theta or all(p.grad is None for p in distiller.visible.parameters())
    for plain, beside in zip(*found, strict=True):
        torch.testing.assert_close(plain, beside, rtol=0, atol=0)


def test_a_frozen_network_as_the_target():
    teacher = vit(7, width=24)
    distiller, x = toy(vit(), teacher, target="teacher"), batch()
    target = distiller.targets(x.images)
    torch.testing.assert_close(target, F.layer_norm(teacher.forward_features(x.images)[:, 1:], (24,)))
    distiller.loss(x).total().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(name.startswith("teacher") for name in distiller.checkpoint_state())
    assert toy(vit(), teacher).teacher is None  # gradient histograms need none


def test_the_encoder_ships_alone():
    distiller = toy()
    assert distiller.deployed() is distiller.student
    assert not distiller.student.pos_embed.requires_grad
    names = {name.split(".")[0] for name, p in distiller.named_parameters() if p.requires_grad}
    assert names == {"student", "decoder", "visible"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"cells": 3}, "cells = 3: does not divide patches of 8 pixels"),
        ({"corruption": 0.95}, "corruption = 0.95: leaves none of the 16 patches visible"),
        ({"target": "teacher"}, "target = 'teacher': no teacher is given"),
    ],
)
def test_what_does_not_fit_is_named(args, message):
    with pytest.raises(InputError, match=message):
        toy(**args)


def test_blocks_need_an_even_grid():
    with pytest.raises(InputError, match="mask_type = 'block': 3x3 patches do not form 2x2 blocks"):
        toy(vit(img_size=24), mask_type="block")


@pytest.mark.slow
def test_views_that_complement_each_other_make_the_gradient_steadier():
    """Digits, weights at random: variance of the encoder's gradient over 40 draws of the masks."""
    images = next(iter(load_data(DataConfig(name="digits", image_size=32)).train.loader(32))).images.double()
    x = Batch(images, torch.zeros(32), torch.arange(32))
    variances = {}
    for disjoint in (True, False):
        distiller = toy(disjoint=disjoint, theta=0.0)
        parameters = [p for p in distiller.student.parameters() if p.requires_grad]
        torch.manual_seed(0)
        draws = []
        for _ in range(40):
            found = torch.autograd.grad(distiller.loss(x).total(), parameters)
            draws.append(torch.cat([gradient.flatten() for gradient in found]))
        variances[disjoint] = torch.stack(draws).var(0).sum().item()
    assert variances[True] < variances[False]


# ---------------------------------------------------------------- the probe, configs and runs


def test_the_probe_steps_as_lars_does():
    probe = LinearProbe(vit(), 3, lars=OptimizerConfig(lr=1.6)).double()
    config = load_config("dmjd/paper")[1].probe.train
    optimizer = make_optimizer(probe.players()[0], config)
    x = batch()._replace(labels=torch.tensor([0, 1, 2]))
    probe.train()
    weight, bias = probe.student[1].weight, probe.student[1].bias
    before = weight.detach().clone(), bias.detach().clone()
    probe.loss(x).total().backward()
    optimizer.step()
    scale = 0.001 * before[0].norm() / weight.grad.norm()
    torch.testing.assert_close(weight.detach(), before[0] - 1.6 * scale * weight.grad)
    torch.testing.assert_close(bias.detach(), before[1] - 1.6 * bias.grad)
    assert all(parameter.grad is None for parameter in probe.teacher.parameters())


SHRUNK = [
    "data.per_class=8",
    "data.test_fraction=0.1",
    "train.epochs=2",
    "train.batch_size=20",
    "train.log_every=1",
    "finetune.train.epochs=1",
    "finetune.per_class=4",
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_run_ships_a_stock_encoder(tmp_path, cache):
    method, config = load_config("dmjd/small", SHRUNK)
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert metrics["student/predicted_share"] == 1
    for name in ("student/linear_probe", "student/knn", "student/finetune"):
        assert 0 <= metrics[name] <= 1
    assert 0 < metrics["student/target_fit"] < 1
    check_stock_encoder(tmp_path / "run" / "student", config.student)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stages = {line["stage"]: list(line["terms"]) for line in lines if line.get("kind") == "train"}
    assert stages == {"student": ["masked", "visible"], "finetuned": ["ce"]}


@pytest.mark.slow
def test_independent_views_and_a_teacher_as_the_target(tmp_path, cache):
    found = {a.name: a for a in load_arms("dmjd/small", SHRUNK)}["independent"]
    metrics = train(found.method, found.config, tmp_path / "independent", quiet=True, cpu=True)
    assert metrics["student/predicted_share"] == pytest.approx(1 - (6 / 16) ** 2, abs=0.01)
    teacher = "{name: vit_tiny_patch16_224, args: {img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}"
    teacher += ", decoder: {width: 16, depth: 1, heads: 2}, train: {epochs: 1, batch_size: 40}}"
    method, config = load_config("dmjd/small", [*SHRUNK, f"teacher={teacher}", "method_args.target=teacher"])
    metrics = train(method, config, tmp_path / "teacher", quiet=True, cpu=True)
    assert {"student/target_fit", "teacher/linear_probe"} <= set(metrics)


@pytest.mark.slow
@pytest.mark.skipif("KD_DATA" not in os.environ, reason="needs KD_DATA, the folder of the real data sets")
def test_mnist_config_runs_in_blocks(tmp_path, cache):
    short = ["data.per_class=10", "data.test_fraction=0.05", "train.epochs=1", "train.batch_size=50"]
    method, config = load_config("dmjd/mnist", [*short, "finetune.train.epochs=1"])
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert 0 <= metrics["student/finetune"] <= 1
    assert metrics["student/predicted_share"] == 1


def test_paper_config_builds_and_follows_the_learning_rate_rule():
    _, config = load_config("dmjd/paper")
    args = config.method_args
    with torch.device("meta"):
        student = timm.create_model(config.student.name, num_classes=0, **config.student.args)
        distiller = DMJD(
            student, mean=[0.5] * 3, std=[0.2] * 3, **{n: getattr(args, n) for n in type(args).model_fields}
        )
        images = torch.zeros(2, 3, config.data.image_size, config.data.image_size)
        terms = distiller.loss(Batch(images, torch.zeros(2), torch.arange(2)))
    assert list(terms) == ["masked", "visible"]
    assert distiller.decoder.predict.out_features == 108
    rate = scaled_learning_rate(6e-4, config.train.batch_size, args.corruption, args.prediction)
    assert config.train.optimizer.lr == pytest.approx(rate)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_args.prediction=0.5", "prediction = 0.5: below corruption = 0.6"),
        ("method_args.views=0", "method_args.views' = 0"),
        ("pretrain=kd", "pretrain: kd learns from a fine-tuned teacher; give teacher"),
        ("method_args.target=teacher", "target = 'teacher': no teacher is given"),
        ("data.augment.cutmix=1", "data.augment: mixup and cutmix mix labels"),
    ],
)
def test_bad_config_is_named_before_anything_trains(tmp_path, override, message):
    def attempt():
        method, config = load_config("dmjd/small", [override])
        train(method, config, tmp_path / "run", quiet=True, cpu=True)

    with pytest.raises(InputError) as caught:
        attempt()
    assert message in str(caught.value)
