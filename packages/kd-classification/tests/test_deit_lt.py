"""DeiT-LT: weights and losses in numbers, who learns from what, sharpness-aware teachers, long tails, whole runs."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_classification.data import AugmentConfig, Batch, DataConfig, load_data, long_tailed_counts
from kd_classification.engine.sam import perturbation, sam_loss
from kd_classification.methods.deit_lt import (
    DeiTLT,
    LongTailSupervised,
    effective_weights,
    group_accuracy,
    hard_distillation,
    logit_adjusted,
    tokens,
    two_logits,
)
from kd_classification.runs import supervised_setup
from kd_classification.testing import stock_classifier
from kdcore.config import TrainConfig, read_yaml
from kdcore.errors import InputError
from kdcore.method import arm_config, find_config, load_config
from kdcore.run import train

TINY = ["train.epochs=2", "teacher.train.epochs=1", "method_args.drw_epoch=1", "student.args.depth=1"]
TINY += ["teacher.args.channels=[4,4,8,8]", "data.imbalance=0.1", "train.batch_size=16"]


def double(values, **options) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, **options)


def vit(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3, "in_chans": 1}
    return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=classes, **arguments)


class Linear(nn.Module):
    """A teacher: the sign of the mean pixel decides between class 0 and class 2."""

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack([-mean, torch.full_like(mean, -1e3), mean], dim=1)


def batch(labels, images: Tensor | None = None) -> Batch:
    given_images = images if images is not None else torch.randn(len(labels), 1, 8, 8)
    return Batch(given_images, torch.tensor(labels), torch.arange(len(labels)))


# ---------------------------------------------------------------- numbers


def test_counts_of_the_long_tailed_sets():
    assert long_tailed_counts(5000, 0.01, 10) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tailed_counts(5000, 0.02, 10) == [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    data = load_data(DataConfig(test_fraction=0.3, imbalance=0.05))
    counts = torch.bincount(data.train.labels)
    assert counts.tolist() == long_tailed_counts(int(counts[0]), 0.05, 10)
    assert torch.bincount(data.test.labels).min() > 40, "the test images stay balanced"
    with pytest.raises(InputError, match="no training image of class '6'"):
        load_data(DataConfig(per_class=20, imbalance=0.01))


def test_weights_of_the_effective_number():
    found = effective_weights([5000, 500, 50])
    assert found.tolist() == pytest.approx([0.0341073618, 0.2751672254, 2.6907254128], abs=1e-9)
    assert float(found.sum()) == pytest.approx(3.0)
    assert torch.equal(effective_weights([7, 7, 7]), torch.ones(3).double())
    assert torch.equal(effective_weights([7, 70, 700], beta=0.0), torch.ones(3).double())
    with pytest.warns(UserWarning, match="1 classes have no training image"):
        empty = effective_weights([100, 0, 1])
    assert empty[1] == 0
    assert float(empty.sum()) == pytest.approx(3.0)
    with pytest.raises(InputError, match="some of them above 0"):
        effective_weights([0, 0])


def test_deferred_reweighting_is_a_weighted_mean():
    z, teacher = double([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]]), double([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    weights = effective_weights([100, 10, 1])
    assert weights.tolist() == pytest.approx([0.0271587216, 0.270368874, 2.7024724044], abs=1e-9)
    assert hard_distillation(z, teacher).item() == pytest.approx(0.2887259920, abs=1e-9)
    assert hard_distillation(z, teacher, weights).item() == pytest.approx(0.1722116345, abs=1e-9)
    assert hard_distillation(z, teacher, 17 * weights).item() == pytest.approx(0.1722116345, abs=1e-9)
    same = double([[1.0, 0.0, 0.0]]).expand(2, 3)
    assert torch.allclose(hard_distillation(z, same, weights), hard_distillation(z, same))


@given(tau=st.floats(0.1, 2), seed=st.integers(0, 100))
def test_logit_adjustment_is_balanced_by_the_prior(tau, seed):
    generator = torch.Generator().manual_seed(seed)
    z, y = torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    counts = double([50.0, 10.0, 2.0])
    prior = (counts / counts.sum()).log()
    wanted = -(z + tau * prior).log_softmax(1)[torch.arange(6), y].mean()
    assert torch.allclose(logit_adjusted(z, y, counts, tau), wanted)
    assert torch.allclose(logit_adjusted(z, y, counts, 0.0), F.cross_entropy(z, y))
    assert torch.allclose(logit_adjusted(z, y, double([4.0, 4.0, 4.0]), tau), F.cross_entropy(z, y))


def test_loss_gradients_are_the_numerical_ones():
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher, weights = torch.randn(4, 3, dtype=torch.float64), effective_weights([100, 10, 1])
    assert torch.autograd.gradcheck(lambda x: hard_distillation(x, teacher, weights), z)
    labels, counts = torch.tensor([0, 1, 2, 0]), double([100.0, 10.0, 1.0])
    assert torch.autograd.gradcheck(lambda x: logit_adjusted(x, labels, counts), z)


def test_prediction_averages_logits():
    z_c, z_d = double([[4.0, 0.0, 0.0]]), double([[0.0, 3.0, 2.9]])
    assert int(((z_c + z_d) / 2).argmax()) == 0
    student = vit().eval()
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(student(images), sum(two_logits(student, images)) / 2)


# ---------------------------------------------------------------- sharpness-aware minimisation


def test_perturbation_by_hand():
    assert torch.allclose(perturbation([double([3.0, 4.0])], 0.05)[0], double([0.03, 0.04]))
    pair = perturbation([double([3.0]), double([[4.0]])], 0.05)
    assert [float(e) for e in pair] == pytest.approx([0.03, 0.04])
    assert torch.equal(perturbation([torch.zeros(2)], 0.1)[0], torch.zeros(2))


class Quadratic(nn.Module):
    """f(x, y) = (x^2 + 10 y^2) / 2 whatever the images."""

    def __init__(self, start):
        super().__init__()
        self.point = nn.Parameter(double(start))

    def forward(self, images):
        return (self.point**2 * double([0.5, 5.0])).sum()


def test_gradient_at_the_perturbed_point_with_the_weights_unmoved():
    model = Quadratic([1.0, 1.0])
    sam_loss(model, torch.zeros(1), lambda value: value, 0.1).backward()
    assert model.point.grad.tolist() == pytest.approx([1.0099503719, 10.9950371902], abs=1e-9)
    assert model.point.tolist() == [1.0, 1.0]
    flat = Quadratic([0.0, 0.0])
    sam_loss(flat, torch.zeros(1), lambda value: value, 0.1).backward()
    assert torch.equal(flat.point.grad, torch.zeros(2).double())


def test_rho_zero_is_ordinary_training_and_statistics_are_those_of_one_pass():
    def run(rho: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))
        distiller = LongTailSupervised(network, double([5.0, 3.0, 1.0]), rho=rho)
        distiller.loss(batch([0, 1, 2, 0], images)).total().backward()
        return network[2].weight.grad, network[1].running_mean

    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    (plain, mean), (sharp, other) = run(0.0), run(0.5)
    assert torch.equal(mean, other)
    assert not torch.allclose(plain, sharp)
    small, _ = run(1e-6)
    torch.testing.assert_close(small, plain, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------- who learns from what


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_each_head_learns_its_own_term(alpha):
    distiller = DeiTLT(Linear(), vit(), torch.tensor([9, 3, 1]), alpha=alpha).train()
    distiller.loss(batch([0, 1, 2])).total().backward()
    student = distiller.student
    silent, heard = (student.head_dist, student.head) if alpha == 0 else (student.head, student.head_dist)
    assert silent.weight.grad is None or not silent.weight.grad.any()
    assert heard.weight.grad.abs().sum() > 0


def test_the_teacher_stays_in_eval_mode_and_gets_no_gradient():
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3)).train()
    distiller = DeiTLT(teacher, vit(), torch.tensor([9, 3, 1])).train()
    assert not teacher.training
    distiller.loss(batch([0, 1, 2])).total().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher[1].num_batches_tracked.any()


def test_only_the_distillation_term_changes_when_reweighting_starts():
    distiller = DeiTLT(Linear(), vit(), torch.tensor([90, 3, 1]), drw_epoch=5).train()
    images = torch.randn(6, 1, 8, 8)
    terms = []
    for epoch in (4, 5):
        distiller.progress.epoch = epoch
        terms.append(distiller.loss(batch([0, 1, 2, 0, 1, 2], images)))
    assert torch.equal(terms[0]["cls"][1], terms[1]["cls"][1])
    assert not torch.allclose(terms[0]["dist"][1], terms[1]["dist"][1])
    both = DeiTLT(Linear(), distiller.student, torch.tensor([90, 3, 1]), drw_epoch=0, reweight_labels=True).train()
    assert not torch.allclose(both.loss(batch([0, 1, 2, 0, 1, 2], images))["cls"][1], terms[1]["cls"][1])


def test_the_teacher_labels_the_mixed_image():
    """Two bright and two dark images: what the teacher says of the mixture is not what it says of the sources."""
    images = torch.stack([torch.full((1, 8, 8), v) for v in (1.0, -3.0, 1.0, -3.0)])
    distiller = DeiTLT(Linear(), vit(), torch.tensor([9, 3, 1])).train()
    distiller.mixup = lambda x, y: (0.5 * x + 0.5 * x.flip(0), F.one_hot(y, 3).float())
    mixed = distiller.mixed(batch([0, 0, 0, 0], images))
    assert distiller.teacher_logits(batch([0] * 4, images)).argmax(1).tolist() == [2, 0, 2, 0]
    assert distiller.teacher_logits(mixed).argmax(1).tolist() == [0, 0, 0, 0]
    wanted = F.cross_entropy(two_logits(distiller.student, mixed.images)[1], torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(distiller.loss(mixed)["dist"][1], wanted)


def test_mixing_stops_where_reweighting_starts_unless_asked_for():
    for keep in (False, True):
        distiller = DeiTLT(Linear(), vit(), torch.tensor([9, 3, 1]), drw_epoch=2, mix_in_drw=keep).train()
        distiller.mixup = lambda x, y: (x * 0, F.one_hot(y, 3).float())
        found = []
        for epoch in (1, 2):
            distiller.progress.epoch = epoch
            found.append(distiller.mixed(batch([0, 1, 2])).labels.ndim == 2)
        assert found == [True, keep]


def test_clean_and_absent_teacher_labels():
    labels = torch.tensor([2, 2, 0])
    student, images = vit(), torch.randn(3, 1, 8, 8)
    clean = DeiTLT(None, student, torch.tensor([9, 3, 1]), teacher_labels="clean", clean_labels=labels)
    z_d = two_logits(student, images)[1]
    torch.testing.assert_close(clean.loss(batch([0, 1, 2], images))["dist"][1], F.cross_entropy(z_d, labels))
    none = DeiTLT(None, student, torch.tensor([9, 3, 1]), teacher_labels="none")
    wanted = F.cross_entropy(z_d, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(none.loss(batch([0, 1, 2], images))["dist"][1], wanted)
    with pytest.raises(InputError, match="clean_labels"):
        DeiTLT(None, student, torch.tensor([9, 3, 1]), teacher_labels="clean")
    with pytest.raises(InputError, match="no distillation token"):
        DeiTLT(None, nn.Linear(2, 2), torch.tensor([9, 3, 1]))


def test_tokens_are_what_the_heads_read():
    student, images = vit().eval(), torch.randn(2, 1, 8, 8)
    cls, dist = tokens(student, images)
    torch.testing.assert_close(student.head(cls), two_logits(student, images)[0])
    assert not torch.allclose(cls, dist)


def test_repeated_augmentation_reaches_the_student():
    augment = AugmentConfig(crop="pad", padding=1, rotation=10, repeats=3)
    data = load_data(DataConfig(per_class=4, augment=augment))
    distiller = DeiTLT(Linear(), vit(10), torch.ones(10))
    first = next(iter(supervised_setup(distiller, data, TrainConfig(epochs=1, batch_size=6), 0).loader))
    assert first.index[0] == first.index[1] == first.index[2]
    assert len(first.index.unique()) == 2
    assert not torch.equal(first.images[0], first.images[1])


def test_accuracy_of_head_mid_and_tail():
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    answers = torch.tensor([0, 0, 1, 0, 2, 0])
    found = group_accuracy(F.one_hot(answers, 4).double(), labels, [1, 2, 1])
    assert found == {"accuracy": pytest.approx(4 / 6), "head": 1.0, "mid": pytest.approx(0.75), "tail": 0.0}


# ---------------------------------------------------------------- runs


def run(folder, *overrides):
    method, config = load_config("deit_lt/small", [*TINY, *overrides])
    return method, config, train(method, config, folder, quiet=True, cpu=True)


def test_a_run_ships_a_stock_distilled_vit(tmp_path):
    method, config, metrics = run(tmp_path / "run")
    wanted = {"student/tail", "cls/head", "dist/tail", "teacher/tail", "token_cosine", "teacher/agrees_on_mixed"}
    assert wanted <= set(metrics)
    student = timm.create_model(f"local-dir:{tmp_path / 'run/student'}", pretrained=True).eval()
    data = load_data(config.data, config.seed)
    with torch.no_grad():
        answers = torch.cat([student(b.images).argmax(1) for b in data.test.loader(512)])
    assert float((answers == data.test.labels).double().mean()) == pytest.approx(metrics["student/accuracy"])
    assert method.predict(config, {name: tmp_path / "run" / name for name in ("student", "teacher")}, 4)


@pytest.mark.slow
def test_clean_labels_and_no_teacher_run(tmp_path):
    _, _, clean = run(tmp_path / "clean", "method_args.teacher_labels=clean", "method_args.teacher_loss=ce")
    _, _, none = run(tmp_path / "none", "method_args.teacher_labels=none", "method_args.drw_epoch=null")
    assert clean["student/accuracy"] > 0
    assert none["student/accuracy"] > 0


@pytest.mark.slow
def test_the_student_loads_where_kd_cannot_be_imported(tmp_path):
    run(tmp_path / "run")
    opened = stock_classifier(tmp_path / "run/student", (1, 8, 8))
    assert opened == ([2, 10], "VisionTransformerDistilled", ["Linear", "Linear"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.name=deit_tiny_patch16_224", "no distillation token"),
        ("method_args.groups=[3,4,4]", "add up to 10"),
        ("train.batch_size=15", "must be even"),
        ("method_args.drw_epoch=2", "below train.epochs"),
        ("teacher.augment.mixup=0.2", "class indices"),
        ("teacher.cache=x", "teacher.cache"),
    ],
)
def test_bad_input_is_named_before_anything_trains(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_configs_say_what_they_are():
    for name in ("small", "paper"):
        values = read_yaml(find_config(f"deit_lt/{name}"))
        assert {"ce", "deit", "in_distribution", "sgd_teacher"} <= set(values["compare"])
        for overrides in ({}, *values["compare"].values()):
            arm_config(values, overrides)
    _, paper = load_config("deit_lt/paper")
    assert (paper.student.name, paper.method_args.drw_epoch, paper.train.epochs) == (
        "deit_base_distilled_patch16_224",
        1100,
        1200,
    )
    assert paper.data.imbalance == 0.01
    assert (paper.data.augment.repeats, paper.teacher.augment.repeats) == (3, 1)
    assert paper.teacher.interpolation == "bicubic"
    assert paper.train.optimizer.lr == pytest.approx(5e-4 * paper.train.batch_size / 512)
    assert paper.train.optimizer.lr * paper.train.schedule.min_ratio == pytest.approx(1e-5)


@pytest.mark.slow
def test_a_teacher_of_another_size_is_trained_as_it_is_used(tmp_path):
    """On images of 8 pixels a teacher that wants 16 sees 16 in training, too."""
    overrides = ["teacher.train.epochs=12", "data.imbalance=null", "data.per_class=40", "train.epochs=1"]
    overrides += ["method_args.drw_epoch=null", "method_args.teacher_rho=0"]
    _, _, metrics = run(tmp_path / "run", *overrides, "teacher.args.channels=[8,8,16,32]")
    assert metrics["teacher/accuracy"] > 0.6
