"""Small pictures of graphs for the report, in numpy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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


def _by_features(x: Tensor) -> np.ndarray:
    """A colour for each node: that of its largest feature."""
    return PALETTE[x.argmax(1).numpy() % len(PALETTE)]


def draw_graph(graph: Any) -> np.ndarray:
    """A graph at its nodes' `pos`, or where its Laplacian's second and third eigenvectors put them."""
    n = graph.num_nodes
    if graph.get("pos") is not None:
        places = graph.pos.numpy() * np.array([1, -1])
    else:
        laplacian = np.zeros((n, n))
        source, target = graph.edge_index.numpy()
        laplacian[source, target] = -1
        laplacian = np.minimum(laplacian, laplacian.T)
        np.fill_diagonal(laplacian, -laplacian.sum(1))
        vectors = np.linalg.eigh(laplacian)[1]
        places = np.stack([vectors[:, min(1, n - 1)], vectors[:, min(2, n - 1)]], axis=1)
    return draw(places, [(int(a), int(b)) for a, b in graph.edge_index.t() if a < b], _by_features(graph.x))


def draw_distilled(graph: Any) -> np.ndarray:
    """Trees side by side: roots on top, a node above the middle of its children."""
    parent = dict(graph.edge_index.t().tolist())
    below: dict[int, list[int]] = {}
    for child, over in parent.items():
        below.setdefault(over, []).append(child)
    places = np.zeros((graph.num_nodes, 2))
    column = 0

    def place(node: int, depth: int) -> float:
        nonlocal column
        if node in below:
            x = float(np.mean([place(child, depth + 1) for child in below[node]]))
        else:
            x, column = float(column), column + 1
        places[node] = x, depth
        return x

    roots = [node for node in range(graph.num_nodes) if node not in parent]
    for root in roots:
        place(root, 0)
        column += 1
    wide = max(1.0, float(np.ptp(places[:, 0])))
    places[:, 1] *= wide / max(1.0, 2 * places[:, 1].max())
    return draw(places, list(parent.items()), _by_features(graph.x))
