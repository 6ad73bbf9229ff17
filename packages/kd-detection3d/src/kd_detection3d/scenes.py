"""Rendered driving scenes with exact boxes: embedded data for 3D detection, on disk in KITTI's layout.

A scene is a ground plane with cars, cyclists and pedestrians in front of the sensors. One ray caster makes both the
camera's picture and the LiDAR's points, so occlusion is the same in both. They disagree about the background. The
camera alone sees colour and flat painted patches on the ground, which look like objects from above and return no point
of their own. The LiDAR alone measures depth, and it alone sees spray: loose clouds of faint points in the air, as wet
roads and exhaust give.

Frames follow KITTI: the LiDAR's x is forward, y left, z up, the sensors sit together 1.7 m above the ground.

    training/velodyne/000000.bin     float32 x, y, z, reflectance
    training/image_2/000000.png
    kitti_infos_train.json           mmdet3d's info format, as JSON: nothing is unpickled
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcore.stages import cache_folder

CLASSES = ("Pedestrian", "Cyclist", "Car")  # the order of KITTI's labels in mmdet3d
SIZES = ((0.7, 0.7, 1.75), (1.8, 0.7, 1.7), (4.1, 1.8, 1.6))  # along the heading, across, height; metres
COLOURS = ((200, 70, 60), (70, 170, 80), (70, 90, 200))
REFLECTANCE = (0.25, 0.4, 0.75)
CHANCES = (0.35, 0.25, 0.4)
COUNTS = {"train": 300, "val": 100}
RANGE = (0.0, -12.8, -3.0, 25.6, 12.8, 1.0)
GROUND = -1.7
IMAGE = (64, 128)  # rows, columns; 90 degrees wide
VERSION = 2  # of what is drawn; a change draws the scenes again


@dataclass
class Scene:
    """boxes (N, 7): x, y, z of the bottom's centre, dx, dy, dz, heading; labels (N,); paint (M, 5), labels (M,)."""

    boxes: np.ndarray
    labels: np.ndarray
    paint: np.ndarray
    paint_labels: np.ndarray


def write(root: Path, *, seed: int = 0) -> Path:
    """Draws all scenes into `root` unless it holds them already, atomically; returns `root`."""
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root.parent, prefix=".tmp-"))
    try:
        for number, split in enumerate(COUNTS):
            _write_split(temporary, split, (seed, number))
        os.rename(temporary, root)
    except OSError:
        if not root.is_dir():  # another process was faster: its scenes are the same
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def default_root(seed: int = 0) -> Path:
    """The folder in kd's cache for these scenes."""
    counts = "-".join(map(str, COUNTS.values()))
    return cache_folder() / "rendered-scenes" / f"v{VERSION}-seed{seed}-{counts}"


# ---------------------------------------------------------------- layout


def draw_scene(rng: np.random.Generator) -> Scene:
    """One to six objects that do not touch, all within the camera's view, and two to four painted patches."""
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    for _ in range(rng.integers(1, 7)):
        label = int(rng.choice(3, p=CHANCES))
        size = np.array(SIZES[label]) * rng.uniform(0.85, 1.15, 3)
        for _ in range(20):
            x = rng.uniform(4, 24)
            y = rng.uniform(-0.85, 0.85) * min(x, 12.0)
            apart = size[:2].max() / 2 + 0.3
            if all(np.hypot(x - b[0], y - b[1]) > apart + b[3:5].max() / 2 for b in boxes):
                boxes.append(np.array([x, y, GROUND, *size, rng.uniform(-np.pi / 2, np.pi / 2)]))
                labels.append(label)
                break
    count = rng.integers(2, 5)
    x = rng.uniform(4, 24, count)
    y = rng.uniform(-0.85, 0.85, count) * np.minimum(x, 12)
    paint_labels = rng.integers(0, 3, count)
    sides = np.array(SIZES)[paint_labels, :2] * rng.uniform(0.8, 1.2, (count, 2))
    paint = np.column_stack([x, y, sides, rng.uniform(-np.pi, np.pi, count)])
    return Scene(np.stack(boxes), np.array(labels), paint, paint_labels)


# ---------------------------------------------------------------- rays


