"""Rays, the occupancy grid that says where to look, marching, and compositing, in plain torch.

Samples lie on a grid of (rays, samples); those in empty cells are dropped before any field is asked. What is left is a
flat list of M points with their places on the grid, which any number of fields can be evaluated on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_nerf.engine.fields import RadianceField


class Rays(NamedTuple):
    """origins and directions (R, 3), directions of unit length; near and far (R,) where the scene does not say it."""

    origins: Tensor
    directions: Tensor
    near: Tensor
    far: Tensor


class RayPoints(NamedTuple):
    """M points on R rays of K samples each.

    positions, directions (M, 3); place (M,) int64, ray * K + sample; lengths and middles (R, K), of the samples along
    their rays.
    """

    positions: Tensor
    directions: Tensor
    place: Tensor
    lengths: Tensor
    middles: Tensor


class Rendered(NamedTuple):
    """colour (R, 3), opacity (R,) in [0, 1], depth (R,), the mean distance of what is seen."""

    colour: Tensor
    opacity: Tensor
    depth: Tensor


class OccupancyGrid(nn.Module):
    """Which of `resolution`^3 cells of a field's cube hold density, a decaying maximum as in Instant NGP.

    A cell is kept while its density is above min(mean density, threshold). All cells are kept at first.
    """

    density: Tensor
    occupied: Tensor

    def __init__(self, resolution: int = 128, threshold: float = 10.0, decay: float = 0.95, every: int = 16):
        super().__init__()
        self.resolution, self.threshold, self.decay, self.every = resolution, threshold, decay, every
        self.register_buffer("density", torch.zeros(resolution**3))
        self.register_buffer("occupied", torch.ones(resolution**3, dtype=torch.bool))

    def forward(self, unit: Tensor) -> Tensor:
        """Coordinates (M, 3) in [0, 1]^3 -> whether their cell is kept (M,)."""
        cell = (unit * self.resolution).long().clamp_(0, self.resolution - 1)
        return self.occupied[(cell[:, 0] * self.resolution + cell[:, 1]) * self.resolution + cell[:, 2]]

    @torch.no_grad()
    def update(self, densities: Callable[[Tensor], Tensor], *, warm: bool = True, chunk: int = 2**18) -> None:
        """Looks at one random point of each cell: of all of them while `warm`, then of a quarter of all cells and as
        many of the kept ones. `densities` gives (M,) for coordinates (M, 3) in the unit cube."""
        cells = self.chosen(warm)
        side = self.resolution
        low = torch.stack([cells // side**2, cells // side % side, cells % side], dim=1)
        unit = (low + torch.rand(low.shape, device=low.device)) / side
        found = torch.cat([densities(part) for part in unit.split(chunk)]).to(self.density)
        self.density *= self.decay
        self.density[cells] = torch.maximum(self.density[cells], found)

    def settle(self) -> None:
        """Decides anew which cells are kept; never none of them."""
        limit = self.density.mean().clamp_max(self.threshold)
        kept = self.density > limit
        self.occupied.copy_(kept if bool(kept.any()) else torch.ones_like(kept))

    def chosen(self, warm: bool) -> Tensor:
        count = self.resolution**3
        device = self.density.device
        if warm:
            return torch.arange(count, device=device)
        kept = self.occupied.nonzero()[:, 0]
        uniform = torch.randint(count, (count // 4,), device=device)
        return torch.cat([uniform, kept[torch.randint(len(kept), (count // 4,), device=device)]])

    @torch.no_grad()
    def fill(self, densities: Callable[[Tensor], Tensor], looks: int = 4) -> None:
        """From a finished field: the largest of `looks` densities of each cell."""
        self.density.zero_()
        decay, self.decay = self.decay, 1.0
        for _ in range(looks):
            self.update(densities)
        self.decay = decay
        self.settle()

    def empty_points(self, count: int) -> Tensor:
        """`count` random points (M, 3) of the unit cube in cells that are not kept; none where all are."""
        empty = (~self.occupied).nonzero()[:, 0]
        if len(empty) == 0:
            return self.density.new_zeros(0, 3)
        cells, side = empty[torch.randint(len(empty), (count,), device=empty.device)], self.resolution
        low = torch.stack([cells // side**2, cells // side % side, cells % side], dim=1)
        return (low + torch.rand(low.shape, device=low.device)) / side

    @property
    def cells(self) -> Tensor:
        """`occupied` as (G, G, G)."""
        return self.occupied.view((self.resolution,) * 3)


def box_limits(origins: Tensor, directions: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays (R, 3) enter and leave a box (2, 3): near, far (R,), equal where a ray misses it."""
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    first, second = (box[0] - origins) / safe, (box[1] - origins) / safe
    near = torch.minimum(first, second).amax(-1).clamp_min(0)
    far = torch.maximum(first, second).amin(-1)
    return near, torch.maximum(far, near)


