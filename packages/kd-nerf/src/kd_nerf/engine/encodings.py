"""What a field knows about a position or a direction: frequencies, spherical harmonics, hash tables, planes and grids.

Positions are in the unit cube [0, 1]^3, directions are unit vectors. All modules give (M, width) for (M, 3) inputs,
run in any floating dtype on any device, and are differentiable in their parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRIMES = (1, 2_654_435_761, 805_459_861)  # of the spatial hash, Teschner et al. 2003
PLANES, LINES = ((0, 1), (0, 2), (1, 2)), (2, 1, 0)


def frequency_encoding(positions: Tensor, frequencies: int) -> Tensor:
    """[x, sin(2^k x), cos(2^k x)] for k < frequencies, with x = 2 p - 1 (NeRF, arXiv 2003.08934, eq. 4 without pi).

    (M, 3) -> (M, 3 + 6 frequencies).
    """
    x = 2 * positions - 1
    scaled = x[:, None] * (2.0 ** torch.arange(frequencies, dtype=x.dtype, device=x.device))[:, None]
    return torch.cat([x, scaled.sin().flatten(1), scaled.cos().flatten(1)], dim=1)


def spherical_harmonics(directions: Tensor, levels: int) -> Tensor:
    """Real spherical harmonics of the first 1 to 4 levels, orthonormal on the sphere: (M, 3) -> (M, levels^2)."""
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, 0.5 / math.sqrt(math.pi))]
    if levels > 1:
        c = math.sqrt(3 / (4 * math.pi))
        basis += [-c * y, c * z, -c * x]
    xx, yy, zz = x * x, y * y, z * z
    if levels > 2:
        c = 0.5 * math.sqrt(15 / math.pi)
        basis += [c * x * y, -c * y * z, 0.25 * math.sqrt(5 / math.pi) * (3 * zz - 1), -c * x * z, c / 2 * (xx - yy)]
    if levels > 3:
        a, b, c = math.sqrt(35 / (2 * math.pi)) / 4, math.sqrt(105 / math.pi), math.sqrt(21 / (2 * math.pi)) / 4
        basis += [-a * y * (3 * xx - yy), b / 2 * x * y * z, c * y * (1 - 5 * zz)]
        basis += [math.sqrt(7 / math.pi) / 4 * z * (5 * zz - 3), c * x * (1 - 5 * zz)]
        basis += [b / 4 * z * (xx - yy), -a * x * (xx - 3 * yy)]
    return torch.stack(basis, dim=-1)


class HashGrid(nn.Module):
    """Multiresolution hash encoding (Instant NGP, arXiv 2201.05989, eqs. 2-4): (M, 3) -> (M, levels * features).

    A level whose vertices fit into 2^log2_size entries is stored densely, without collisions.
    """

    resolutions: Tensor

    def __init__(self, levels: int, features: int, log2_size: int, base: int, finest: int):
        super().__init__()
        growth = math.exp(math.log(finest / base) / max(1, levels - 1))
        resolutions = [math.floor(base * growth**level + 1e-6) for level in range(levels)]
        sizes = [min(2**log2_size, (resolution + 1) ** 3) for resolution in resolutions]
        self.levels, self.width = levels, levels * features
        offsets = [sum(sizes[:level]) for level in range(levels)]
        self.register_buffer("resolutions", torch.tensor(resolutions), persistent=False)
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        self.register_buffer("primes", torch.tensor(PRIMES), persistent=False)
        corners = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
        self.register_buffer("corners", corners, persistent=False)
        self.table = nn.Parameter(torch.empty(sum(sizes), features).uniform_(-1e-4, 1e-4))

    def forward(self, positions: Tensor) -> Tensor:
        resolution = self.resolutions[:, None, None]
        scaled = positions.clamp(0, 1) * resolution  # (L, M, 3)
        low = torch.minimum(scaled.floor().long(), resolution - 1)
        part = (scaled - low)[:, :, None]  # (L, M, 1, 3)
        weights = torch.where(self.corners.bool(), part, 1 - part).prod(-1)
        index = self.index(low[:, :, None] + self.corners)
        flat = index.flatten(0, 1)
        values = F.embedding_bag(flat, self.table, per_sample_weights=weights.flatten(0, 1).to(self.table), mode="sum")
        return values.view(self.levels, len(positions), -1).transpose(0, 1).flatten(1)

    def index(self, vertices: Tensor) -> Tensor:
        """Rows of the table of integer vertices (L, M, 8, 3)."""
        side = (self.resolutions + 1)[:, None, None]
        x, y, z = vertices.unbind(-1)
        dense = (x * side + y) * side + z
        mixed = vertices * self.primes
        hashed = mixed[..., 0] ^ mixed[..., 1] ^ mixed[..., 2]
        size = self.sizes[:, None, None]
        return torch.where(size == side**3, dense, hashed % size) + self.offsets[:, None, None]


class PlaneLines(nn.Module):
    """Vector-matrix factors (TensoRF, arXiv 2203.09517, eq. 4): (M, 3) -> (M, 3 rank), one product each."""

    def __init__(self, rank: int, resolution: int, scale: float = 0.1):
        super().__init__()
        self.planes = nn.Parameter(scale * torch.randn(3, rank, resolution, resolution))
        self.lines = nn.Parameter(scale * torch.randn(3, rank, resolution, 1))

    def forward(self, positions: Tensor) -> Tensor:
        x = 2 * positions - 1
        planes = torch.stack([x[:, pair] for pair in PLANES])[:, :, None]  # (3, M, 1, 2)
        along = torch.stack([x[:, axis] for axis in LINES])
        lines = torch.stack([torch.zeros_like(along), along], dim=-1)[:, :, None]
        products = sample(self.planes, planes) * sample(self.lines, lines)
        return products.squeeze(-1).permute(2, 0, 1).flatten(1)


class Lines(nn.Module):
    """CP factors (TensoRF, arXiv 2203.09517, eq. 3): (M, 3) -> (M, rank), each a product of three lines."""

    def __init__(self, rank: int, resolution: int, scale: float = 0.2):
        super().__init__()
        self.lines = nn.Parameter(scale * torch.randn(3, rank, resolution, 1))

    def forward(self, positions: Tensor) -> Tensor:
        along = (2 * positions - 1).T
        lines = torch.stack([torch.zeros_like(along), along], dim=-1)[:, :, None]
        return sample(self.lines, lines).squeeze(-1).prod(0).T


class DenseGrid(nn.Module):
    """A trilinear grid of `resolution`^3 vertices: (M, 3) -> (M, channels)."""

    def __init__(self, channels: int, resolution: int, scale: float = 0.02):
        super().__init__()
        self.volume = nn.Parameter(scale * torch.randn(1, channels, resolution, resolution, resolution))

    def forward(self, positions: Tensor) -> Tensor:
        # grid_sample wants the coordinate of the last axis first
        grid = (2 * positions - 1).flip(-1)[None, None, None]
        return sample(self.volume, grid)[0, :, 0, 0].T


class SparseGrid(nn.Module):
    """A trilinear grid that stores a value only at the vertices around kept cells: (M, 3) -> (M, channels).

    Everywhere else it gives `empty` in channel 0 and zeros. It starts with all vertices; `keep` drops the others, and a
    state dict of another number of vertices loads.
    """

    index: Tensor
    corners: Tensor

    def __init__(self, channels: int, resolution: int, scale: float = 0.02, empty: float = -10.0):
        super().__init__()
        self.resolution, self.empty = resolution, empty
        self.register_buffer("index", torch.arange(resolution**3, dtype=torch.int32))
        corners = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
        self.register_buffer("corners", corners, persistent=False)
        self.values = nn.Parameter(scale * torch.randn(resolution**3, channels))

    def forward(self, positions: Tensor) -> Tensor:
        side = self.resolution
        scaled = positions.clamp(0, 1) * (side - 1)
        low = scaled.floor().long().clamp_max(side - 2)
        part = (scaled - low)[:, None]
        weights = torch.where(self.corners.bool(), part, 1 - part).prod(-1).to(self.values)
        row = self.index[flat_index(low[:, None] + self.corners, side)].long()
        known = row >= 0
        kept = weights * known
        values = F.embedding_bag(row.clamp_min(0), self.values, per_sample_weights=kept, mode="sum")
        missing = F.pad(self.empty * (weights - kept).sum(1, keepdim=True), (0, values.shape[1] - 1))
        return values + missing

    @torch.no_grad()
    def keep(self, cells: Tensor) -> None:
        """Keeps the vertices around the true entries of `cells`, a bool grid (G, G, G) over the same cube."""
        side = self.resolution
        sized = F.adaptive_max_pool3d(cells[None, None].float(), side)
        near = F.max_pool3d(sized, 3, stride=1, padding=1)[0, 0].flatten() > 0
        near &= self.index >= 0
        if not near.any():
            return
        rows = self.index[near].long()
        self.index.fill_(-1)
        self.index[near] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        self.values = nn.Parameter(self.values[rows])

    def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
        values = state_dict.get(f"{prefix}values")
        if values is not None and values.shape[1:] == self.values.shape[1:] and len(values) != len(self.values):
            self.values = nn.Parameter(self.values.new_empty(values.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def sample(values: Tensor, grid: Tensor) -> Tensor:
    """`grid_sample` with vertices on the borders, as the factorised fields have them."""
    return F.grid_sample(values, grid.to(values), align_corners=True, padding_mode="border")


def flat_index(vertices: Tensor, side: int) -> Tensor:
    return (vertices[..., 0] * side + vertices[..., 1]) * side + vertices[..., 2]


def contract(positions: Tensor) -> Tensor:
    """Space into the cube [-2, 2]^3 by nerfacto's L-infinity form of mip-NeRF 360's (arXiv 2111.12077, eq. 10)."""
    size = positions.abs().amax(-1, keepdim=True)
    outside = (2 - 1 / size.clamp_min(1)) * positions / size.clamp_min(1)
    return torch.where(size > 1, outside, positions)


def expand(contracted: Tensor) -> Tensor:
    """The inverse of `contract`; what lies on the cube's faces, infinitely far away, is put very far away."""
    size = contracted.abs().amax(-1, keepdim=True).clamp_max(2 - 1e-4)
    return torch.where(size > 1, contracted / (size * (2 - size)), contracted)
