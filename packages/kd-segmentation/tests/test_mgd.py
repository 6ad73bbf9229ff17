"""MGD: equations in float64 on plain networks, CutMix, CPS; a run through mmengine."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kd_segmentation.engine.batch import SegBatch
from kd_segmentation.engine.cps import CPS
from kd_segmentation.engine.cutmix import boxes, draw_masks, mixed, pseudo_labels, toggled
from kd_segmentation.engine.losses import cross_entropy
from kd_segmentation.methods.mgd import MGD, MGDConfig, image_level, pixel_level, region_level, self_similarity
from kdcore.distiller import freeze
from kdcore.errors import InputError

D = torch.float64


class Net(nn.Module):
    """A network with a decoder whose output is tapped."""

    def __init__(self, width: int = 4, classes: int = 3):
        super().__init__()
        self.decoder = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Tanh())
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, images):
        return self.classifier(self.decoder(images))


def batch(seed: int = 0, size: int = 8) -> SegBatch:
    generator = torch.Generator().manual_seed(seed)
    x, u0, u1 = (torch.randn(2, 3, size, size, generator=generator, dtype=D) for _ in range(3))
    labels = torch.randint(0, 3, (2, size, size), generator=generator)
    labels[0, 0] = 255
    return SegBatch(x, labels, (u0, u1))


def mgd(**arguments) -> MGD:
    torch.manual_seed(1)
    teachers = {name: freeze(Net(width).to(D)) for name, width in (("wide", 6), ("deep", 5))}
    arguments = {"student_feature": "decoder", "wide_feature": "decoder", "lambda_image": 1.0, **arguments}
    return MGD(Net().to(D), teachers, **arguments)


# ---------------------------------------------------------------- levels


def test_image_level_by_hand_is_a_sum_over_the_batch_and_free_of_the_size():
    z = torch.tensor([[[[1.0, 2], [3, 4]], [[0, 0], [1, -1]]]], dtype=D, requires_grad=True)
    teacher = torch.tensor([[[[2.0, 2], [2, 2]], [[1, 1], [1, -1]]]], dtype=D)
    loss = image_level(z, teacher)
    assert loss.item() == 1.0
    loss.backward()
    assert z.grad[0, 0].unique().tolist() == [0.25]
    assert z.grad[0, 1].unique().tolist() == [-0.25]
    assert image_level(z.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1)).item() == 2.0
    assert image_level(z.repeat(1, 1, 3, 3), teacher.repeat(1, 1, 3, 3)).item() == pytest.approx(1.0)
    assert image_level(z + 3, teacher).item() != loss.item()  # softmax would not see the shift


def test_region_level_by_hand():
    student = torch.tensor([[1.0, 0], [0, 2]], dtype=D).T.reshape(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 1], [3, 4]], dtype=D).T.reshape(1, 2, 1, 2)
    # Two regions: a grid of 1 x 2 is what adaptive pooling of each row gives; here pooling is the identity.
    s, t = (z.flatten(2) for z in (student, teacher))
    cosines = [F.normalize(z, dim=1).transpose(1, 2) @ F.normalize(z, dim=1) for z in (s, t)]
    assert cosines[1][0, 0, 1].item() == pytest.approx(7 / math.sqrt(50))
    assert F.mse_loss(*cosines).item() == pytest.approx(0.49)
    square = [torch.stack([z[..., 0], z[..., 1], z[..., 1], z[..., 0]], -1).reshape(1, 2, 2, 2) for z in (s, t)]
    # Regions a, b, b, a: of 16 pairs, 8 are (a, b), each with a squared difference of .98.
    assert region_level(*square, regions=2).item() == pytest.approx(8 * 0.98 / 16)


def test_region_level_is_free_of_scales_rotations_and_channels():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(2, c, 9, 11, generator=generator, dtype=D) for c in (4, 6))
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=D))
    loss = region_level(a, b).item()
    assert region_level(torch.einsum("dc,bchw->bdhw", rotation, a), b).item() == pytest.approx(loss)
    pooled = F.adaptive_avg_pool2d(a, 7)
    scales = 0.5 + torch.rand(2, 1, 7, 7, generator=generator, dtype=D)
    assert region_level(pooled * scales, b).item() == pytest.approx(loss)
    assert region_level(a, a).item() == 0
    similarity = self_similarity(a)
    assert similarity.shape == (2, 49, 49)
    torch.testing.assert_close(similarity.diagonal(dim1=1, dim2=2), torch.ones(2, 49, dtype=D))


def test_a_region_of_zeros_has_a_gradient():
    features = torch.zeros(1, 3, 7, 7, dtype=D, requires_grad=True)
    loss = region_level(features, torch.randn(1, 3, 7, 7, dtype=D))
    loss.backward()
    assert torch.isfinite(features.grad).all()


def test_gradients_of_the_levels():
    generator = torch.Generator().manual_seed(3)
    z, t = (torch.randn(1, 3, 4, 4, generator=generator, dtype=D) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: image_level(x, t), z.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: region_level(x, t, 2), z)
    assert torch.autograd.gradcheck(lambda x: pixel_level(x, [t.argmax(1), (-t).argmax(1)]), z)


def test_pixel_level_of_equal_networks_is_not_zero():
    z = torch.randn(1, 3, 2, 2, dtype=D, requires_grad=True)
    loss = pixel_level(z, [z.detach().argmax(1)] * 2)
    p = z.detach().softmax(1)
    assert loss.item() == pytest.approx(-2 * p.max(1).values.log().mean().item())
    loss.backward()
    hot = F.one_hot(p.argmax(1), 3).movedim(-1, 1)
    torch.testing.assert_close(z.grad, 2 * (p - hot) / 4)


# ---------------------------------------------------------------- CutMix


def test_boxes_toggle():
    mask = toggled(torch.tensor([[[0, 0, 2, 2], [1, 1, 3, 3]]]), (4, 4))
    assert mask.sum().item() == 6
    assert not mask[0, 0, 1, 1]


@given(st.integers(0, 10_000), st.sampled_from([(32, 32), (20, 50)]))
def test_boxes_lie_inside_with_the_asked_area(seed, size):
    generator = torch.Generator().manual_seed(seed)
    found = boxes(4, size, generator=generator)
    assert found.shape == (4, 3, 4)
    assert (found >= 0).all()
    assert (found[..., 2] <= size[0]).all()
    assert (found[..., 3] <= size[1]).all()
    area = (found[..., 2] - found[..., 0]) * (found[..., 3] - found[..., 1]) / (size[0] * size[1])
    slack = 0.5 * (1 / size[0] + 1 / size[1]) + 0.25 / (size[0] * size[1])  # sides are rounded
    assert (area >= 0.25 / 3 - slack).all()
    assert (area <= 0.5 / 3 + slack).all()


def test_mixing_labels_is_mixing_logits_or_probabilities():
    data, network = batch(), Net().to(D).eval()
    u0, u1 = data.unlabelled
    torch.manual_seed(4)
    mask = draw_masks(u0)
    z0, z1 = network(u0), network(u1)
    labels = pseudo_labels(network, u0, u1, mask)
    assert torch.equal(labels, mixed(z0, z1, mask).argmax(1))
    assert torch.equal(labels, mixed(z0.softmax(1), z1.softmax(1), mask).argmax(1))
    assert torch.equal(mixed(u0, u1, torch.zeros_like(mask)), u0)
    assert torch.equal(mixed(u0, u1, torch.ones_like(mask)), u1)
    assert torch.equal(pseudo_labels(network, u0, u1, torch.ones_like(mask)), z1.argmax(1))


# ---------------------------------------------------------------- distiller


def test_terms_are_the_equation():
    distiller, data = mgd().train(), batch()
    torch.manual_seed(5)
    terms = distiller.loss(data)
    torch.manual_seed(5)
    u0, u1 = data.unlabelled
    mask = draw_masks(u0)
    mix = torch.where(mask, u1, u0)
    wide, deep, student = distiller.teachers["wide"], distiller.teachers["deep"], copy.deepcopy(distiller.student)
    z = student(mix)
    assert terms["image"][1].item() == pytest.approx((z.mean((2, 3)) - deep(mix).mean((2, 3))).abs().sum().item())
    s, w = (self_similarity(net.decoder(mix)) for net in (student, wide))
    assert terms["region"][1].item() == pytest.approx((s - w).square().mean().item())
    labels = [torch.where(mask, net(u1), net(u0)).argmax(1) for net in (wide, deep)]
    assert terms["pixel_unlabelled"][1].item() == pytest.approx(sum(F.cross_entropy(z, y).item() for y in labels))
    z = student(data.images)
    assert terms["ce"][1].item() == pytest.approx(cross_entropy(z, data.labels).item())
    expected = sum(F.cross_entropy(z, net(data.images).argmax(1)).item() for net in (wide, deep))
    assert terms["pixel_labelled"][1].item() == pytest.approx(expected)
    weights = {name: weight for name, (weight, _) in terms.items()}
    assert weights == {"ce": 1, "pixel_labelled": 1, "pixel_unlabelled": 1, "image": 1, "region": 100}


def test_a_student_that_is_both_teachers_has_no_image_and_region_loss():
    student = Net().to(D)
    teachers = {name: freeze(copy.deepcopy(student)) for name in ("wide", "deep")}
    distiller = MGD(student, teachers, student_feature="decoder", wide_feature="decoder").eval()
    terms = distiller.loss(batch())
    assert terms["image"][1].item() == pytest.approx(0, abs=1e-12)
    assert terms["region"][1].item() == pytest.approx(0, abs=1e-12)
    assert terms["pixel_unlabelled"][1].item() > 0


def test_teachers_get_no_gradient_and_do_not_change():
    distiller = mgd().train()
    before = {name: value.clone() for name, value in distiller.teachers.state_dict().items()}
    distiller.loss(batch()).total().backward()
    assert all(parameter.grad is None for parameter in distiller.teachers.parameters())
    assert all(torch.equal(before[name], value) for name, value in distiller.teachers.state_dict().items())
    assert all(parameter.grad is not None for parameter in distiller.student.parameters())
    batch_norm = mgd(teacher_norm="batch").train()
    batch_norm.loss(batch())
    changed = batch_norm.teachers.state_dict()
    assert any(not torch.equal(before[name], value) for name, value in changed.items() if "running" in name)


def test_everything_off_is_supervised_training():
    off = {"pixel_labelled": 0, "pixel_unlabelled": 0, "lambda_image": 0, "lambda_region": 0}
    distiller, data = mgd(**off).eval(), batch()
    terms = distiller.loss(SegBatch(data.images, data.labels))  # no unlabelled stream is asked for
    assert list(terms) == ["ce"]
    assert terms.total().item() == pytest.approx(cross_entropy(distiller.student(data.images), data.labels).item())
    hard = mgd(**off, supervised="ohem", ohem_kept=1).eval().loss(data)
    assert hard.total().item() > 0


def test_swapping_the_teachers_is_an_ablation():
    data = batch()
    values = []
    for swap in (False, True):
        torch.manual_seed(6)
        values.append(mgd(swap=swap).eval().loss(data)["image"][1].item())
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student_feature": "decodr"}, "Net has no module 'decodr'; did you mean 'decoder'"),
        ({"lambda_image": -1.0}, "MGD: 'lambda_image' = -1.0"),
        ({"lambda_imag": 1.0}, "unknown key 'lambda_imag'; did you mean 'lambda_image'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        mgd(**arguments)


def test_bad_teachers_maps_and_streams():
    with pytest.raises(InputError, match="MGD needs 'wide' and 'deep', got teacher"):
        MGD(Net(), {"teacher": Net()})
    with pytest.raises(InputError, match=r"regions = 7: a feature map is \(2, 4, 6, 6\)"):
        mgd().loss(batch(size=6))
    data = batch()
    with pytest.raises(InputError, match="two unlabelled streams of one size are needed, got"):
        mgd().loss(SegBatch(data.images, data.labels, (data.images,)))


def test_cps_supervises_each_network_by_the_other():
    torch.manual_seed(7)
    distiller, data = CPS(Net().to(D), other=Net().to(D), start=2).eval(), batch()
    assert list(distiller.loss(data)) == ["first_ce", "second_ce"]
    distiller.progress.step = 2
    torch.manual_seed(8)
    terms = distiller.loss(data)
    torch.manual_seed(8)
    u0, u1 = data.unlabelled
    mask = draw_masks(u0)
    labels = torch.where(mask, distiller.other(u1), distiller.other(u0)).argmax(1)
    expected = F.cross_entropy(distiller.student(torch.where(mask, u1, u0)), labels)
    assert terms["first_cps"][1].item() == pytest.approx(expected.item())
    terms.total().backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
    assert distiller.deployed() is distiller.student


def test_defaults_are_the_papers():
    args = MGDConfig()
    assert (args.lambda_image, args.lambda_region, args.regions) == (1e-3, 100.0, 7)
    assert (args.ohem_threshold, args.ohem_kept, args.teacher_norm) == (0.7, 50_000, "eval")


# ---------------------------------------------------------------- with mmseg

TINY = (
    "train_cfg.max_iters=3",
    "train_cfg.val_interval=10",
    "teacher_training.train_cfg.max_iters=3",
    "teacher_training.cps_start=1",
    "train_dataloader.batch_size=2",
    "test_dataloader.dataset.indices=4",
)


@pytest.mark.slow
def test_two_teachers_by_cps_then_the_student(tmp_path):
    from kdcore import run
    from kdcore.method import load_config
    from kdcore.report import write_report

    method, config = load_config("mgd/small", TINY)
    metrics = run.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert {"student/mIoU", "teacher_wide/mIoU", "teacher_deep/mIoU"} <= set(metrics)
    assert {"image_gap", "region_gap", "follows_wide", "follows_deep"} <= set(metrics)
    page = write_report([tmp_path / "run"]).read_text()
    assert "teacher_wide" in page
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    for term in ("first_cps", "pixel_labelled", "pixel_unlabelled", '"image"', '"region"'):
        assert term in log
    saved = torch.load(tmp_path / "run" / "student" / "model.pth", weights_only=True)["state_dict"]
    assert not any(name.startswith(("teachers", "other")) for name in saved)
    from kd_segmentation.integrations.networks import open_saved

    assert open_saved(tmp_path / "run" / "student").decode_head.num_classes == 6
    method, config = load_config("mgd/small", [*TINY, "method_args.baseline=cps"])
    metrics = run.train(method, config, tmp_path / "cps", quiet=True, cpu=True)
    assert "student/mIoU" in metrics


@pytest.mark.slow
def test_bad_input_of_mgd(tmp_path):
    from kdcore import run
    from kdcore.method import load_config

    for override, message in (
        ("model.teachers={wide: {}}", r"model\.teachers\.wide: give one of model"),
        ("method_args.wide_feature=decode_head.sep_bottle", "has no module 'decode_head.sep_bottle'; did you mean"),
        (
            "train_dataloader.dataset.unlabelled.indices=50",
            "train_dataloader.dataset.unlabelled: overlaps the labelled",
        ),
    ):
        method, config = load_config("mgd/small", [*TINY, override])
        with pytest.raises(InputError, match=message):
            run.train(method, config, tmp_path / "bad", quiet=True, cpu=True)


@pytest.mark.slow
@pytest.mark.skipif("KD_DATA" not in os.environ, reason="KD_DATA is not set: CamVid is not there")
def test_camvid_with_an_eighth_of_the_labels(tmp_path):
    from kd_segmentation import integrations  # noqa: F401  registers
    from kd_segmentation.integrations.stage import check_dataset
    from kdcore import run
    from kdcore.method import load_config

    pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
    sets = {
        split: check_dataset({"type": "CamVidDataset", "split": split, "pipeline": pipeline}, split)
        for split in ("train", "val", "test")
    }
    assert [len(data) for data in sets.values()] == [367, 101, 233]
    labels = {int(v) for index in (0, 7) for v in torch.as_tensor(sets["train"][index]["gt_seg_map"]).unique()}
    assert labels <= {*range(11), 255}
    assert 255 in labels
    method, config = load_config("mgd/camvid", TINY)
    metrics = run.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert len(metrics["class_names"]) == 11
    assert 0 < metrics["student/pixel_accuracy"] < 1
