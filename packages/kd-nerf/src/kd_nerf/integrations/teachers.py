"""Trained fields out of nerfstudio checkpoints, ours and stock ones, by their weights alone.

A checkpoint is read with `weights_only`: neither config.yml nor any pickled class is opened. Our fields carry their
config in the weights; the sizes of stock fields (nerfacto and instant-ngp, vanilla-nerf, tensorf) are read off their
tensors. What tensors do not say, such as a hash grid's base resolution, is assumed to be the stock default, but for
`contraction`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nerfstudio.cameras.rays import Frustums, RaySamples
from nerfstudio.field_components.encodings import NeRFEncoding, TensorCPEncoding, TensorVMEncoding
from nerfstudio.field_components.spatial_distortions import SceneContraction
from nerfstudio.fields.nerfacto_field import NerfactoField
from nerfstudio.fields.tensorf_field import TensoRFField
from nerfstudio.fields.vanilla_nerf_field import NeRFField
from torch import Tensor, nn

from kd_nerf.engine.fields import Points, RadianceField, config_from_state, make_field
from kd_nerf.engine.rendering import OccupancyGrid
from kdcore.errors import InputError

State = Mapping[str, Tensor]
FIELD = "field.radiance."


@dataclass
class Teacher:
    """A trained field, called as those of the engine are, and its occupancy grid where it has one."""

    field: nn.Module
    occupancy: OccupancyGrid | None


def find_checkpoint(path: Path, field: str = "teacher_checkpoint") -> Path:
    """The newest `step-*.ckpt` that `path` means: the file, a folder of them, or a nerfstudio run's folder."""
    path = Path(path)
    if path.is_file() and path.name == "config.yml":
        path = path.parent
    if path.is_file():
        return path
    found = sorted(path.glob("step-*.ckpt")) or sorted(path.glob("**/nerfstudio_models/step-*.ckpt"))
    if not found:
        what = "has no checkpoint (step-*.ckpt)" if path.is_dir() else "no such file or folder"
        raise InputError(f"{field} = '{path}': {what}; give a .ckpt file or the folder of a nerfstudio run")
    return found[-1]


def read_state(checkpoint: Path, field: str = "teacher_checkpoint") -> dict[str, Tensor]:
    """The model's part of a nerfstudio checkpoint, read without pickle. InputError where it is none."""
    # A stock schedule leaves numpy numbers beside the weights.
    numbers = [np._core.multiarray.scalar, np.dtype, np.dtypes.Float64DType]
    try:
        with torch.serialization.safe_globals(numbers):
            loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
        pipeline = loaded["pipeline"]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{field} = '{checkpoint}': not a nerfstudio checkpoint ({reason})") from None
    return {key.removeprefix("_model.").removeprefix("module."): value for key, value in pipeline.items()}


def load_teacher(path: Path, *, contraction: bool = True, name: str = "teacher_checkpoint") -> Teacher:
    """The field of a checkpoint. `contraction` says whether a nerfacto contracts space, which its weights do not tell.

    Raises:
        InputError: no checkpoint there, or one of a method whose field is not known.
    """
    checkpoint = find_checkpoint(path, name)
    state = read_state(checkpoint, name)
    if f"{FIELD}_extra_state" in state:
        return own(state)
    if "field.mlp_base.encoder.hash_table" in state or "field.mlp_base.model.0.hash_table" in state:
        return Teacher(NerfactoTeacher(state, contraction), None)
    if "field_fine.mlp_base.layers.0.weight" in state:
        return Teacher(VanillaTeacher(state), None)
    if "field.density_encoding.plane_coef" in state or "field.density_encoding.line_coef" in state:
        return Teacher(TensoRFTeacher(state), None)
    raise InputError(
        f"{name} = '{checkpoint}': its field is not known; allowed: checkpoints of kd-nerf, of nerfacto and "
        "instant-ngp (torch implementation), vanilla-nerf, tensorf (vm and cp)"
    )


def own(state: State) -> Teacher:
    field = own_field(state)
    cells = state["occupancy.occupied"]
    occupancy = OccupancyGrid(round(len(cells) ** (1 / 3)))
    occupancy.load_state_dict(part(state, "occupancy."))
    return Teacher(field, occupancy)


def own_field(state: State) -> RadianceField:
    """The engine's field in the weights of a `RadianceModel`."""
    weights = part(state, FIELD)
    field = make_field(config_from_state(weights["_extra_state"]), weights["box"])
    field.load_state_dict(weights)
    return field


