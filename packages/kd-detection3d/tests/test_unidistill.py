"""The losses of UniDistill on numbers worked out by hand, in float64, and its distiller on plain modules."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kd_detection3d.engine.batch import DetectionBatch
from kd_detection3d.engine.bev import Area, background, centre_mask, gaussian_radius, key_points, sample
from kd_detection3d.methods.unidistill import (
    UniDistill,
    class_response_loss,
    crucial_point_loss,
    gaps,
    regression_response_loss,
    relation_loss,
    relations,
)
from kdcore.distiller import freeze
from kdcore.errors import InputError

AREA = Area(0.0, 0.0, 8.0, 8.0)  # on 8 x 8 maps a cell is 1 m
BOX = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- boxes on maps


def test_key_points_of_a_turned_box():
    points = key_points(torch.tensor([[1.0, 2.0, 4.0, 2.0, math.pi / 2]], dtype=torch.float64))[0]
    # heading along y: the side of 4 m is along y, and the left of the heading is -x
    corners = [(2, 0), (0, 0), (0, 4), (2, 4)]
    middles = [(1, 0), (0, 2), (1, 4), (2, 2)]
    expected = torch.tensor([*corners, (1, 2), *middles], dtype=torch.float64)
    torch.testing.assert_close(points, expected)


def test_samples_of_a_linear_field():
    rows, columns = torch.meshgrid(*(torch.arange(8, dtype=torch.float64),) * 2, indexing="ij")
    field = (2 * rows + 3 * columns)[None, None]
    right = sample(field, [key_points(BOX)], AREA)[0, :, 0]
    assert right.tolist() == pytest.approx([11.5, 13.5, 19.5, 17.5, 15.5, 12.5, 16.5, 18.5, 14.5], abs=1e-9)
    released = sample(field, [key_points(BOX)], AREA, swapped=True)[0, :, 0]
    assert released.tolist() == pytest.approx([11, 14, 18, 15, 14.5, 12.5, 16, 16.5, 13], abs=1e-9)


def test_maps_of_another_resolution_are_read_at_the_same_places():
    coordinate = lambda n: ((torch.arange(n, dtype=torch.float64) + 0.5) * 8 / n).expand(1, 1, n, n)  # noqa: E731
    points = [key_points(BOX)]
    torch.testing.assert_close(sample(coordinate(8), points, AREA), sample(coordinate(32), points, AREA))


def test_a_point_outside_the_map_samples_zero():
    far = torch.tensor([[20.0, 20.0, 2.0, 1.0, 0.3]], dtype=torch.float64)
    assert sample(torch.ones(1, 3, 8, 8, dtype=torch.float64), [key_points(far)], AREA).abs().max() == 0


def test_radii_and_window_sums():
    sizes = torch.tensor([[4.6 / 0.6, 1.9 / 0.6], [20.0, 5.0], [1.0, 1.0]], dtype=torch.float64)
    found = gaussian_radius(sizes)
    assert found[:2].tolist() == pytest.approx([1.2427800683, 2.2547462651], abs=1e-9)
    assert found[2].item() == pytest.approx(0.2733, abs=1e-4)
    area, expected = Area(0.0, 0.0, 41.0, 41.0), (1.6146036885, 4.3504533359, 1.0)
    for size, total in zip(sizes, expected):
        box = torch.cat([torch.tensor([20.2, 20.7], dtype=torch.float64), size, torch.zeros(1, dtype=torch.float64)])
        mask = centre_mask([box[None]], area, 41, 41)[0]
        assert mask.sum().item() == pytest.approx(total, abs=1e-9)
        assert mask.argmax() == 20 * 41 + 20
        assert mask.max() == 1


def test_mask_rows_follow_y_and_duplicates_change_nothing():
    box = torch.tensor([[6.5, 1.5, 1.0, 1.0, 0.0]], dtype=torch.float64)
    mask = centre_mask([box, box[:0]], AREA, 8, 8)
    assert mask.nonzero().tolist() == [[0, 1, 6]]
    assert torch.equal(mask, centre_mask([box.repeat(3, 1), box[:0]], AREA, 8, 8))
    outside = torch.tensor([[-0.5, 3.0, 20.0, 20.0, 0.0]], dtype=torch.float64)
    assert centre_mask([outside], AREA, 8, 8).sum() == 0


def test_background_is_where_no_box_comes_near():
    far = background([BOX, BOX[:0]], AREA, 8, 8)
    assert far[1].all()
    assert not far[0, 2:4, 3:5].any()  # the four cells around (4, 3)
    # Further than half the diagonal of 2 x 1 and a cell, 2.118 m, from the centre.
    expected = [(row + 0.5 - 3) ** 2 + (column + 0.5 - 4) ** 2 > 2.118034**2 for row in range(8) for column in range(8)]
    assert far[0].flatten().tolist() == expected


# ---------------------------------------------------------------- losses


def test_equal_features_cost_nothing():
    features = noise(3, 9, 5).requires_grad_()
    total = crucial_point_loss(features, features.detach()) + relation_loss(features, features.detach())
    total.backward()
    assert total.item() == 0
    assert features.grad.abs().max() == 0


def test_crucial_point_loss_of_a_shift():
    teacher = noise(1, 9, 2)
    found = crucial_point_loss(teacher + torch.tensor([1.0, 0.0], dtype=torch.float64), teacher)
    assert found.item() == pytest.approx(0.4999500050, abs=1e-9)


def test_relation_loss_of_two_groups():
    student = torch.zeros(1, 9, 2, dtype=torch.float64)
    student[0, :4, 0] = student[0, 4:, 1] = 1
    teacher = torch.tensor([3.0, 4.0], dtype=torch.float64).expand(1, 9, 2)
    same, other = (5 / 5.0001) ** 2 - (1 / 1.0001) ** 2, (5 / 5.0001) ** 2
    expected = (41 * same + 40 * other) / 81 / 1.0001
    assert relation_loss(student, teacher).item() == pytest.approx(expected, abs=1e-12)
    assert expected == pytest.approx(0.4938389972, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 20))
def test_relations_do_not_see_the_scale(seed, factor):
    student, teacher = noise(2, 9, 4, seed=seed) * 10, noise(2, 9, 4, seed=seed + 1)
    scales = noise(2, 9, 1, seed=seed + 2).abs() + factor
    change = relation_loss(student * scales, teacher) - relation_loss(student, teacher)
    assert change.abs().item() < 1e-3
    assert (crucial_point_loss(student * scales, teacher) - crucial_point_loss(student, teacher)).abs().item() > 0
    assert relations(student).abs().max() <= 1


def test_relation_loss_has_a_gradient_also_at_zero_and_channels_may_differ():
    student = noise(2, 9, 3).requires_grad_()
    teacher = noise(2, 9, 5, seed=1)
    assert torch.autograd.gradcheck(lambda x: relation_loss(x, teacher), student)
    zeros = torch.zeros(1, 9, 3, dtype=torch.float64, requires_grad=True)
    relation_loss(zeros, teacher[:1]).backward()
    assert torch.isfinite(zeros.grad).all()


def test_boxes_count_once_whatever_their_number_of_copies_and_size():
    student, teacher = noise(2, 9, 4), noise(2, 9, 4, seed=1)
    for loss in (crucial_point_loss, relation_loss):
        twice = loss(student.repeat(2, 1, 1), teacher.repeat(2, 1, 1))
        assert twice.item() == pytest.approx(loss(student, teacher).item(), rel=1e-4)
        each = [loss(student[i : i + 1], teacher[i : i + 1]).item() for i in range(2)]
        assert loss(student, teacher).item() == pytest.approx(sum(each) / 2, rel=1e-4)


def test_class_response_of_equal_logits_is_not_zero():
    mask = torch.ones(1, 1, 1, dtype=torch.float64)
    logits = torch.full((1, 1, 1, 1), 1.2, dtype=torch.float64)
    expected = logits.sigmoid() - (logits / 2).sigmoid()
    assert expected.item() == pytest.approx(0.1228684773, abs=1e-9)
    assert class_response_loss(logits, logits, mask).item() == pytest.approx(expected.item() / 1.0001, abs=1e-12)
    assert class_response_loss(logits, 2 * logits, mask).item() == pytest.approx(0, abs=1e-12)


def test_class_response_takes_the_maximum_before_the_difference():
    mask = torch.ones(1, 1, 1, dtype=torch.float64)
    student = torch.tensor([2.0, -1.0], dtype=torch.float64).view(1, 2, 1, 1)
    assert class_response_loss(student, 2 * student.flip(1), mask).item() == 0


def test_responses_outside_the_mask_do_not_count():
    mask = centre_mask([BOX], AREA, 8, 8)
    outside = (mask == 0)[:, None]
    for loss, channels in ((class_response_loss, 3), (regression_response_loss, 5)):
        student, teacher = noise(1, channels, 8, 8).requires_grad_(), noise(1, channels, 8, 8, seed=1)
        changed = loss(student + 100 * outside, teacher, mask)
        changed.backward()
        assert changed.item() == pytest.approx(loss(student, teacher, mask).item(), rel=1e-12)
        assert (student.grad * outside).abs().max() == 0
    uniform = regression_response_loss(noise(1, 4, 8, 8) * 0 + 2, noise(1, 4, 8, 8) * 0, mask)
    assert uniform.item() == pytest.approx(2 * mask.sum().item() / (mask.sum().item() + 1e-4), rel=1e-12)


def test_background_features_do_not_count():
    student, teacher = noise(1, 4, 8, 8).requires_grad_(), noise(1, 4, 8, 8, seed=1)
    touched = torch.autograd.grad(sample(student, [key_points(BOX)], AREA).sum(), student)[0] != 0
    for loss in (crucial_point_loss, relation_loss):
        pair = lambda maps: [sample(item, [key_points(BOX)], AREA) for item in (maps, teacher)]  # noqa: E731
        before = loss(*pair(student))
        after = loss(*pair(student + 50 * ~touched))
        assert after.item() == pytest.approx(before.item(), rel=1e-12)
        gradient = torch.autograd.grad(after, student)[0]
        assert (gradient * ~touched).abs().max() == 0
        torch.testing.assert_close(gradient, torch.autograd.grad(before, student)[0])


# ---------------------------------------------------------------- the distiller on plain modules


class Boxes:
    def __init__(self, bev):
        self.bev = bev


class Head(nn.Module):
    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.heatmap, self.reg = nn.Conv2d(channels, classes, 1), nn.Conv2d(channels, 2, 1)

    def forward(self, x):
        return ([{"heatmap": self.heatmap(x), "reg": self.reg(x)}],)


class Detector(nn.Module):
    """A detector of three modules with the interface of mmdet3d's: its loss spoils the heat map in place, as theirs."""

    def __init__(self, sensor: str, channels: int = 4, classes: int = 3, low: int = 4):
        super().__init__()
        self.sensor = sensor
        setattr(self, sensor, nn.Sequential(nn.Conv2d(2, low, 3, padding=1), nn.BatchNorm2d(low)))
        self.pts_neck = nn.Conv2d(low, channels, 3, padding=1)
        self.pts_bbox_head = Head(channels, classes)

    def data_preprocessor(self, data, training):
        data["inputs"]["maps"] = torch.stack(data["inputs"]["img"])
        return data

    def extract_feat(self, inputs, metas):
        return None, self.pts_neck(getattr(self, self.sensor)(inputs["maps"]))

    def loss(self, inputs, samples):
        (task,) = self.pts_bbox_head(self.extract_feat(inputs, None)[1])[0]
        return {"task0.loss_heatmap": task["heatmap"].sigmoid_().mean(), "task0.loss_bbox": task["reg"].abs().mean()}