def march(rays: Rays, field: RadianceField, occupancy: OccupancyGrid, samples: int, *, jitter: bool) -> RayPoints:
    """K = `samples` samples per ray, spread over where the ray is in the box; those in empty cells are left out.

    With a contraction there is no box: half of the samples are spread evenly over the unit of length, the others
    evenly in inverse distance up to `far`. With `jitter` each ray's samples move by one random part of a step.
    """
    origins, directions, near, far = rays
    edges = torch.arange(samples + 1, dtype=origins.dtype, device=origins.device) / samples
    edges = edges.expand(len(origins), -1)
    if jitter:
        edges = (edges + (torch.rand_like(edges[:, :1]) - 0.5) / samples).clamp(0, 1)
    if field.config.contraction:
        near, far = _warp(near), _warp(far)
    else:
        enter, leave = box_limits(origins, directions, field.box.to(origins))
        near = torch.maximum(near, enter)
        far = torch.maximum(torch.minimum(far, leave), near)
    steps = near[:, None] + (far - near)[:, None] * edges
    if field.config.contraction:
        steps = _unwarp(steps)
    lengths, middles = steps.diff(dim=1), (steps[:, 1:] + steps[:, :-1]) / 2
    positions = (origins[:, None] + directions[:, None] * middles[..., None]).view(-1, 3)
    unit, inside = field.unit(positions)
    kept = (occupancy(unit) & inside & (lengths.reshape(-1) > 0)).nonzero()[:, 0]
    if len(kept) == 0:  # fields need not know what to do with no point
        kept = kept.new_zeros(1)
    return RayPoints(positions[kept], directions[kept // samples], kept, lengths, middles)


def _warp(distance: Tensor) -> Tensor:
    return torch.where(distance < 1, distance / 2, 1 - 1 / (2 * distance))


def _unwarp(value: Tensor) -> Tensor:
    return torch.where(value < 0.5, 2 * value, 1 / (2 - 2 * value))


def composite(density: Tensor, colour: Tensor, points: RayPoints, background: float = 1.0) -> Rendered:
    """The volume rendering sum (E4): C = sum_k T_k (1 - exp(-sigma_k delta_k)) c_k + (1 - sum of weights) background.

    density (M,), colour (M, 3). T_k = exp(-sum_{j<k} sigma_j delta_j).
    """
    rays, samples = points.lengths.shape
    absorbed = density.new_zeros(rays * samples).index_put((points.place,), density).view(rays, samples)
    absorbed = absorbed * points.lengths.to(density)
    before = absorbed.cumsum(1) - absorbed
    weights = torch.exp(-before) * -torch.expm1(-absorbed)
    opacity = weights.sum(1)
    own = weights.reshape(-1)[points.place]
    seen = colour.new_zeros(rays, 3).index_add(0, points.place // samples, own[:, None] * colour)
    depth = (weights * points.middles.to(weights)).sum(1) / opacity.clamp_min(1e-6)
    return Rendered(seen + (1 - opacity)[:, None] * background, opacity, depth)


# ---------------------------------------------------------------- nerfacc


def nerfacc_march(
    rays: Rays, field: RadianceField, occupancy: OccupancyGrid, samples: int, *, jitter: bool
) -> RayPoints:
    """`march` on nerfacc's CUDA kernels: only occupied cells are visited, in steps of the box's diagonal / samples."""
    import nerfacc

    box = field.box.reshape(-1)
    estimator = nerfacc.OccGridEstimator(roi_aabb=box, resolution=occupancy.resolution, levels=1).to(box.device)
    estimator.binaries = occupancy.cells[None]
    step = float((field.box[1] - field.box[0]).norm()) / samples
    ray, start, end = estimator.sampling(
        rays.origins, rays.directions, t_min=rays.near, t_max=rays.far, render_step_size=step, stratified=jitter
    )
    return padded(rays, ray, start, end)


def padded(rays: Rays, ray: Tensor, start: Tensor, end: Tensor) -> RayPoints:
    """Packed samples (ray index ascending, start and end of each, all (M,)) on a grid of rays and samples."""
    count = torch.bincount(ray, minlength=len(rays.origins))
    first = count.cumsum(0) - count
    sample = torch.arange(len(ray), device=ray.device) - first[ray]
    width = max(1, int(count.max()) if len(ray) else 1)
    place = ray * width + sample
    grid = start.new_zeros(len(rays.origins) * width)
    lengths = grid.index_put((place,), end - start).view(-1, width)
    middles = grid.index_put((place,), (start + end) / 2).view(-1, width)
    if len(ray) == 0:
        place = place.new_zeros(1)
    ray = place // width
    positions = rays.origins[ray] + rays.directions[ray] * middles.reshape(-1)[place][:, None]
    return RayPoints(positions, rays.directions[ray], place, lengths, middles)


def marcher(device: torch.device, contraction: bool) -> Callable[..., RayPoints]:
    """nerfacc's kernels where they are usable (a GPU, nerfacc with its extension, a box), else `march`."""
    if device.type != "cuda" or contraction:
        return march
    try:
        from nerfacc.cuda import is_cub_available

        is_cub_available()
    except (ImportError, AttributeError, RuntimeError, TypeError):
        return march
    return nerfacc_march
