"""nerfstudio's own field behind the engine's interface: trained as it is, and shipped as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_nerf.engine.fields import FieldConfig, RadianceField
from kdcore.errors import InputError

GEOMETRY = 15
"""Geometry channels of a NerfactoModel; its config has no setting for them."""


def density_sizes(config: FieldConfig) -> dict[str, int]:
    """Hash table and density net under the names that nerfstudio's fields, proposal networks and model share."""
    return {
        "hidden_dim": config.hidden,
        "num_levels": config.levels,
        "base_res": config.base_resolution,
        "max_res": config.finest_resolution,
        "log2_hashmap_size": config.log2_size,
        "features_per_level": config.features_per_level,
    }


class NerfactoRadiance(RadianceField):
    """`NerfactoField` of nerfstudio in its torch implementation, without appearance embeddings.

    Layers have biases, every level of the table is hashed, and directions enter as (d + 1) / 2. The logit is not
    clipped, as the stock field does not clip it; it is compared with a teacher's that is. A stock model has no
    occupancy grid, so that what a grid leaves out has to become empty in the field itself (`gridless`).

    Raises InputError for what a stock nerfacto cannot be: another number of geometry channels, tinycudann's layout, a
    contraction of another space than [-1, 1]^3.
    """

    gridless = True

    def __init__(self, config: FieldConfig, box: Tensor):
        from nerfstudio.fields.nerfacto_field import NerfactoField

        if config.geometry != GEOMETRY:
            raise InputError(f"geometry = {config.geometry}: a nerfacto field has {GEOMETRY}")
        if config.implementation == "tcnn":
            raise InputError("implementation = 'tcnn': allowed for nerfacto: 'auto', 'torch'")
        unit = torch.tensor([[-1.0] * 3, [1.0] * 3])
        if config.contraction and not torch.equal(box.cpu().float(), unit):
            raise InputError(f"contraction = true: a nerfacto contracts around [-1, 1]^3, the box is {box.tolist()}")
        super().__init__(config.model_copy(update={"implementation": "torch"}), box)
        self.feature_dim = 1 + GEOMETRY
        self.field = NerfactoField(
            box.clone().float(),
            num_images=1,
            geo_feat_dim=GEOMETRY,
            hidden_dim_color=config.colour_width,
            appearance_embedding_dim=0,
            implementation="torch",
            **density_sizes(config),
        )

    def clipped(self, logit: Tensor) -> Tensor:
        return logit

    def stored(self, unit: Tensor) -> Tensor:
        return self.field.mlp_base(unit)

    def colour(self, stored: Tensor, directions: Tensor) -> Tensor:
        basis = self.field.direction_encoding((directions + 1) / 2)
        return self.field.mlp_head(torch.cat([basis, stored[:, 1:]], dim=1))

    def encoding_parameters(self) -> list[nn.Parameter]:
        return [value for name, value in self.field.named_parameters() if name.endswith("hash_table")]
