"""Radiance fields of six architectures behind one interface, in plain torch, and nerfstudio's own one.

    field(positions, directions) -> Points(features, logit, colour)

`logit` is the density before the exponential, `features` the vector that the architectures have in common: the logit
followed by the geometry channels, from which the colour net and the direction make the colour. Dense and sparse grids
store density and spherical harmonics and have no such vector.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_nerf.engine.encodings import (
    DenseGrid,
    HashGrid,
    Lines,
    PlaneLines,
    SparseGrid,
    contract,
    expand,
    frequency_encoding,
    spherical_harmonics,
)
from kdcore.config import Config
from kdcore.errors import InputError

Architecture = Literal["hash", "mlp", "vm", "cp", "dense", "sparse", "nerfacto"]
GRIDS = ("dense", "sparse")
EMPTY = -10.0
"""Logit of empty space: of what a sparse grid does not store, and of what a grid leaves out of a gridless field."""


class FieldConfig(Config):
    """The defaults are the paper's: a hash grid, 8x256 MLP, VM of resolution 300, grid of 128^3."""

    architecture: Architecture = Field("hash", description="what stores the scene; nerfacto: nerfstudio's field")
    levels: int = Field(14, ge=1, description="hash, nerfacto: resolution levels")
    features_per_level: int = Field(2, ge=1, description="hash, nerfacto: entries per level and vertex")
    log2_size: int = Field(19, ge=4, le=28, description="hash, nerfacto: log2 of a level's table size")
    base_resolution: int = Field(16, ge=2, description="hash, nerfacto: vertices per axis of the coarsest level")
    finest_resolution: int = Field(2048, ge=2, description="hash, nerfacto: vertices per axis of the finest level")
    implementation: Literal["auto", "torch", "tcnn"] = Field(
        "auto", description="hash: who encodes; auto: tinycudann where it and a GPU are there, decided once"
    )
    frequencies: int = Field(10, ge=1, description="mlp: frequencies of the positional encoding")
    layers: int = Field(8, ge=2, description="mlp: linear layers")
    width: int = Field(256, ge=1, description="mlp: width")
    skip: int = Field(3, ge=-1, description="mlp: layer (from 0) after which the input is concatenated; -1: nowhere")
    encoding_width: int = Field(28, ge=1, description="mlp: outputs, which the density net reads; the hash grid's 28")
    density_rank: int = Field(16, ge=1, description="vm, cp: components of the density, per plane for vm")
    colour_rank: int = Field(48, ge=1, description="vm, cp: components of the colour features, per plane for vm")
    resolution: int | None = Field(None, ge=2, description="vm, cp, dense, sparse: vertices per axis (300; grids 128)")
    sh_levels: int = Field(3, ge=1, le=4, description="dense, sparse: levels of the colour's spherical harmonics")
    hidden: int = Field(64, ge=1, description="hash, mlp, nerfacto: width of the density net")
    geometry: int = Field(15, ge=1, description="geometry channels beside the logit in the common features")
    colour_width: int = Field(64, ge=1, description="width of the colour net")
    clip: tuple[float, float] | None = Field((-2.0, 7.0), description="range of the density logit; null: not clipped")
    contraction: bool = Field(False, description="contract unbounded space into the box instead of cutting it")

    def model_post_init(self, context: Any) -> None:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise InputError(f"clip = {list(self.clip)}: the first number must be below the second")
        if self.finest_resolution < self.base_resolution:
            raise InputError(f"finest_resolution = {self.finest_resolution}: below base_resolution")

    @property
    def vertices(self) -> int:
        return self.resolution or (128 if self.architecture in GRIDS else 300)


class Points(NamedTuple):
    """features (M, F) or None; logit (M,), clipped; colour (M, 3) in [0, 1], or None where it was not asked for."""

    features: Tensor | None
    logit: Tensor
    colour: Tensor | None


class _TruncatedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return gradient * x.clamp(-12, 12).exp()


def density_of(logit: Tensor) -> Tensor:
    """sigma = exp(logit), with the exponential's gradient taken at clamp(logit, -12, 12) (E1)."""
    return _TruncatedExp.apply(logit)


