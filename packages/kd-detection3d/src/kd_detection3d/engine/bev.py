"""Bird's-eye-view (BEV) maps and boxes on them: where a box lies in a map, features there, masks around centres.

A map (B, C, H, W) covers an area [x0, x1] x [y0, y1] in metres; rows follow y and columns follow x, as in mmdet3d. The
size of a cell follows from the map, so two maps of different resolution are read at the same places.
Boxes are (N, 5): centre x, y, length dx along the heading, width dy, heading counter-clockwise from x in radians.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Area(NamedTuple):
    """What a map covers, in metres."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def of_range(cls, limits: Sequence[float]) -> Area:
        """From mmdet3d's `point_cloud_range`, (x0, y0, z0, x1, y1, z1)."""
        return cls(limits[0], limits[1], limits[3], limits[4])

    def cell(self, height: int, width: int) -> tuple[float, float]:
        """Size of a cell along x and y of a map of H rows and W columns."""
        return (self.x1 - self.x0) / width, (self.y1 - self.y0) / height


# (corner signs) in the order 1, 2, 3, 4; then the centre; then the middles of edges 12, 23, 34 and 41.
_CORNERS = ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5))
_KEY = (*_CORNERS, (0.0, 0.0), (-0.5, 0.0), (0.0, 0.5), (0.5, 0.0), (0.0, -0.5))


def key_points(boxes: Tensor) -> Tensor:
    """Corners, centre and edge middles of boxes: (N, 5) -> (N, 9, 2) as x, y (UniDistill, section 3.3)."""
    local = boxes[:, None, 2:4] * boxes.new_tensor(_KEY)  # (N, 9, 2)
    cos, sin = boxes[:, None, 4].cos(), boxes[:, None, 4].sin()
    x, y = local.unbind(-1)
    return boxes[:, None, :2] + torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


def sample(maps: Tensor, points: Sequence[Tensor], area: Area, *, swapped: bool = False) -> Tensor:
    """Features at points, bilinear, zero outside the map.

    maps (B, C, H, W); points: for each frame (N_b, P, 2) as x, y in metres -> (sum of N_b, P, C). The centre of cell
    (row 0, column 0) is at (x0 + cell/2, y0 + cell/2). `swapped` reads the transposed place, (y, x) for (x, y).
    """
    counts = [len(item) for item in points]
    padded = pad_sequence(list(points), batch_first=True)  # (B, max N, P, 2)
    start = padded.new_tensor([area.x0, area.y0])
    size = padded.new_tensor([area.x1 - area.x0, area.y1 - area.y0])
    grid = 2 * (padded - start) / size - 1
    if swapped:
        grid = grid.flip(-1)
    if not sum(counts):
        return maps.sum() * 0 + maps.new_zeros(0, padded.shape[2], maps.shape[1])
    found = F.grid_sample(maps, grid.to(maps.dtype), padding_mode="zeros", align_corners=False)
    kept = torch.arange(padded.shape[1], device=maps.device) < torch.tensor(counts, device=maps.device)[:, None]
    return found.permute(0, 2, 3, 1)[kept]


def gaussian_radius(size: Tensor, overlap: float = 0.7) -> Tensor:
    """Radius in cells of boxes of (N, 2) cells, as CenterNet-type heads compute it: the least of three roots, (N,).

    The denominators are those of the released code of CornerNet, which the field has kept.
    """
    total, product = size.sum(-1), size.prod(-1)
    first = (total + (total**2 - 4 * product * (1 - overlap) / (1 + overlap)).sqrt()) / 2
    second = (2 * total + (4 * total**2 - 16 * (1 - overlap) * product).sqrt()) / 2
    b = -2 * overlap * total
    third = (b + (b**2 - 16 * overlap * (overlap - 1) * product).sqrt()) / 2
    return torch.stack([first, second, third]).amin(0)


def centre_mask(
    boxes: Sequence[Tensor], area: Area, height: int, width: int, *, overlap: float = 0.7, least: int = 0
) -> Tensor:
    """A Gaussian around each box's centre, combined by the maximum: for each frame (N_b, 5) -> (B, H, W) in [0, 1].

    exp(-d^2 / (2 s^2)), s = (2 r + 1) / 6, on the (2 r + 1)^2 cells around the centre's cell, r = max(least,
    floor(gaussian_radius)). A box whose centre is outside the map draws nothing.
    """
    return torch.stack([_frame_mask(item, area, height, width, overlap, least) for item in boxes])


def _frame_mask(boxes: Tensor, area: Area, height: int, width: int, overlap: float, least: int) -> Tensor:
    cell = boxes.new_tensor(area.cell(height, width))
    radius = gaussian_radius(boxes[:, 2:4] / cell, overlap).floor().clamp(min=least)[:, None, None]
    column, row = ((boxes[:, :2] - boxes.new_tensor([area.x0, area.y0])) / cell).floor()[..., None, None].unbind(1)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    dx = torch.arange(width, device=boxes.device) - column  # (N, 1, W)
    dy = torch.arange(height, device=boxes.device)[:, None] - row  # (N, H, 1)
    window = inside & (dx.abs() <= radius) & (dy.abs() <= radius)
    drawn = torch.exp(-(dx**2 + dy**2) / (2 * ((2 * radius + 1) / 6) ** 2)) * window
    return drawn.amax(0) if len(boxes) else boxes.new_zeros(height, width)


def background(boxes: Sequence[Tensor], area: Area, height: int, width: int) -> Tensor:
    """Cells that no box comes near: further from every centre than half its diagonal and a cell, (B, H, W) bool."""
    cell = area.cell(height, width)
    columns = area.x0 + (torch.arange(width) + 0.5) * cell[0]
    rows = area.y0 + (torch.arange(height) + 0.5) * cell[1]
    places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (H, W, 2) as x, y
    found = []
    for item in boxes:
        distance = (places.to(item)[None] - item[:, None, None, :2]).norm(dim=-1)  # (N, H, W)
        reach = item[:, 2:4].norm(dim=-1) / 2 + max(cell)
        found.append((distance > reach[:, None, None]).all(0))
    return torch.stack(found)
