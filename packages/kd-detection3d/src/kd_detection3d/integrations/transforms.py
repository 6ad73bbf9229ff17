"""Transforms in mmdet3d's registry: cameras of any number, their size, and boxes without velocity.

Like `detectors`, this file needs mmdet3d alone, and goes along with a saved camera student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmdet3d.registry import TRANSFORMS
from mmdet3d.structures import BaseInstance3DBoxes
from mmengine.fileio import get


@TRANSFORMS.register_module()
class LoadCameras(BaseTransform):
    """Every camera of a frame that has a picture: `img`, a list of BGR arrays, and `lidar2img`, (4, 4) for each.

    cameras: their names, None for all. Raises ValueError: a camera that the frame does not have, pictures of several
    sizes.
    """

    def __init__(self, cameras: Sequence[str] | None = None):
        self.cameras = None if cameras is None else list(cameras)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        known = {name: item for name, item in results["images"].items() if "img_path" in item}
        missing = [name for name in self.cameras or () if name not in known]
        if missing or not known:
            raise ValueError(f"LoadCameras: the frame has no camera {missing or ''}; it has {', '.join(known)}")
        chosen = [known[name] for name in self.cameras or known]
        results["img_path"] = [item["img_path"] for item in chosen]
        results["img"] = [mmcv.imfrombytes(get(item["img_path"])) for item in chosen]
        results["lidar2img"] = [square(item["cam2img"]) @ square(item["lidar2cam"]) for item in chosen]
        sizes = {picture.shape[:2] for picture in results["img"]}
        if len(sizes) > 1:
            raise ValueError(f"LoadCameras: pictures of one size are read, got {sorted(sizes)}; name some in cameras")
        results["img_shape"] = results["ori_shape"] = results["pad_shape"] = sizes.pop()
        results["num_views"] = len(chosen)
        return results


def square(matrix: Any) -> np.ndarray:
    """A (3, 3) or (3, 4) matrix as (4, 4) float64, the rest from the identity."""
    matrix = np.asarray(matrix, np.float64)
    full = np.eye(4)
    full[: matrix.shape[0], : matrix.shape[1]] = matrix
    return full


@TRANSFORMS.register_module()
class ResizeCropImages(BaseTransform):
    """Pictures of a frame resized, cropped at the top, and flipped, with `lidar2img` following.

    size: rows and columns of the result. resize: range of a random factor on top of the one that fits the width.
    flip: chance of a horizontal flip of each picture. crop: range of the share of the rows above that is cut from the
    top, the rest from the bottom; 1 keeps the bottom.
    """

    def __init__(
        self,
        size: Sequence[int],
        resize: Sequence[float] = (1.0, 1.0),
        flip: float = 0.0,
        crop: Sequence[float] = (1.0, 1.0),
    ):
        self.size, self.resize, self.flip, self.crop = tuple(size), tuple(resize), flip, tuple(crop)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        pairs = [self._one(picture, camera) for picture, camera in zip(results["img"], results["lidar2img"])]
        results["img"] = [picture for picture, _ in pairs]
        results["lidar2img"] = [camera for _, camera in pairs]
        results["img_shape"] = results["pad_shape"] = self.size
        return results

    def _one(self, picture: np.ndarray, camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = self.size
        factor = columns / picture.shape[1] * np.random.uniform(*self.resize)
        width, height = round(picture.shape[1] * factor), round(picture.shape[0] * factor)
        sx, sy = width / picture.shape[1], height / picture.shape[0]
        top = round((height - rows) * np.random.uniform(*self.crop))
        left = round((width - columns) * (0.5 if self.resize[0] == self.resize[1] else np.random.uniform()))
        placed = np.zeros((rows, columns, *picture.shape[2:]), picture.dtype)
        scaled = mmcv.imresize(picture, (width, height))
        to = (max(0, -top), max(0, -left))
        part = scaled[max(0, top) : top + rows, max(0, left) : left + columns]
        placed[to[0] : to[0] + part.shape[0], to[1] : to[1] + part.shape[1]] = part
        # Pixel centres have whole coordinates: u' = (u + 1/2) s - 1/2 - left.
        change = np.eye(4)
        change[0, 0], change[1, 1] = sx, sy
        change[0, 2], change[1, 2] = (sx - 1) / 2 - left, (sy - 1) / 2 - top
        if np.random.uniform() < self.flip:
            placed = np.ascontiguousarray(placed[:, ::-1])
            mirror = np.eye(4)
            mirror[0, 0], mirror[0, 2] = -1, columns - 1
            change = mirror @ change
        return placed, change @ camera


@TRANSFORMS.register_module()
class ZeroVelocity(BaseTransform):
    """True boxes of data sets without velocities with velocity 0, for mmdet3d's CenterHead, which wants one."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        boxes: BaseInstance3DBoxes = results["gt_bboxes_3d"]
        if boxes.tensor.shape[1] == 7:
            values = np.concatenate([boxes.tensor.numpy(), np.zeros((len(boxes), 2), np.float32)], axis=1)
            results["gt_bboxes_3d"] = type(boxes)(values, box_dim=9)
        return results