def part(state: State, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


# ---------------------------------------------------------------- stock fields


def samples_at(positions: Tensor, directions: Tensor) -> RaySamples:
    """Points (M, 3) as samples (M, 1) of nerfstudio, each a ray of its own."""
    zero = torch.zeros_like(positions[:, None, :1])
    frustums = Frustums(positions[:, None], directions[:, None], zero, zero, torch.ones_like(zero))
    return RaySamples(frustums=frustums, camera_indices=torch.zeros_like(zero, dtype=torch.long))


class StockTeacher(nn.Module):
    """A stock field, called as the engine's are. Its logit is clipped to [-2, 7] as the student's."""

    feature_dim: int | None = None
    clip = (-2.0, 7.0)

    def clipped(self, logit: Tensor) -> Tensor:
        return logit.clamp(*self.clip) if self.clip else logit


class NerfactoTeacher(StockTeacher):
    """nerfacto and instant-ngp; appearance embeddings are zero, as in their own evaluation."""

    def __init__(self, state: State, contraction: bool):
        super().__init__()
        weights = part(state, "field.")
        numbers = {key: int(weights[key]) for key in ("max_res", "num_levels", "log2_hashmap_size")}
        table = next(value for key, value in weights.items() if key.endswith("hash_table"))
        layers = [value for key, value in weights.items() if key.startswith("mlp_base") and key.endswith("weight")]
        head = [value for key, value in weights.items() if key.startswith("mlp_head") and key.endswith("weight")]
        appearance = weights.get("embedding_appearance.embedding.weight")
        self.field = NerfactoField(
            weights["aabb"],
            num_images=1 if appearance is None else len(appearance),
            num_layers=len(layers),
            hidden_dim=layers[0].shape[0],
            geo_feat_dim=layers[-1].shape[0] - 1,
            features_per_level=table.shape[1],
            num_layers_color=len(head),
            hidden_dim_color=head[0].shape[0],
            appearance_embedding_dim=0 if appearance is None else appearance.shape[1],
            use_pred_normals="field_head_pred_normals.net.weight" in weights,
            spatial_distortion=SceneContraction(order=math.inf) if contraction else None,
            average_init_density=0.01 if "proposal_networks.0.aabb" in state else 1.0,
            implementation="torch",
            **numbers,
        )
        load(self.field, weights, "nerfacto")
        self.feature_dim = layers[-1].shape[0]

    def forward(self, positions: Tensor, directions: Tensor, *, colour: bool = True) -> Points:
        samples = samples_at(positions.detach().clone(), directions)
        density, geometry = self.field.get_density(samples)
        logit = self.clipped(density[:, 0, 0].clamp_min(1e-10).log())
        features = torch.cat([logit[:, None], geometry[:, 0]], dim=1)
        shown = next(iter(self.field.get_outputs(samples, geometry).values()))[:, 0] if colour else None
        return Points(features, logit, shown)


class VanillaTeacher(StockTeacher):
    """vanilla-nerf's fine field."""

    def __init__(self, state: State):
        super().__init__()
        position = NeRFEncoding(3, num_frequencies=10, min_freq_exp=0.0, max_freq_exp=8.0, include_input=True)
        direction = NeRFEncoding(3, num_frequencies=4, min_freq_exp=0.0, max_freq_exp=4.0, include_input=True)
        self.field = NeRFField(position_encoding=position, direction_encoding=direction)
        load(self.field, part(state, "field_fine."), "vanilla-nerf")
        self.feature_dim = 1 + self.field.mlp_base.get_out_dim()

    def forward(self, positions: Tensor, directions: Tensor, *, colour: bool = True) -> Points:
        samples = samples_at(positions, directions)
        density, embedding = self.field.get_density(samples)
        logit = self.clipped(density[:, 0, 0].clamp_min(1e-10).log())
        shown = next(iter(self.field.get_outputs(samples, embedding).values()))[:, 0] if colour else None
        return Points(torch.cat([logit[:, None], embedding[:, 0]], dim=1), logit, shown)


class TensoRFTeacher(StockTeacher):
    """tensorf with vm or cp factors; outside its box there is nothing."""

    def __init__(self, state: State):
        super().__init__()
        weights = part(state, "field.")
        vm = "density_encoding.plane_coef" in weights
        name, make = ("plane_coef", TensorVMEncoding) if vm else ("line_coef", TensorCPEncoding)
        shapes = [weights[f"{kind}_encoding.{name}"].shape for kind in ("density", "color")]
        density, colour = (make(resolution=shape[-1 if vm else 2], num_components=shape[1]) for shape in shapes)
        appearance = len(weights["B.weight"])
        self.field = TensoRFField(
            weights["aabb"],
            feature_encoding=NeRFEncoding(appearance, num_frequencies=2, min_freq_exp=0, max_freq_exp=2),
            direction_encoding=NeRFEncoding(3, num_frequencies=2, min_freq_exp=0, max_freq_exp=2),
            density_encoding=density,
            color_encoding=colour,
            appearance_dim=appearance,
            head_mlp_layer_width=len(weights["mlp_head.layers.0.weight"]),
        )
        load(self.field, weights, "tensorf")

    def forward(self, positions: Tensor, directions: Tensor, *, colour: bool = True) -> Points:
        samples = samples_at(positions, directions)
        inside = ((positions >= self.field.aabb[0]) & (positions <= self.field.aabb[1])).all(-1)
        density = self.field.get_density(samples)[:, 0, 0] * inside
        shown = self.field.get_outputs(samples)[:, 0] if colour else None
        return Points(None, self.clipped(density.clamp_min(1e-10).log()), shown)


def load(field: nn.Module, weights: State, name: str) -> None:
    try:
        field.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise InputError(f"teacher_checkpoint: a {name} with other than the stock settings ({error})") from None
    field.eval()


def density_at(field: nn.Module, positions: Tensor) -> Tensor:
    """Densities (M,) of any teacher at world positions (M, 3)."""
    own_density = getattr(field, "density", None)
    if own_density is not None:
        return own_density(positions)
    up = F.normalize(torch.ones_like(positions), dim=-1)
    return field(positions, up, colour=False).logit.exp()