def batch(counts=(2, 0)) -> DetectionBatch:
    boxes = [noise(n, 5, seed=n) + torch.tensor([4.0, 4.0, 2.0, 2.0, 0.0], dtype=torch.float64) for n in counts]
    samples = [
        SimpleNamespace(metainfo={}, gt_instances_3d=SimpleNamespace(bboxes_3d=Boxes(item.abs()))) for item in boxes
    ]
    return DetectionBatch({"img": [noise(2, 8, 8, seed=5 + i).float() for i in range(len(counts))]}, samples)


def distiller(path="L2C", student=None, teacher=None, **arguments) -> UniDistill:
    torch.manual_seed(0)
    sensors = {"L": "pts_middle_encoder", "C": "view_transform", "F": "fusion"}
    student = student or Detector(sensors[path[2]])
    teacher = freeze(teacher or Detector(sensors[path[0]]))
    made = UniDistill(student, {"teacher": teacher}, path=path, point_cloud_range=[0, 0, -1, 8, 8, 1], **arguments)
    return made.train()


@pytest.mark.parametrize(
    ("path", "weights"), [("L2C", (100, 40, 10)), ("F2C", (10, 5, 10)), ("C2L", (10, 5, 1)), ("F2L", (10, 1, 10))]
)
def test_every_path_has_the_papers_weights_and_trains_the_student_alone(path, weights):
    made = distiller(path)
    before = {name: value.clone() for name, value in made.teacher.state_dict().items()}
    terms = made.loss(batch())
    assert list(terms) == ["task0.heatmap", "task0.bbox", "feature", "relation", "class_response", "box_response"]
    assert [terms[name][0] for name in ("feature", "relation", "class_response", "box_response")] == [
        *weights,
        weights[2],
    ]
    terms.total().backward()
    torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(value, before[name]) for name, value in made.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in made.teacher.parameters())
    assert all(parameter.grad is not None for parameter in made.student.parameters())
    assert made.deployed() is made.student