def network(sizes: list[int]) -> nn.Sequential:
    """Linear layers without bias and ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class RadianceField(nn.Module):
    """Base of the fields. `shared` names the nets whose meaning does not depend on what stores the scene.

    `box` is (2, 3), the corners of the space in world units. The state dict tells the architecture, so a checkpoint
    alone is enough to build the field again.
    """

    shared: tuple[str, ...] = ()
    feature_dim: int | None = None
    gridless = False  # whether it ships without an occupancy grid
    box: Tensor

    def __init__(self, config: FieldConfig, box: Tensor):
        super().__init__()
        self.config = config
        self.register_buffer("box", box.clone().float())

    def unit(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """World positions (M, 3) -> coordinates in [0, 1]^3 and whether they are inside."""
        if self.config.contraction:
            centre, half = self.box.mean(0), (self.box[1] - self.box[0]) / 2
            return (contract((positions - centre) / half) + 2) / 4, torch.ones_like(positions[:, 0], dtype=torch.bool)
        unit = (positions - self.box[0]) / (self.box[1] - self.box[0])
        return unit.clamp(0, 1), ((unit >= 0) & (unit <= 1)).all(-1)

    def world(self, unit: Tensor) -> Tensor:
        """The inverse of `unit`: coordinates in [0, 1]^3 (M, 3) -> world positions."""
        if not self.config.contraction:
            return self.box[0] + unit * (self.box[1] - self.box[0])
        return self.box.mean(0) + expand(4 * unit - 2) * (self.box[1] - self.box[0]) / 2

    def clipped(self, logit: Tensor) -> Tensor:
        return logit if self.config.clip is None else logit.clamp(*self.config.clip)

    def stored(self, unit: Tensor) -> Tensor:
        """Coordinates (M, 3) -> what the scene stores there (M, C), the raw density logit first."""
        raise NotImplementedError

    def common(self, stored: Tensor) -> Tensor | None:
        """The features that architectures share, from `stored`; only the logit is clipped (E1)."""
        return torch.cat([self.clipped(stored[:, :1]), stored[:, 1:]], dim=1)

    def colour(self, stored: Tensor, directions: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, positions: Tensor, directions: Tensor, *, colour: bool = True) -> Points:
        unit, _ = self.unit(positions)
        stored = self.stored(unit)
        features = self.common(stored)
        logit = self.clipped(stored[:, 0]) if features is None else features[:, 0]
        shown = self.colour(stored if features is None else features, directions) if colour else None
        return Points(features, logit, shown)

    def density(self, positions: Tensor) -> Tensor:
        """(M, 3) -> (M,), zero outside the box."""
        unit, inside = self.unit(positions)
        return density_of(self.clipped(self.stored(unit)[:, 0])) * inside

    def encoding_parameters(self) -> list[nn.Parameter]:
        """What stores the scene, as opposed to the nets that read it: they learn at different rates."""
        return []

    def regularised(self) -> list[Tensor]:
        """The density factors that (E5) keeps small; empty where it does not apply."""
        return []

    # The config travels with the weights, as bytes of JSON: a tensor, which loads without pickle.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(self.config.model_dump_json().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        saved = config_from_state(state)
        if saved.architecture != self.config.architecture:
            raise InputError(f"checkpoint: of a {saved.architecture} field, loaded into a {self.config.architecture}")


def config_from_state(state: Tensor) -> FieldConfig:
    """The config that a field's state dict holds as `_extra_state`. Raises InputError where it is none."""
    try:
        return FieldConfig.model_validate(json.loads(bytes(state.tolist())))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"checkpoint: its field has no readable config ({error})") from None


class _WithColourNet(RadianceField):
    """Geometry channels and the direction's harmonics (16) -> colour_width twice -> RGB."""

    shared = ("colour_net",)

    def __init__(self, config: FieldConfig, box: Tensor):
        super().__init__(config, box)
        self.feature_dim = 1 + config.geometry
        self.colour_net = network([16 + config.geometry, config.colour_width, config.colour_width, 3])

    def colour(self, stored: Tensor, directions: Tensor) -> Tensor:
        basis = spherical_harmonics(directions, 4)
        return torch.sigmoid(self.colour_net(torch.cat([basis, stored[:, 1:]], dim=1)))


class _WithDensityNet(_WithColourNet):
    """An encoding -> hidden -> logit and geometry channels."""

    shared = ("density_net", "colour_net")

    def __init__(self, config: FieldConfig, box: Tensor, width: int):
        super().__init__(config, box)
        self.density_net = network([width, config.hidden, 1 + config.geometry])


class HashField(_WithDensityNet):
    def __init__(self, config: FieldConfig, box: Tensor):
        config = config.model_copy(update={"implementation": resolve_implementation(config.implementation)})
        super().__init__(config, box, config.levels * config.features_per_level)
        sizes = (config.levels, config.features_per_level, config.log2_size)
        make = tcnn_grid if config.implementation == "tcnn" else HashGrid
        self.encoding = make(*sizes, config.base_resolution, config.finest_resolution)

    def stored(self, unit: Tensor) -> Tensor:
        return self.density_net(self.encoding(unit).to(self.density_net[0].weight))

    def encoding_parameters(self) -> list[nn.Parameter]:
        return list(self.encoding.parameters())


class MLPField(_WithDensityNet):
    """NeRF's MLP in place of an encoding: `layers` linear layers, ReLU after all but the last."""

    def __init__(self, config: FieldConfig, box: Tensor):
        super().__init__(config, box, config.encoding_width)
        inputs, width = 3 + 6 * config.frequencies, config.width
        sizes = [inputs] + [width] * (config.layers - 1) + [config.encoding_width]
        self.mlp = nn.ModuleList(
            nn.Linear(before + inputs * (layer > 0 and layer == config.skip + 1), after)
            for layer, (before, after) in enumerate(pairwise(sizes))
        )

    def stored(self, unit: Tensor) -> Tensor:
        inputs = x = frequency_encoding(unit, self.config.frequencies)
        for index, layer in enumerate(self.mlp):
            x = layer(x)
            if index < len(self.mlp) - 1:
                x = x.relu()
                if index == self.config.skip:
                    x = torch.cat([inputs, x], dim=1)
        return self.density_net(x)


