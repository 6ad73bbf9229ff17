"""Operators of point clouds and rotated boxes in torch alone, for machines without mmcv's compiled ones.

They give what mmcv's give and write into the same buffers; they are meant for CPUs and small scenes. Boxes on the
ground are (N, 5): x, y, w, h, angle, the angle turning x towards y.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096  # pairs of boxes at a time


# ---------------------------------------------------------------- rotated boxes


def corners(boxes: Tensor) -> Tensor:
    """(N, 5) -> (N, 4, 2), in order of turning from x towards y."""
    signs = boxes.new_tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    local = boxes[:, None, 2:4] * signs
    cos, sin = boxes[:, None, 4].cos(), boxes[:, None, 4].sin()
    x, y = local.unbind(-1)
    return boxes[:, None, :2] + torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _within(points: Tensor, polygon: Tensor) -> Tensor:
    """Whether points (P, K, 2) lie in convex polygons (P, 4, 2) whose corners turn from x towards y."""
    edges = polygon.roll(-1, 1) - polygon
    side = _cross(edges[:, None], points[:, :, None] - polygon[:, None])
    return (side >= -1e-9).all(-1)


def intersection(first: Tensor, second: Tensor) -> Tensor:
    """Area that boxes (P, 5) and (P, 5) share pairwise, (P,), float64."""
    # Moved to the origin: far from it the areas of small boxes would lose digits.
    shift = torch.cat([first[:, :2], first.new_zeros(len(first), 3)], dim=1)
    a, b = corners((first - shift).double()), corners((second - shift).double())
    da, db = (a.roll(-1, 1) - a)[:, :, None], (b.roll(-1, 1) - b)[:, None]  # (P, 4, 1, 2), (P, 1, 4, 2)
    between = b[:, None] - a[:, :, None]
    denominator = _cross(da, db)
    parallel = denominator.abs() < 1e-12
    safe = denominator.masked_fill(parallel, 1.0)
    t, u = _cross(between, db) / safe, _cross(between, da) / safe
    crosses = ~parallel & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    points = torch.cat([(a[:, :, None] + t[..., None] * da).flatten(1, 2), a, b], dim=1)  # (P, 24, 2)
    kept = torch.cat([crosses.flatten(1), _within(a, b), _within(b, a)], dim=1)
    count = kept.sum(1)
    centre = (points * kept[..., None]).sum(1) / count.clamp(min=1)[:, None]
    ring = points - centre[:, None]
    angle = torch.atan2(ring[..., 1], ring[..., 0]).masked_fill(~kept, torch.inf)
    order = angle.argsort(1)
    ring = ring.gather(1, order[..., None].expand_as(ring))
    # Places beyond the last kept point repeat the first one: they add no area.
    filled = torch.arange(ring.shape[1], device=ring.device) < count[:, None]
    ring = torch.where(filled[..., None], ring, ring[:, :1])
    area = _cross(ring, ring.roll(-1, 1)).sum(1).abs() / 2
    return area.masked_fill(count < 3, 0.0)


def pairwise_intersection(first: Tensor, second: Tensor) -> Tensor:
    """(N, 5), (M, 5) -> (N, M)."""
    rows = max(1, CHUNK // max(1, len(second)))
    found = [
        intersection(part.repeat_interleave(len(second), 0), second.repeat(len(part), 1)).view(len(part), len(second))
        for part in first.split(rows)
        if len(part)
    ]
    return torch.cat(found) if found else first.new_zeros(0, len(second), dtype=torch.float64)


def rotated_iou(first: Tensor, second: Tensor, *, over: str = "union", aligned: bool = False) -> Tensor:
    """Intersection of boxes (N, 5) and (M, 5) over the union, or over the first's, or the second's area; (N, M)."""
    shared = intersection(first, second) if aligned else pairwise_intersection(first, second)
    own, other = (boxes[:, 2].double() * boxes[:, 3].double() for boxes in (first, second))
    if not aligned:
        own, other = own[:, None], other[None]
    area = {"union": own + other - shared, "first": own + 0 * shared, "second": other + 0 * shared}[over]
    return shared / area.clamp(min=1e-14)


def box_iou_rotated(first: Tensor, second: Tensor, ious: Tensor, *, mode_flag: int, aligned: bool) -> None:
    """mmcv's operator; mode_flag 0: over the union, 1: over the first box."""
    found = rotated_iou(first, second, over=("union", "first")[mode_flag], aligned=aligned)
    ious.copy_(found.reshape(ious.shape))


def nms_rotated(
    boxes: Tensor, scores: Tensor, order: Tensor, ranked: Tensor, labels: Tensor, threshold: float, by_label: bool
) -> Tensor:
    """mmcv's operator: indices of the boxes that no better one covers by `threshold`, best first."""
    covers = rotated_iou(ranked[:, :5], ranked[:, :5]) >= threshold
    if by_label:
        covers &= ranked[:, None, 5] == ranked[None, :, 5]
    covers = covers.cpu()
    suppressed, kept = torch.zeros(len(ranked), dtype=torch.bool), []
    for place in range(len(ranked)):
        if not suppressed[place]:
            kept.append(place)
            suppressed |= covers[place]
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]


