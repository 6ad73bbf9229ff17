"""Pictures of frames: from above, the LiDAR's points, true boxes and predicted ones; boxes in a camera's picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kd_detection3d.metrics import Frame

COLOURS = ((230, 80, 60), (60, 170, 80), (60, 100, 220), (230, 160, 30), (150, 80, 190), (40, 170, 180))
SIDE = 256  # pixels of the longer side


def bird_view(
    area: Sequence[float], points: np.ndarray | None, truth: Frame | None, found: Frame | None, *, least: float = 0.3
) -> np.ndarray:
    """RGB uint8 picture with x up and y to the left, as a driver sees it; boxes below the score `least` are left out.

    area: x0, y0, x1, y1 in metres. points (P, >= 2). True boxes are grey and filled, predicted ones outlined in their
    class's colour with a line to the front.
    """
    from PIL import Image, ImageDraw

    x0, y0, x1, y1 = area
    scale = SIDE / max(x1 - x0, y1 - y0)
    size = (max(1, round((y1 - y0) * scale)), max(1, round((x1 - x0) * scale)))
    image = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(image)
    place = lambda xy: [((y1 - y) * scale, (x1 - x) * scale) for x, y in np.asarray(xy).tolist()]  # noqa: E731
    for box in truth.boxes if truth is not None else ():
        draw.polygon(place(_corners(box)), fill=(205, 205, 210), outline=(120, 120, 130))
    if points is not None and len(points):
        draw.point(place(points[:, :2]), fill=(110, 110, 110))
    if found is not None:
        for box, label, score in zip(found.boxes, found.labels, found.scores):
            if score >= least:
                colour = COLOURS[int(label) % len(COLOURS)]
                draw.polygon(place(_corners(box)), outline=colour)
                draw.line(place([box[:2], box[:2] + box[3] / 2 * np.array([np.cos(box[6]), np.sin(box[6])])]), colour)
    return np.asarray(image)


def _corners(box: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(box[6]), np.sin(box[6])
    local = np.array([[0.5, 0.5], [0.5, -0.5], [-0.5, -0.5], [-0.5, 0.5]]) * box[3:5]
    return box[:2] + local @ np.array([[cos, sin], [-sin, cos]])


_EDGES = ((0, 1), (0, 2), (0, 4), (1, 3), (1, 5), (2, 3), (2, 6), (3, 7), (4, 5), (4, 6), (5, 7), (6, 7))


def camera_view(
    image: np.ndarray, lidar2img: np.ndarray, truth: Frame | None, found: Frame | None, *, least: float = 0.3
) -> np.ndarray:
    """The RGB uint8 picture (H, W, 3) with the edges of true boxes in white, of predicted ones in their class's colour.

    lidar2img (4, 4): from the boxes' frame into pixels. Boxes that reach behind the camera are left out, and predicted
    ones below the score `least`.
    """
    from PIL import Image, ImageDraw

    shown = Image.fromarray(np.ascontiguousarray(image))
    draw = ImageDraw.Draw(shown)
    drawn = [(box, (255, 255, 255)) for box in (truth.boxes if truth is not None else ())]
    if found is not None:
        kept = found.scores >= least
        drawn += [(b, COLOURS[int(k) % len(COLOURS)]) for b, k in zip(found.boxes[kept], found.labels[kept])]
    for box, colour in drawn:
        places = _solid(box) @ np.asarray(lidar2img)[:3, :3].T + np.asarray(lidar2img)[:3, 3]
        if places[:, 2].min() > 0.1:
            pixels = places[:, :2] / places[:, 2:]
            for start, end in _EDGES:
                draw.line([*map(float, pixels[start]), *map(float, pixels[end])], fill=colour)
    return np.asarray(shown)


def _solid(box: np.ndarray) -> np.ndarray:
    """The eight corners (8, 3) of x, y, z of the bottom's centre, dx, dy, dz, heading."""
    signs = np.array([(x, y, z) for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (0, 1)])
    local = signs * box[3:6]
    cos, sin = np.cos(box[6]), np.sin(box[6])
    turned = np.column_stack([local[:, :2] @ np.array([[cos, sin], [-sin, cos]]), local[:, 2]])
    return box[:3] + turned


def row(
    area: Sequence[float], camera: np.ndarray | None, points: np.ndarray | None, truth: Frame, found: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The pictures of one frame by column: camera, points and truth, and each network's boxes over the truth."""
    columns = {} if camera is None else {"camera": camera}
    columns["points and truth"] = bird_view(area, points, truth, None)
    columns.update({name: bird_view(area, None, truth, frame) for name, frame in found.items()})
    return columns
