"""KD-OCT: the numbers of its equations, the protocol, the teacher's recipe, and a run from end to end."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kd_classification import metrics as m
from kd_classification.data import Batch, DataConfig, load_data
from kd_classification.engine.averaging import TestTimeAugmented, recompute_statistics, weight_average
from kd_classification.methods.kd_oct import (
    KDOCT,
    FocalTeacher,
    balanced_weights,
    clinical_rates,
    focal_loss,
    head_and_backbone,
)
from kdcore.config import ScheduleConfig
from kdcore.optim import schedule_factor


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Fixed(nn.Module):
    """A network whose logits are its parameter, whatever the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(tensor(logits))

    def forward(self, images):
        return self.logits


def batch(size: int, classes: int = 3, seed: int = 0, shape=(1, 8, 8)) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, *shape, dtype=torch.float64, generator=generator)
    return Batch(images, torch.randint(classes, (size,), generator=generator), torch.arange(size))


def tiny_network(seed: int = 0, **arguments) -> nn.Module:
    torch.manual_seed(seed)
    arguments = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4], "stem_width": 4, "in_chans": 1, **arguments}
    return timm.create_model("resnet18", num_classes=3, **arguments)


# ---------------------------------------------------------------- losses


def test_student_loss_numbers():
    student, teacher = Fixed([[1, 0, -1], [0.5, 0.5, 0]]), Fixed([[2, 0, -2], [0, 1, 1]])
    labelled = Batch(torch.zeros(2, 1), torch.tensor([0, 1]), torch.arange(2))
    terms = KDOCT(teacher, student).loss(labelled)
    assert terms["kd"][1].item() == pytest.approx(0.2452974781, abs=1e-10)
    assert terms["ce"][1].item() == pytest.approx(0.6828130262, abs=1e-10)
    assert terms.total().item() == pytest.approx(0.3765521425, abs=1e-10)


FOCAL = (tensor([[2, 0, -1], [0, 1, 0]]), torch.tensor([0, 2]))
WEIGHTS = tensor([0.5, 1, 2])


def test_focal_numbers():
    assert focal_loss(*FOCAL, WEIGHTS).item() == pytest.approx(0.9645392522, abs=1e-10)
    assert focal_loss(*FOCAL, WEIGHTS, form="release").item() == pytest.approx(1.4154772018, abs=1e-10)
    assert focal_loss(*FOCAL).item() == pytest.approx(0.4838237226, abs=1e-10)
    assert focal_loss(*FOCAL, gamma=0.0).item() == pytest.approx(0.8606453667, abs=1e-10)
    assert focal_loss(*FOCAL, gamma=0.0).item() == pytest.approx(F.cross_entropy(*FOCAL).item(), abs=1e-15)


def test_focal_forms_agree_without_focus_or_weights():
    logits, labels = FOCAL
    weighted = (WEIGHTS[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()
    for form in ("paper", "release"):
        assert focal_loss(logits, labels, WEIGHTS, 0.0, form).item() == pytest.approx(weighted.item(), abs=1e-15)
    ones = torch.ones(3, dtype=torch.float64)
    assert torch.equal(focal_loss(*FOCAL, ones, 2.0, "paper"), focal_loss(*FOCAL, ones, 2.0, "release"))


def test_balanced_weights():
    weights = balanced_weights([6, 3, 1])
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3], abs=1e-12)
    assert (weights * tensor([6, 3, 1])).sum().item() == pytest.approx(10, abs=1e-12)
    with pytest.raises(ValueError, match="positive number of images for every class"):
        balanced_weights([3, 0])


@pytest.mark.parametrize("form", ["paper", "release"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_gradient(form, gamma):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 2, 0])
    assert torch.autograd.gradcheck(lambda z: focal_loss(z, labels, WEIGHTS, gamma, form), logits)


def test_focal_of_certain_and_of_half_precision_logits_is_finite():
    logits = torch.tensor([[60.0, -60.0, 0.0]], dtype=torch.float16, requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        loss = focal_loss(logits, torch.tensor([0]), gamma=gamma)
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(gradient).all()


def test_focal_refuses_mixed_labels():
    with pytest.raises(ValueError, match="needs class indices"):
        focal_loss(torch.zeros(2, 3), torch.full((2, 3), 1 / 3))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 5), st.sampled_from(["paper", "release"]))
def test_focal_is_between_zero_and_the_weighted_cross_entropy(seed, gamma, form):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(6, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(4, (6,), generator=generator)
    weights = balanced_weights([5, 1, 2, 9])
    loss = focal_loss(logits, labels, weights, gamma, form)
    assert 0 <= loss <= focal_loss(logits, labels, weights, 0.0, form) + 1e-12
    order = torch.randperm(6, generator=generator)
    assert focal_loss(logits[order], labels[order], weights, gamma, form).item() == pytest.approx(loss.item())


def test_student_loss_at_the_teacher_and_without_it():
    logits = [[1.0, 0, -1], [0.5, 0.5, 0]]
    student = Fixed(logits)
    labelled = Batch(torch.zeros(2, 1), torch.tensor([0, 1]), torch.arange(2))
    soft = KDOCT(Fixed(logits), student).loss(labelled)["kd"][1]
    assert soft.item() == pytest.approx(0, abs=1e-15)
    (gradient,) = torch.autograd.grad(soft, student.logits)
    assert gradient.abs().max() < 1e-15
    alone = KDOCT(Fixed([[9.0, 0, 0]] * 2), student, alpha=0.0, beta=0.3).loss(labelled)
    assert "kd" not in alone
    assert alone.total().item() == pytest.approx(0.3 * 0.6828130262, abs=1e-10)


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(64, w), nn.Tanh(), nn.Linear(w, 3)) for w in (9, 5))
    distiller = KDOCT(teacher.double(), student.double())
    whole = batch(12)
    distiller.loss(whole).total().backward()
    expected = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    for part in range(4):
        piece = Batch(*(values[3 * part : 3 * part + 3] for values in whole))
        (distiller.loss(piece).total() / 4).backward()
    for parameter, gradient in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the teacher's recipe