# ---------------------------------------------------------------- points


def cells(points: Tensor, size: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Cell of each point as (z, y, x), int64, and whether it is inside the range; (P, 3), (P,)."""
    size, limits = size.to(points), limits.to(points)
    shape = ((limits[3:] - limits[:3]) / size).round().long()
    found = ((points[:, :3] - limits[:3]) / size).floor().long()
    return found.flip(1), ((found >= 0) & (found < shape)).all(1)


def dynamic_voxelize(points: Tensor, size: Tensor, limits: Tensor, coors: Tensor, NDim: int = 3) -> None:
    """mmcv's operator: the cell of each point, -1 outside."""
    found, inside = cells(points, size, limits)
    coors.copy_(found.masked_fill(~inside[:, None], -1))


def hard_voxelize(
    points: Tensor,
    size: Tensor,
    limits: Tensor,
    voxels: Tensor,
    coors: Tensor,
    counts: Tensor,
    number: Tensor,
    max_points: int,
    max_voxels: int,
    NDim: int = 3,
    deterministic: bool = True,
) -> None:
    """mmcv's operator: the first `max_points` points of the first `max_voxels` cells, in the order of the points."""
    found, inside = cells(points, size, limits)
    points, found = points[inside], found[inside]
    if not len(points):
        number.zero_()
        return
    shape = found.amax(0) + 1
    flat = (found[:, 0] * shape[1] + found[:, 1]) * shape[2] + found[:, 2]
    unique, which = torch.unique(flat, return_inverse=True)
    place = torch.arange(len(points), device=points.device)
    first = torch.full((len(unique),), len(points), device=points.device).scatter_reduce(0, which, place, "amin")
    rank = torch.empty_like(first)
    rank[first.argsort()] = torch.arange(len(unique), device=points.device)
    voxel = rank[which]  # in order of appearance
    order = voxel.argsort(stable=True)
    per_voxel = torch.bincount(voxel, minlength=len(unique))
    start = per_voxel.cumsum(0) - per_voxel
    slot = torch.empty_like(voxel)
    slot[order] = place - start[voxel[order]]
    kept = (voxel < max_voxels) & (slot < max_points)
    voxels[voxel[kept], slot[kept]] = points[kept]
    coors[voxel[kept]] = found[kept].to(coors.dtype)
    made = min(len(unique), max_voxels)
    counts[:made] = per_voxel[:made].clamp(max=max_points).to(counts.dtype)
    number.fill_(made)


def in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points (P, 3) lie in boxes (T, 7) x, y, z of the bottom's centre, dx, dy, dz, heading; (P, T)."""
    offset = points[:, None] - boxes[None, :, :3]
    cos, sin = boxes[:, 6].cos(), boxes[:, 6].sin()
    along = (offset[..., 0] * cos + offset[..., 1] * sin).abs() < boxes[:, 3] / 2
    across = (offset[..., 1] * cos - offset[..., 0] * sin).abs() < boxes[:, 4] / 2
    return along & across & (offset[..., 2] >= 0) & (offset[..., 2] <= boxes[:, 5])


def points_in_boxes_cpu(boxes: Tensor, points: Tensor, found: Tensor) -> None:
    """mmcv's operator for one frame: (T, 7), (P, 3) -> (T, P) of 0 and 1."""
    found.copy_(in_boxes(points, boxes).T)


def points_in_boxes_all(boxes: Tensor, points: Tensor, found: Tensor) -> None:
    """mmcv's operator: (B, T, 7), (B, P, 3) -> (B, P, T) of 0 and 1."""
    for frame in range(len(points)):
        found[frame].copy_(in_boxes(points[frame], boxes[frame]))


def points_in_boxes_part(boxes: Tensor, points: Tensor, found: Tensor) -> None:
    """mmcv's operator: (B, T, 7), (B, P, 3) -> (B, P), the first box of each point, -1 where it is in none."""
    for frame in range(len(points)):
        inside = in_boxes(points[frame], boxes[frame])
        found[frame].copy_(torch.where(inside.any(1), inside.int().argmax(1), -1))


OPERATORS = {
    "box_iou_rotated": box_iou_rotated,
    "nms_rotated": nms_rotated,
    "dynamic_voxelize_forward": dynamic_voxelize,
    "hard_voxelize_forward": hard_voxelize,
    "points_in_boxes_cpu_forward": points_in_boxes_cpu,
    "points_in_boxes_all_forward": points_in_boxes_all,
    "points_in_boxes_part_forward": points_in_boxes_part,
}
"""Name in `mmcv._ext` -> function."""
