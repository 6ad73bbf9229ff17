"""Small pictures of graphs for the report, in numpy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Ten colours that stay apart.
PALETTE = np.array(
    [
        *((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)),
        *((140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207)),
    ],
    dtype=np.float64,
)


def draw(places: np.ndarray, edges: Sequence[tuple[int, int]], colours: np.ndarray, *, size: int = 112) -> np.ndarray:
    """A picture (size, size, 3) uint8 of nodes at `places` (n, 2) in any unit, in colours (n, 3) of 0 to 255."""
    low, span = places.min(0), max(1e-9, float(np.ptp(places, axis=0).max()))
    radius = max(2.0, min(7.0, size / (4 * math.sqrt(len(places)))))
    margin = radius + 2
    centred = (places - low - np.ptp(places, axis=0) / 2) / span
    spots = centred * (size - 2 * margin) + size / 2
    y, x = np.mgrid[:size, :size] + 0.5
    canvas = np.full((size, size, 3), 255.0)
    for a, b in edges:
        start, way = spots[a], spots[b] - spots[a]
        along = np.clip(((x - start[0]) * way[0] + (y - start[1]) * way[1]) / max(1e-9, way @ way), 0, 1)
        far = np.hypot(x - start[0] - along * way[0], y - start[1] - along * way[1])
        canvas = _over(canvas, np.clip(1.2 - far, 0, 1), np.array([170.0, 170.0, 170.0]))
    for spot, colour in zip(spots, colours, strict=True):
        far = np.hypot(x - spot[0], y - spot[1])
        canvas = _over(canvas, np.clip(radius + 0.5 - far, 0, 1), colour)
    return canvas.round().astype(np.uint8)


def _over(canvas: np.ndarray, share: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return canvas * (1 - share[..., None]) + share[..., None] * colour


def draw_neighbourhood(node: int, edge_index: Tensor, labels: Tensor, classes: int, *, most: int = 16) -> np.ndarray:
    """A node in the middle, its first `most` neighbours around it, in the colours of their classes."""
    source, target = edge_index
    near = target[source == node][:most]
    ring = torch.arange(len(near)) * (2 * math.pi / max(1, len(near)))
    places = np.concatenate([np.zeros((1, 2)), torch.stack([ring.cos(), ring.sin()], 1).numpy()])
    nodes = torch.cat([torch.tensor([node]), near])
    position = {int(n): k for k, n in enumerate(nodes)}
    inside = torch.isin(source, nodes) & torch.isin(target, nodes) & (source < target)
    edges = [(position[int(a)], position[int(b)]) for a, b in edge_index[:, inside].t()]
    return draw(places, edges, PALETTE[labels[nodes].numpy() % len(PALETTE)])