def test_average_of_snapshots_is_their_mean():
    network = tiny_network().double()
    average, snapshots = weight_average(network), []
    for step in range(4):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * (step + 1))
        snapshots.append([parameter.detach().clone() for parameter in network.parameters()])
        average.update_parameters(network)
    for mean, *values in zip(average.module.parameters(), *snapshots, strict=True):
        torch.testing.assert_close(mean.data, torch.stack(values).mean(0), rtol=0, atol=1e-12)
        assert not mean.requires_grad


def test_statistics_are_recomputed_once_and_for_all():
    data = load_data(DataConfig(name="textures", per_class=48, augment={"hflip": 0.5}))
    network, plain = tiny_network(drop_rate=0.3), copy.deepcopy
    before = plain(network.state_dict())
    states = []
    for _ in range(2):
        torch.rand(7)  # the state of the global generator must not matter
        recompute_statistics(network, data.train.loader(64, seed=1, train=True))
        states.append(plain(network.state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in before)
    assert not torch.equal(before["bn1.running_mean"], states[0]["bn1.running_mean"])
    first = torch.cat([network.conv1(b.images) for b in data.train.loader(64, seed=1, train=True)])
    torch.testing.assert_close(states[0]["bn1.running_mean"], first.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto", "efficientnet_b0"])
def test_every_parameter_is_in_one_group(name):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=3)
    head, backbone = head_and_backbone(network)
    ids = [id(parameter) for parameter in [*head, *backbone]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in network.parameters()}
    assert {id(p) for p in network.get_classifier().parameters()} <= {id(p) for p in head}
    assert len(backbone) > len(head)


def test_frozen_phase_changes_the_head_only():
    network = tiny_network()
    teacher = FocalTeacher(network, weights=torch.ones(3), freeze_epochs=1)
    (player,) = teacher.players()
    assert [group.get("lr_scale", 1.0) for group in player.param_groups] == [1.0, 0.2]
    optimizer = torch.optim.AdamW(player.param_groups, lr=0.1, weight_decay=0.05)
    head = {name for name, p in network.named_parameters() if any(p is q for q in player.param_groups[0]["params"])}
    images = batch(8, shape=(1, 16, 16))
    images = images._replace(images=images.images.float())
    for epoch in (0, 1):
        teacher.progress.epoch = epoch
        teacher.epoch_start()
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        for _ in range(2):
            optimizer.zero_grad()
            teacher.loss(images).total().backward()
            optimizer.step()
        changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
        assert changed == (head if epoch == 0 else set(before))


def test_average_starts_at_its_epoch():
    teacher = FocalTeacher(tiny_network(), swa_start=2)
    for epoch in range(4):
        teacher.progress.epoch = epoch
        teacher.epoch_end()
    assert int(teacher.average.n_averaged) == 2
    assert any(name.startswith("average.module.") for name in teacher.checkpoint_state())


def test_schedule_of_warm_up_cosine_and_floor():
    config = ScheduleConfig(name="cosine", unit="epoch", warmup_epochs=10, min_ratio=1e-3)

    def factor(epoch):
        return schedule_factor(config, epoch * 7, 150 * 7, 7)

    assert [factor(e) for e in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    for epoch in (10, 80, 149):
        cosine = (1 + math.cos(math.pi * (epoch - 10) / 140)) / 2
        assert factor(epoch) == pytest.approx(1e-3 + (1 - 1e-3) * cosine, abs=1e-12)


def test_views():
    class Recorder(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :2]

    images = torch.randn(3, 1, 16, 16)
    tta = TestTimeAugmented(Recorder(), angle=90.0, black=[-2.0])
    views = tta.views(images)
    assert [view.shape for view in views] == [images.shape] * 5
    assert torch.equal(views[1][..., 0], images[..., -1])
    assert torch.equal(views[2][..., 0, :], images[..., -1, :])
    torch.testing.assert_close(views[4], images.rot90(1, (2, 3)), rtol=0, atol=1e-4)
    torch.testing.assert_close(tta(images), sum(view.flatten(1)[:, :2] for view in views) / 5)
    constant = TestTimeAugmented(Recorder(), angle=45.0, black=[-2.0]).views(torch.ones(1, 1, 16, 16))
    assert constant[4][0, 0, 0, 0] == pytest.approx(-2.0)  # corners are turned in from outside
    assert torch.allclose(constant[3], torch.ones(1, 1, 16, 16))


# ---------------------------------------------------------------- metrics


def test_rates():
    confusion = [[8, 1, 1], [2, 3, 0], [0, 1, 4]]
    sensitivity, specificity = m.rates(confusion)
    assert sensitivity.tolist() == pytest.approx([0.8, 0.6, 0.8])
    assert specificity.tolist() == pytest.approx([8 / 10, 13 / 15, 14 / 15])
    result = clinical_rates([[8, 2, 0], [1, 3, 0], [0, 0, 0]], rarest=1)
    assert result["sensitivity"] == pytest.approx((0.8 + 0.75) / 2)  # a class without images has none
    assert result["rarest_recall"] == pytest.approx(0.75)
