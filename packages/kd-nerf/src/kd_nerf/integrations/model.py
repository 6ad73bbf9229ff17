"""A nerfstudio model of any field of the engine: stock cameras, renderer outputs and metrics, plain torch or CUDA."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.fields.base_field import Field
from nerfstudio.models.base_model import Model, ModelConfig
from nerfstudio.utils import colormaps
from torch import Tensor
from torch.nn import Parameter
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from kd_nerf.engine.fields import FieldConfig, RadianceField, density_of, make_field
from kd_nerf.engine.rendering import OccupancyGrid, RayPoints, Rays, Rendered, composite, marcher
from kd_nerf.integrations.settings import FieldSettings, typed


class StudioField(Field):
    """A field of the engine as a nerfstudio field: densities and colours of `RaySamples` of any shape."""

    def __init__(self, radiance: RadianceField):
        super().__init__()
        self.radiance = radiance

    def get_density(self, ray_samples: RaySamples) -> tuple[Tensor, Tensor]:
        positions = ray_samples.frustums.get_positions()
        unit, inside = self.radiance.unit(positions.reshape(-1, 3))
        stored = self.radiance.stored(unit)
        common = self.radiance.common(stored)
        embedding = stored if common is None else common
        logit = self.radiance.clipped(embedding[:, 0])
        shape = positions.shape[:-1]
        return (density_of(logit) * inside).view(*shape, 1), embedding.view(*shape, -1)

    def get_outputs(self, ray_samples: RaySamples, density_embedding: Tensor | None = None) -> dict[Any, Tensor]:
        if density_embedding is None:
            _, density_embedding = self.get_density(ray_samples)
        directions = ray_samples.frustums.directions
        colour = self.radiance.colour(density_embedding.flatten(0, -2), directions.reshape(-1, 3))
        return {FieldHeadNames.RGB: colour.view(*directions.shape)}


@dataclass
class RadianceModelConfig(ModelConfig):
    """The defaults are the paper's."""

    _target: type = dataclasses.field(default_factory=lambda: RadianceModel)
    field: FieldSettings = dataclasses.field(default_factory=FieldSettings)
    """What stores the scene, and its sizes."""
    samples: int = 1024
    """Samples per ray, before those in empty cells are left out."""
    occupancy_resolution: int = 128
    """Cells per axis of the grid that says where there is something."""
    occupancy_threshold: float = 10.0
    """Density above which a cell is always kept."""
    occupancy_every: int = 16
    """Steps between two looks at the grid, where the field is trained on photographs."""
    occupancy_warmup: int = 256
    """Steps before the first cell is left out."""
    background: float = 1.0
    """Grey value behind the scene; the photographs have to have the same."""
    collider_params: dict[str, float] | None = dataclasses.field(
        default_factory=lambda: {"near_plane": 0.2, "far_plane": 1000.0}
    )
    """Where rays start and end; they also do at the box."""
    loss_coefficients: dict[str, float] = dataclasses.field(default_factory=lambda: {"rgb": 1.0})
    """Of the loss on photographs."""


class RadianceModel(Model):
    config: RadianceModelConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        config = typed(FieldConfig, self.config.field, "model.field")
        self.field = StudioField(make_field(config, self.scene_box.aabb))
        self.occupancy = OccupancyGrid(
            self.config.occupancy_resolution, self.config.occupancy_threshold, every=self.config.occupancy_every
        )
        self.inherited_occupancy = False

    @property
    def radiance(self) -> RadianceField:
        return self.field.radiance

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        encodings = [p for p in self.radiance.encoding_parameters() if p.requires_grad]
        known = {id(p) for p in encodings}
        networks = [p for p in self.radiance.parameters() if p.requires_grad and id(p) not in known]
        return {name: group for name, group in (("encodings", encodings), ("networks", networks)) if group}

    def get_training_callbacks(self, training_callback_attributes: TrainingCallbackAttributes) -> list:
        def look(step: int) -> None:
            if not self.inherited_occupancy:
                warm = step < self.config.occupancy_warmup
                self.occupancy.update(self.unit_density, warm=warm)
                if not warm:
                    self.occupancy.settle()

        before = TrainingCallbackLocation.BEFORE_TRAIN_ITERATION
        return [TrainingCallback([before], look, update_every_num_iters=self.config.occupancy_every)]

    def unit_density(self, unit: Tensor) -> Tensor:
        """Densities (M,) at coordinates (M, 3) of the field's cube."""
        return self.radiance.density(self.radiance.world(unit))

    # ------------------------------------------------------------ rendering

    def points(self, bundle: RayBundle, *, jitter: bool) -> RayPoints:
        """The points on a bundle of rays (R) that the occupancy grid leaves."""
        if bundle.nears is None and self.collider is not None:
            bundle = self.collider(bundle)
        rays = Rays(bundle.origins, bundle.directions, bundle.nears[..., 0], bundle.fars[..., 0])
        step = marcher(rays.origins.device, self.radiance.config.contraction)
        return step(rays, self.radiance, self.occupancy, self.config.samples, jitter=jitter)

    def render(self, points: RayPoints) -> Rendered:
        found = self.radiance(points.positions, points.directions)
        return composite(density_of(found.logit), found.colour, points, self.config.background)

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Tensor]:
        rendered = self.render(self.points(ray_bundle, jitter=self.training))
        colour = rendered.colour if self.training else rendered.colour.clamp(0, 1)
        return {"rgb": colour, "accumulation": rendered.opacity[:, None], "depth": rendered.depth[:, None]}

    def get_loss_dict(self, outputs: Any, batch: Any, metrics_dict: Any = None) -> dict[str, Tensor]:
        truth = self.truth(batch["image"]).to(outputs["rgb"])
        return {"rgb": self.config.loss_coefficients["rgb"] * (outputs["rgb"] - truth).square().mean()}

    def truth(self, image: Tensor) -> Tensor:
        """A photograph, in front of the background where it has an alpha channel."""
        if image.shape[-1] == 3:
            return image
        return image[..., :3] * image[..., 3:] + self.config.background * (1 - image[..., 3:])

    def get_image_metrics_and_images(self, outputs: Any, batch: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
        truth, rendered = self.truth(batch["image"]).to(outputs["rgb"]), outputs["rgb"]
        error = (rendered - truth).abs().mean(-1, keepdim=True)
        images = {
            "img": torch.cat([truth, rendered], dim=1),
            "error": colormaps.apply_float_colormap((4 * error).clamp(0, 1)),
            "accumulation": colormaps.apply_colormap(outputs["accumulation"]),
            "depth": colormaps.apply_depth_colormap(outputs["depth"], accumulation=outputs["accumulation"]),
        }
        return image_metrics(rendered, truth), images


def image_metrics(rendered: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR (dB) and SSIM of two pictures (H, W, 3) in [0, 1], H and W at least 11."""
    a, b = (image.movedim(-1, 0)[None] for image in (rendered, truth))
    psnr = peak_signal_noise_ratio(a, b, data_range=1.0)
    return {"psnr": float(psnr), "ssim": float(structural_similarity_index_measure(a, b, data_range=1.0))}
