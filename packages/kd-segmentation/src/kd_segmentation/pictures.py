"""Pictures of label maps: colours, overlays, and rows of image, truth, teacher and student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kd_segmentation.engine.batch import IGNORE


def colours(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """RGB uint8 (H, W, 3) of labels (H, W); ignored pixels are white. ValueError for a label without a colour."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = np.asarray(palette, np.uint8)
    beyond = labels[(labels != IGNORE) & (labels >= len(palette))]
    if beyond.size:
        raise ValueError(f"labels: {int(beyond[0])} has no colour, the palette has {len(palette)}")
    return table[labels.astype(np.uint8)]


def overlay(
    image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]], opacity: float = 0.6
) -> np.ndarray:
    """The colours of the labels over a grey version of the RGB uint8 image (H, W, 3); ignored pixels show the image."""
    grey = image.astype(np.float32).mean(2, keepdims=True)
    mixed = (1 - opacity) * grey + opacity * colours(labels, palette)
    return np.where((labels == IGNORE)[..., None], image, np.rint(mixed)).astype(np.uint8)


def row(
    image: np.ndarray, truth: np.ndarray | None, predictions: Mapping[str, np.ndarray], palette: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """The pictures of one image by column: image, truth, one overlay a network, and where the student is wrong."""
    columns = {"image": image}
    if truth is not None:
        columns["truth"] = overlay(image, truth, palette)
    columns.update({name: overlay(image, labels, palette) for name, labels in predictions.items()})
    if truth is not None and "student" in predictions:
        wrong = (predictions["student"] != truth) & (truth != IGNORE)
        columns["student's errors"] = np.where(wrong[..., None], np.uint8([220, 30, 30]), image // 3 + 150).astype(
            np.uint8
        )
    return columns


def strip(columns: Mapping[str, np.ndarray], gap: int = 2) -> np.ndarray:
    """The columns side by side with a white gap, one RGB picture."""
    pictures = list(columns.values())
    bar = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, bar)][:-1], axis=1)