class _Factorised(_WithColourNet):
    """A logit that is a sum of products, and colour components through one linear map to the geometry channels."""

    def __init__(self, config: FieldConfig, box: Tensor, density: nn.Module, colour: nn.Module, width: int):
        super().__init__(config, box)
        self.density_factors, self.colour_factors = density, colour
        self.basis = nn.Linear(width, config.geometry, bias=False)

    def stored(self, unit: Tensor) -> Tensor:
        logit = self.density_factors(unit).sum(1, keepdim=True)
        return torch.cat([logit, self.basis(self.colour_factors(unit))], dim=1)

    def common(self, stored: Tensor) -> Tensor:
        return self.clipped(stored)  # the release clips all channels here

    def encoding_parameters(self) -> list[nn.Parameter]:
        return [*self.density_factors.parameters(), *self.colour_factors.parameters()]

    def regularised(self) -> list[Tensor]:
        return [part for factors in self.density_factors.parameters() for part in factors.unbind(0)]


class VMField(_Factorised):
    def __init__(self, config: FieldConfig, box: Tensor):
        side = config.vertices
        density, colour = PlaneLines(config.density_rank, side), PlaneLines(config.colour_rank, side)
        super().__init__(config, box, density, colour, 3 * config.colour_rank)


class CPField(_Factorised):
    def __init__(self, config: FieldConfig, box: Tensor):
        side = config.vertices
        super().__init__(
            config, box, Lines(config.density_rank, side), Lines(config.colour_rank, side), config.colour_rank
        )


class GridField(RadianceField):
    """Logit and spherical harmonics of the colour at every vertex: no common features, no net."""

    grid: DenseGrid | SparseGrid

    def __init__(self, config: FieldConfig, box: Tensor):
        super().__init__(config, box)
        channels = 1 + 3 * config.sh_levels**2
        make = DenseGrid if config.architecture == "dense" else SparseGrid
        self.grid = make(channels, config.vertices)

    def stored(self, unit: Tensor) -> Tensor:
        return self.grid(unit)

    def common(self, stored: Tensor) -> None:
        return None

    def colour(self, stored: Tensor, directions: Tensor) -> Tensor:
        basis = spherical_harmonics(directions, self.config.sh_levels)[:, None]
        return torch.sigmoid((stored[:, 1:].unflatten(1, (3, -1)) * basis).sum(-1))

    def encoding_parameters(self) -> list[nn.Parameter]:
        return list(self.grid.parameters())


FIELDS: dict[str, type[RadianceField]] = {
    "hash": HashField,
    "mlp": MLPField,
    "vm": VMField,
    "cp": CPField,
    "dense": GridField,
    "sparse": GridField,
}


def make_field(config: FieldConfig, box: Tensor) -> RadianceField:
    """A freshly initialised field over `box`, a (2, 3) tensor with the lower corner first (else InputError)."""
    if box.shape != (2, 3) or not bool((box[0] < box[1]).all()):
        raise InputError(f"box = {box.tolist()}: expected two corners (2, 3), the lower one first")
    if config.architecture == "nerfacto":
        from kd_nerf.engine.stock_fields import NerfactoRadiance

        return NerfactoRadiance(config, box)
    return FIELDS[config.architecture](config, box)


def inherit(student: RadianceField, teacher: nn.Module) -> list[str]:
    """Copies the nets that both have under one name with one shape, and returns their names.

    Only nets that read the common features are candidates: a table or a plane of equal shape means something else.
    """
    copied = []
    for name in set(student.shared) & set(getattr(teacher, "shared", ())):
        mine, other = getattr(student, name), getattr(teacher, name)
        shapes = [[tuple(p.shape) for p in net.parameters()] for net in (mine, other)]
        if shapes[0] == shapes[1]:
            mine.load_state_dict(other.state_dict())
            copied.append(name)
    return sorted(copied)


# ---------------------------------------------------------------- tinycudann


def resolve_implementation(wanted: str) -> Literal["torch", "tcnn"]:
    """`auto` is tinycudann where it is installed and there is a GPU. Raises InputError for `tcnn` without it."""
    usable = torch.cuda.is_available() and _has_tcnn()
    if wanted == "tcnn" and not usable:
        raise InputError("implementation = 'tcnn': needs tinycudann and a GPU; allowed here: 'auto', 'torch'")
    return "tcnn" if usable and wanted != "torch" else "torch"


def _has_tcnn() -> bool:
    from importlib.util import find_spec

    return find_spec("tinycudann") is not None


def tcnn_grid(levels: int, features: int, log2_size: int, base: int, finest: int) -> nn.Module:
    """The same encoding by nerfstudio's tinycudann wrapper; its table is laid out differently from `HashGrid`'s."""
    from nerfstudio.field_components.encodings import HashEncoding

    return HashEncoding(
        num_levels=levels,
        min_res=base,
        max_res=finest,
        log2_hashmap_size=log2_size,
        features_per_level=features,
        implementation="tcnn",
    )