def cast(rays: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First hits of rays (R, 3) from the origin: distance in lengths of the ray, index, cosine of incidence.

    Index: a box's, -1 for the ground, -2 for the sky, whose distance is infinite.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        down = np.where(rays[:, 2] < -1e-6, GROUND / rays[:, 2], np.inf)
        distance, index = down, np.where(np.isfinite(down), -1, -2)
        facing = np.abs(rays[:, 2]) / np.linalg.norm(rays, axis=1)
        for number, (x, y, z, dx, dy, dz, heading) in enumerate(boxes):
            cos, sin = np.cos(heading), np.sin(heading)
            turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
            start, way = turn @ -np.array([x, y, z + dz / 2]), rays @ turn.T
            half = np.array([dx, dy, dz]) / 2
            near, far = (-half - start) / way, (half - start) / way
            entry, leave = np.minimum(near, far), np.maximum(near, far)
            first, side = entry.max(1), entry.argmax(1)
            hit = (first < leave.min(1)) & (first > 0) & (first < distance)
            distance, index = np.where(hit, first, distance), np.where(hit, number, index)
            cosine = np.abs(way[np.arange(len(way)), side]) / np.linalg.norm(way, axis=1)
            facing = np.where(hit, cosine, facing)
    return distance, index, facing


def points_of(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """What the LiDAR returns: (P, 4) float32 x, y, z, reflectance. 18 beams, one ray a degree, noise of 2 cm."""
    azimuth, elevation = np.meshgrid(np.radians(np.arange(-47, 48)), np.radians(np.linspace(-20, 2, 18)))
    rays = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], -1)
    rays = rays.reshape(-1, 3)
    distance, index, facing = cast(rays, scene.boxes)
    seen = np.isfinite(distance) & (distance < 40)
    rays, distance, index, facing = rays[seen], distance[seen], index[seen], facing[seen]
    distance = distance + rng.normal(0, 0.02, len(distance))
    material = np.where(index >= 0, np.array(REFLECTANCE)[scene.labels][np.maximum(index, 0)], 0.1)
    light = material * (0.5 + 0.5 * facing) + rng.normal(0, 0.03, len(material))
    return np.column_stack([rays * distance[:, None], np.clip(light, 0, 1)]).astype(np.float32)


def spray(rng: np.random.Generator) -> np.ndarray:
    """Two to five clouds of 8 to 24 points that belong to no object: (P, 4) float32 as `points_of` has them."""
    clouds = []
    for _ in range(rng.integers(2, 6)):
        x = rng.uniform(4, 24)
        centre = [x, rng.uniform(-0.85, 0.85) * min(x, 12.0), rng.uniform(GROUND + 0.4, GROUND + 1.4)]
        offsets = rng.normal(0, (0.6, 0.6, 0.3), (rng.integers(8, 25), 3))
        clouds.append(np.column_stack([centre + offsets, rng.uniform(0.05, 0.3, len(offsets))]))
    points = np.concatenate(clouds)
    return points[points[:, 2] > GROUND].astype(np.float32)


def intrinsics() -> np.ndarray:
    """cam2img, (4, 4): a pixel's centre has whole coordinates."""
    rows, columns = IMAGE
    matrix = np.eye(4)
    matrix[0, 0] = matrix[1, 1] = columns / 2
    matrix[0, 2], matrix[1, 2] = (columns - 1) / 2, rows * 0.4
    return matrix


LIDAR2CAM = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])


