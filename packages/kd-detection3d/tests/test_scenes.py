"""Rendered scenes on disk, and the metric by centre distance."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from kd_detection3d import metrics, pictures, scenes


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "COUNTS", {"train": 3, "val": 2})
    return scenes.write(tmp_path / "a")


def test_a_ray_meets_the_nearer_of_two_boxes_then_the_ground_then_nothing():
    boxes = np.array([[10, 0, scenes.GROUND, 2, 2, 3, 0.0], [6, 0, scenes.GROUND, 2, 2, 3, math.pi / 4]])
    rays = np.array([[1.0, 0, 0], [1, 0.5, -0.1], [1, 0, 1]])
    distance, index, facing = scenes.cast(rays, boxes)
    assert index.tolist() == [1, -1, -2]
    assert distance[:2].tolist() == pytest.approx([6 - math.sqrt(2), 17])
    assert np.isinf(distance[2])
    assert facing[0] == pytest.approx(math.sqrt(0.5))


def test_points_lie_on_boxes_and_ground_and_the_picture_shows_the_boxes():
    box = np.array([[8.0, 1.0, scenes.GROUND, 4, 2, 1.6, 0.4]])
    scene = scenes.Scene(box, np.array([2]), np.array([[6.0, -3.0, 2.0, 2.0, 0.0]]), np.array([0]))
    rng = np.random.default_rng(0)
    points = scenes.points_of(scene, rng)
    on_box = scenes._inside(points[:, :3], box[0]) & (points[:, 2] > scenes.GROUND + 0.15)
    on_ground = np.abs(points[:, 2] - scenes.GROUND) < 0.15
    assert on_box.sum() > 50
    assert (on_box | on_ground).mean() > 0.98
    assert points[on_box, 3].mean() > 3 * points[~on_box, 3].mean()
    picture = scenes.picture_of(scene, rng)
    left, top, right, bottom = scenes._bounds(box[0]).round().astype(int)
    middle = picture[(top + bottom) // 2, (left + right) // 2].astype(int)
    assert middle[2] > middle[0] + 30  # a car is blue
    painted = scenes.intrinsics()[:3, :3] @ scenes.LIDAR2CAM[:3, :3] @ [6.0, -3.0, scenes.GROUND]
    u, v = (painted[:2] / painted[2]).round().astype(int)
    assert picture[v, u, 0] > int(picture[v, u, 2]) + 30  # red paint, where no point stands out
    near = np.hypot(points[:, 0] - 6, points[:, 1] + 3) < 1
    assert near.any()
    assert points[near, 3].max() < 0.25


def test_spray_is_in_the_air_and_no_object():
    clouds = [scenes.spray(np.random.default_rng(seed)) for seed in range(20)]
    points = np.concatenate(clouds)
    assert points.dtype == np.float32
    assert all(10 < len(cloud) <= 5 * 24 for cloud in clouds)
    assert (points[:, 2] > scenes.GROUND).all()
    assert 0.2 < points[:, 2].mean() - scenes.GROUND < 1.5
    assert ((points[:, 3] >= 0.05) & (points[:, 3] <= 0.3)).all()
    assert np.array_equal(scenes.spray(np.random.default_rng(3)), clouds[3])


def test_files_follow_kittis_layout_and_are_the_same_again(root, tmp_path):
    infos = json.loads((root / "kitti_infos_val.json").read_text())
    assert infos["metainfo"]["categories"] == {"Pedestrian": 0, "Cyclist": 1, "Car": 2}
    assert [frame["sample_idx"] for frame in infos["data_list"]] == [0, 1]
    frame = infos["data_list"][0]
    points = np.fromfile(root / "training" / "velodyne" / frame["lidar_points"]["lidar_path"], np.float32)
    assert points.reshape(-1, 4)[:, 0].min() > 0
    image = Image.open(root / "training" / "image_2" / frame["images"]["CAM2"]["img_path"])
    assert image.size == scenes.IMAGE[::-1]
    again = scenes.write(tmp_path / "b")
    for path in sorted(item for item in root.rglob("*") if item.is_file()):
        assert path.read_bytes() == (again / path.relative_to(root)).read_bytes(), path
    before = (root / "kitti_infos_val.json").stat().st_mtime_ns
    scenes.write(root, seed=5)
    assert (root / "kitti_infos_val.json").stat().st_mtime_ns == before


def frame(*rows, scores=None):
    rows = np.array(rows, float).reshape(-1, 4)
    boxes = np.zeros((len(rows), 7))
    boxes[:, :2], boxes[:, 3:6], boxes[:, 6] = rows[:, :2], 1.0, rows[:, 2]
    return metrics.Frame(boxes, rows[:, 3].astype(int), np.ones(len(rows)) if scores is None else np.array(scores))


def test_perfect_and_empty_predictions():
    truth = [frame((0, 0, 0, 0), (5, 5, 1, 1)), frame((3, 1, 2, 0))]
    best = metrics.detection_scores(truth, truth, ("a", "b", "c"))
    assert best["mAP"] == pytest.approx(1)
    assert [best[name] for name in ("ATE", "ASE", "AOE")] == pytest.approx([0, 0, 0])
    assert set(best) == {"mAP", *(f"mAP_{t}m" for t in ("0.5", "1", "2", "4")), "AP/a", "AP/b", "ATE", "ASE", "AOE"}
    none = metrics.detection_scores([frame(), frame()], truth, ("a", "b", "c"))
    assert none["mAP"] == 0
    assert math.isnan(none["ATE"])


def test_detections_on_clutter():
    truth = frame((10, 0, 0, 2))
    paint = np.array([[10.5, 0.5, 1, 1, 0], [5, 5, 1, 1, 0], [20, -3, 1, 1, 0]])
    found = frame(
        *((x, y, 0, 2) for x, y in ((10.4, 0.4), (5.2, 5.2), (5, 6.1), (20, -3), (15, 0))),
        scores=[0.9, 0.9, 0.9, 0.2, 0.9],
    )
    # Of five: one is right, one on a patch, one beside it, one too weak, one elsewhere.
    assert metrics.on_clutter(found, truth, paint) == 1
    assert metrics.on_clutter(found, truth, paint, score=0.1, near=1.5) == 3
    assert metrics.on_clutter(found, frame(), paint) == 2
    assert metrics.on_clutter(frame(), truth, paint) == 0


def test_a_true_box_is_matched_once_by_the_best_score_within_the_threshold():
    truth = [frame((0, 0, 0, 0), (10, 0, 0, 0))]
    found = [frame((0.2, 0, 0, 0), (0.1, 0, 0, 0), (10.9, 0, 0, 0), scores=[0.9, 0.8, 0.7])]
    _, right, pairs = metrics.match(found, truth, 0, 1.0)
    assert right.tolist() == [True, False, True]
    assert pairs.tolist() == [[0, 0, 0], [0, 2, 1]]
    assert metrics.match(found, truth, 0, 0.5)[1].tolist() == [True, False, False]
    # recall .5 at precision 1, then 1 at 2/3 (1/2 in between at recall .5)
    curve = [1.0 if r <= 0.5 else None for r in np.linspace(0, 1, 101)]
    assert curve[50] == 1.0
    value = metrics.average_precision(right, 2)
    grid = np.interp(np.linspace(0, 1, 101), [0.5, 0.5, 1.0], [1, 0.5, 2 / 3], right=0)
    assert value == pytest.approx(np.maximum(grid[11:] - 0.1, 0).mean() / 0.9)
    assert 0.6 < value < 0.9


def test_boxes_are_drawn_where_the_camera_sees_them():
    box = np.array([[8.0, 1.0, scenes.GROUND, 4, 2, 1.6, 0.4]])
    scene = scenes.Scene(box, np.array([2]), np.zeros((0, 5)), np.zeros(0, int))
    picture = scenes.picture_of(scene, np.random.default_rng(0))
    view = scenes.intrinsics() @ scenes.LIDAR2CAM
    one = metrics.Frame(box, np.array([2]), np.ones(1))
    drawn = pictures.camera_view(picture, view, None, one)
    rows, columns = np.nonzero((drawn != picture).any(-1))
    assert [columns.min(), rows.min(), columns.max(), rows.max()] == pytest.approx(scenes._bounds(box[0]), abs=1)
    assert {tuple(pixel) for pixel in drawn[rows, columns]} == {pictures.COLOURS[2]}
    faint = metrics.Frame(box, np.array([2]), np.full(1, 0.1))
    behind = metrics.Frame(box * [-1, 1, 1, 1, 1, 1, 1], np.array([2]), np.ones(1))
    assert np.array_equal(pictures.camera_view(picture, view, behind, faint), picture)
    assert (pictures.camera_view(picture, view, one, None)[rows, columns] == 255).all()
