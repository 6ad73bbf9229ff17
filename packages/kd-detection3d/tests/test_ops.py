"""The operators in torch against what is known of boxes and points."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_detection3d.engine import ops
from kd_detection3d.engine.bev import key_points


def boxes(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_intersections_that_are_known():
    square = boxes((0, 0, 2, 2, 0))
    others = boxes((0, 0, 2, 2, 0), (1, 0, 2, 2, 0), (0, 0, 2, 2, math.pi / 4), (0, 0, 1, 1, 0.3), (5, 5, 1, 1, 0.1))
    found = ops.pairwise_intersection(square, others)[0]
    octagon = 8 * (math.sqrt(2) - 1)  # two unit squares of side 2, one turned by 45 degrees
    assert found.tolist() == pytest.approx([4, 2, octagon, 1, 0], abs=1e-9)
    assert ops.rotated_iou(square, others)[0, 1].item() == pytest.approx(1 / 3)
    assert ops.rotated_iou(square, others, over="second")[0, 3].item() == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=10, max_size=10), st.floats(-50, 50))
def test_intersection_is_symmetric_moves_along_and_agrees_with_sampling(values, shift):
    row = torch.tensor(values, dtype=torch.float64).view(2, 5)
    pair = torch.cat([row[:, :2], row[:, 2:4].abs() + 0.3, row[:, 4:] * 3], dim=1)
    area = ops.intersection(pair[:1], pair[1:])
    torch.testing.assert_close(area, ops.intersection(pair[1:], pair[:1]))
    moved = pair + torch.tensor([shift, -shift, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(area, ops.intersection(moved[:1], moved[1:]), atol=1e-6, rtol=1e-6)
    side = (torch.arange(120, dtype=torch.float64) + 0.5) / 120 * 6 - 3
    grid = torch.cartesian_prod(side, side, torch.zeros(1, dtype=torch.float64))
    solid = torch.stack([torch.cat([p[:2], p.new_tensor([-1]), p[2:4], p.new_tensor([2]), p[4:]]) for p in pair])
    sampled = ops.in_boxes(grid, solid).all(1).double().mean() * 36
    assert area.item() == pytest.approx(sampled.item(), abs=0.06)


def test_corners_agree_with_the_key_points_of_a_box():
    box = boxes((1, 2, 4, 2, 0.7))
    both = [
        set(map(tuple, points.round(decimals=9).tolist())) for points in (ops.corners(box)[0], key_points(box)[0, :4])
    ]
    assert both[0] == both[1]


def test_rotated_nms_keeps_the_best_of_each_heap():
    candidates = boxes((0, 0, 4, 2, 0.1), (0.1, 0, 4, 2, 0.1), (10, 0, 4, 2, 1.0), (0, 0, 4, 2, 1.6))
    scores = torch.tensor([0.5, 0.9, 0.3, 0.8])
    order = scores.argsort(descending=True)
    labels = torch.empty(0, dtype=torch.int)
    kept = ops.nms_rotated(candidates, scores, order, candidates[order], labels, 0.5, False)
    assert kept.tolist() == [1, 3, 2]
    labelled = torch.cat([candidates, torch.tensor([[0.0], [1], [0], [0]], dtype=torch.float64)], dim=1)
    kept = ops.nms_rotated(labelled, scores, order, labelled[order], labels, 0.5, True)
    assert kept.tolist() == [1, 3, 0, 2]


def test_voxels_hold_the_first_points_in_order():
    points = torch.tensor([[2.5, 0.5, 0.1, 1], [0.5, 0.5, 0.1, 2], [2.6, 0.6, 0.2, 3], [9, 9, 9, 4], [2.7, 0.1, 0, 5],
                           [0.1, 1.5, 0, 6]])  # fmt: skip
    size, limits = torch.tensor([1.0, 1, 1]), torch.tensor([0.0, 0, 0, 4, 2, 1])
    voxels, coors = torch.zeros(2, 2, 4), torch.zeros(2, 3, dtype=torch.int)
    counts, number = torch.zeros(2, dtype=torch.int), torch.zeros((), dtype=torch.long)
    ops.hard_voxelize(points, size, limits, voxels, coors, counts, number, max_points=2, max_voxels=2)
    assert number == 2
    assert coors.tolist() == [[0, 0, 2], [0, 0, 0]]  # z, y, x
    assert counts.tolist() == [2, 1]
    assert voxels[..., 3].tolist() == [[1, 3], [2, 0]]
    each = torch.zeros(6, 3, dtype=torch.int)
    ops.dynamic_voxelize(points, size, limits, each)
    assert each[3].tolist() == [-1, -1, -1]
    assert each[5].tolist() == [0, 1, 0]
    ops.hard_voxelize(points[3:4], size, limits, voxels, coors, counts, number, max_points=2, max_voxels=2)
    assert number == 0


def test_points_in_turned_boxes():
    solid = torch.tensor([[0, 0, 0, 4, 1, 2, math.pi / 2], [0, 0, 0, 9, 9, 9, 0.0]])
    points = torch.tensor([[0.0, 1.9, 1.0], [1.9, 0.0, 1.0], [0.0, 0.0, -0.1]])
    found = torch.zeros(2, 3, dtype=torch.int)
    ops.points_in_boxes_cpu(solid, points, found)
    assert found.tolist() == [[1, 0, 0], [1, 1, 0]]
    part, every = torch.zeros(1, 3, dtype=torch.int), torch.zeros(1, 3, 2, dtype=torch.int)
    ops.points_in_boxes_part(solid[None], points[None], part)
    ops.points_in_boxes_all(solid[None], points[None], every)
    assert part.tolist() == [[0, 1, -1]]
    assert torch.equal(every[0].T, found)