def test_class_response_reads_logits_although_the_head_squashes_them_in_place():
    teacher = Detector("pts_middle_encoder")
    teacher.pts_bbox_head.heatmap.bias.data += 7.0
    made = distiller(teacher=teacher, feature=0, relation=0)
    batched = batch()
    made.eval()
    found = made.loss(batched)["class_response"][1]
    maps = torch.stack(list(batched.inputs["img"]))
    own, theirs = (
        net.pts_bbox_head(net.pts_neck(getattr(net, net.sensor)(maps)))[0][0]["heatmap"]
        for net in (made.student, made.teacher)
    )
    mask = centre_mask(batched.boxes(), made.area, 8, 8)
    assert found.item() == pytest.approx(class_response_loss(own, theirs, mask).item(), rel=1e-5)


def test_no_boxes_cost_nothing():
    made = distiller()
    terms = made.loss(batch((0, 0)))
    for name in ("feature", "relation", "class_response", "box_response"):
        assert terms[name][1].item() == 0
    terms.total().backward()
    assert made.student.pts_bbox_head.reg.weight.grad.isfinite().all()


def test_baselines_need_no_teacher_run_or_match_the_whole_map():
    none = distiller(feature=0, relation=0, response=0)
    none.teacher.extract_feat = None  # calling it would raise
    assert list(none.loss(batch())) == ["task0.heatmap", "task0.bbox"]
    whole = distiller(feature=0, relation=0, response=0, whole_map=2.0)
    assert list(whole.loss(batch())) == ["task0.heatmap", "task0.bbox", "whole_map"]
    assert whole.loss(batch())["whole_map"][0] == 2.0