def picture_of(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """What the camera sees: RGB uint8 of shape IMAGE."""
    rows, columns = IMAGE
    matrix = intrinsics()
    u, v = np.meshgrid(np.arange(columns), np.arange(rows))
    pixels = np.stack([(u - matrix[0, 2]) / matrix[0, 0], (v - matrix[1, 2]) / matrix[1, 1], np.ones_like(u)], -1)
    rays = pixels.reshape(-1, 3) @ LIDAR2CAM[:3, :3]  # the transposed inverse of a rotation is itself
    distance, index, facing = cast(rays, scene.boxes)
    sky = np.stack([np.linspace(150, 215, rows)] * 3, -1)[:, None].repeat(columns, 1).reshape(-1, 3) + np.array(
        [0, 8, 25]
    )
    colour = np.where((index == -2)[:, None], sky, _ground(scene, rays, distance, rng))
    shades = np.array(COLOURS)[scene.labels] * rng.uniform(0.7, 1.2, (len(scene.labels), 1))
    body = shades[np.maximum(index, 0)] * (0.45 + 0.55 * facing[:, None])
    colour = np.where((index >= 0)[:, None], body, colour)
    far = np.clip(np.where(np.isfinite(distance), distance, 40) / 80, 0, 0.5)[:, None]
    colour = colour * (1 - far) + 190 * far + rng.normal(0, 5, colour.shape)
    return np.clip(np.rint(colour), 0, 255).astype(np.uint8).reshape(rows, columns, 3)


def _ground(scene: Scene, rays: np.ndarray, distance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Colour of the ground where rays meet it: asphalt with a coarse pattern and painted patches."""
    place = rays[:, :2] * np.where(np.isfinite(distance), distance, 0)[:, None]
    phase = rng.uniform(0, 6, 2)
    tone = 105 + 14 * np.sin(place[:, 0] * 1.7 + phase[0]) * np.sin(place[:, 1] * 1.3 + phase[1])
    colour = np.stack([tone] * 3, -1)
    for (x, y, dx, dy, heading), label in zip(scene.paint, scene.paint_labels):
        cos, sin = np.cos(heading), np.sin(heading)
        offset = place - [x, y]
        inside = (np.abs(offset @ [cos, sin]) < dx / 2) & (np.abs(offset @ [-sin, cos]) < dy / 2)
        colour = np.where(inside[:, None], np.array(COLOURS[label]) * 0.8, colour)
    return colour


# ---------------------------------------------------------------- files


def _write_split(root: Path, split: str, key: tuple[int, ...]) -> None:
    from PIL import Image

    clouds, images = root / "training" / "velodyne", root / "training" / "image_2"
    clouds.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    offset = sum(COUNTS[name] for name in list(COUNTS)[: list(COUNTS).index(split)])
    frames = []
    for number in range(COUNTS[split]):
        rng = np.random.default_rng((*key, number))
        scene, name = draw_scene(rng), f"{offset + number:06d}"
        points = points_of(scene, rng)
        np.concatenate([points, spray(rng)]).tofile(clouds / f"{name}.bin")
        Image.fromarray(picture_of(scene, rng)).save(images / f"{name}.png")
        frames.append(_info(scene, points, number, name))
    meta = {
        "dataset": "kitti",
        "categories": {name: label for label, name in enumerate(CLASSES)},
        "info_version": "1.1",
    }
    text = json.dumps({"metainfo": meta, "data_list": frames})
    (root / f"kitti_infos_{split}.json").write_text(text, encoding="utf-8")


def _info(scene: Scene, points: np.ndarray, number: int, name: str) -> dict[str, Any]:
    camera = {
        "img_path": f"{name}.png",
        "height": IMAGE[0],
        "width": IMAGE[1],
        "cam2img": intrinsics().tolist(),
        "lidar2cam": LIDAR2CAM.tolist(),
        "lidar2img": (intrinsics() @ LIDAR2CAM).tolist(),
    }
    # As in nuScenes, what no point of the LiDAR hits is not part of the truth: it is hidden from both sensors.
    seen = [(box, int(label)) for box, label in zip(scene.boxes, scene.labels) if _inside(points[:, :3], box).any()]
    instances = [_instance(box, label, points, index) for index, (box, label) in enumerate(seen)]
    return {
        "sample_idx": number,
        "images": {"CAM2": camera},
        "lidar_points": {"lidar_path": f"{name}.bin", "num_pts_feats": 4},
        "instances": instances,
        "paint": scene.paint.tolist(),
    }


def _instance(box: np.ndarray, label: int, points: np.ndarray, number: int) -> dict[str, Any]:
    """KITTI's fields of a box; `bbox_3d` is in the camera's frame: x, y, z, length, height, width, rotation_y."""
    x, y, z, dx, dy, dz, heading = box
    location = (LIDAR2CAM @ [x, y, z, 1])[:3]
    rotation = (-heading - np.pi / 2 + np.pi) % (2 * np.pi) - np.pi
    inside = _inside(points[:, :3], box)
    return {
        "bbox": [float(value) for value in _bounds(box)],
        "bbox_label": label,
        "bbox_3d": [float(value) for value in (*location, dx, dz, dy, rotation)],
        "bbox_label_3d": label,
        "depth": float(x),
        "center_2d": [float(v) for v in (intrinsics()[:3, :3] @ (location - [0, dz / 2, 0]) / x)[:2]],
        "num_lidar_pts": int(inside.sum()),
        "difficulty": 0,
        "truncated": 0.0,
        "occluded": 0,
        "alpha": float(rotation - np.arctan2(location[0], location[2])),
        "score": 0.0,
        "index": number,
        "group_id": number,
    }


def _inside(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    x, y, z, dx, dy, dz, heading = box
    offset = points - [x, y, z + dz / 2]
    cos, sin = np.cos(heading), np.sin(heading)
    local = np.column_stack([offset[:, :2] @ [cos, sin], offset[:, :2] @ [-sin, cos], offset[:, 2]])
    return (np.abs(local) <= np.array([dx, dy, dz]) / 2 + 0.1).all(1)


def _bounds(box: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom of the box in the picture."""
    x, y, z, dx, dy, dz, heading = box
    signs = np.array(np.meshgrid([-0.5, 0.5], [-0.5, 0.5], [0, 1])).reshape(3, -1).T * [dx, dy, dz]
    cos, sin = np.cos(heading), np.sin(heading)
    corners = np.column_stack([x + signs[:, :2] @ [cos, -sin], y + signs[:, :2] @ [sin, cos], z + signs[:, 2]])
    seen = corners @ LIDAR2CAM[:3, :3].T @ intrinsics()[:3, :3].T
    seen = seen[:, :2] / np.maximum(seen[:, 2:], 0.1)
    limits = [IMAGE[1] - 1, IMAGE[0] - 1]
    return np.concatenate([np.clip(seen.min(0), 0, limits), np.clip(seen.max(0), 0, limits)])