def test_a_teacher_of_batch_statistics_keeps_its_averages():
    torch.manual_seed(1)
    teacher = Detector("pts_middle_encoder")
    teacher.pts_middle_encoder[1].running_mean += 3.0
    fixed, batched = (distiller(teacher=teacher, teacher_norm=norm) for norm in ("eval", "batch"))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    values = [made.loss(batch())["feature"][1].item() for made in (fixed, batched)]
    assert values[0] != values[1]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())


def test_gaps_are_those_of_the_taps():
    made = distiller().eval()
    frames = [batch((2, 0)), batch((1, 1))]
    found = gaps(made, [(item, item.boxes()) for item in frames])
    lows, relative, far = [], [], []
    for item in frames:
        maps = torch.stack(list(item.inputs["img"]))
        low = [getattr(net, net.sensor)(maps) for net in (made.student, made.teacher)]
        high = [net.pts_neck(x) for net, x in zip((made.student, made.teacher), low)]
        points = [key_points(box) for box in item.boxes()]
        lows.append((sample(low[0], points, made.area) - sample(low[1], points, made.area)).abs().mean((1, 2)))
        pair = [relations(sample(x, points, made.area)) for x in high]
        relative.append((pair[0] - pair[1]).abs().mean((1, 2)))
        far.append((low[0] - low[1]).abs().mean(1)[background(item.boxes(), made.area, 8, 8)])
    for name, values in (("foreground", lows), ("relation", relative), ("background", far)):
        assert found[f"{name}_gap"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-5)


def test_other_channels_need_a_connector():
    wide = lambda: Detector("pts_middle_encoder", channels=6, low=5)  # noqa: E731
    with pytest.raises(InputError, match=r"low_channels: the student's map has 4 channels, the teacher's 5; give low_"):
        distiller(teacher=wide()).loss(batch())
    made = distiller(teacher=wide(), low_channels=(4, 5), high_channels=(4, 6))
    made.loss(batch()).total().backward()
    assert made.connectors["low"].weight.grad.abs().sum() > 0


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"teacher_taps: .*no module 'pts_neckk'; did you mean 'pts_neck'"):
        distiller(teacher_taps={"low": "pts_middle_encoder", "high": "pts_neckk"})
    with pytest.raises(InputError, match="UniDistill has one teacher, got 0"):
        UniDistill(Detector("view_transform"), {})
    with pytest.raises(InputError, match=r"model\.distiller: 'path' = 'L2X'"):
        UniDistill(Detector("view_transform"), {"teacher": Detector("view_transform")}, path="L2X")
    with pytest.raises(InputError, match="point_cloud_range"):
        UniDistill(Detector("view_transform"), {"teacher": Detector("view_transform")}, point_cloud_range=[0, 1])
    made = distiller(teacher=Detector("pts_middle_encoder", classes=2))
    with pytest.raises(InputError, match=r"its classes are of shape .*2, 8, 8.*the student's of .*3, 8, 8"):
        made.loss(batch())
