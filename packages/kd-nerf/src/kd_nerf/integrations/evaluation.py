"""Saved models opened by their weights, their views, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_nerf.engine.fields import RadianceField
from kd_nerf.engine.rendering import OccupancyGrid, RayPoints, Rays, composite, march
from kd_nerf.integrations.model import image_metrics
from kd_nerf.integrations.teachers import Teacher, density_at, load_teacher


class OpenModel:
    """A trained field with what is needed to draw it. `space` is a field of the engine, which says where rays go."""

    def __init__(self, teacher: Teacher, space: RadianceField, config: Any, device: torch.device):
        self.field, self.space = teacher.field.to(device).eval(), space.to(device)
        render = config.render
        occupancy = teacher.occupancy
        if occupancy is None:
            occupancy = OccupancyGrid(render.occupancy_resolution, render.occupancy_threshold).to(device)
            occupancy.fill(lambda unit: density_at(self.field, space.world(unit)))
        self.occupancy = occupancy.to(device)
        self.samples, self.chunk = render.samples, render.eval_rays
        self.near, self.far, self.device = config.data.near, config.data.far, device

    def points(self, origins: Tensor, directions: Tensor) -> RayPoints:
        limit = torch.ones_like(origins[:, 0])
        rays = Rays(origins, directions, self.near * limit, self.far * limit)
        return march(rays, self.space, self.occupancy, self.samples, jitter=False)

    @torch.no_grad()
    def view(self, cameras: Any, index: int) -> Tensor:
        """The picture (H, W, 3) of one of nerfstudio's cameras."""
        bundle = cameras.generate_rays(camera_indices=index, keep_shape=True)
        shape = bundle.origins.shape
        flat = (part.reshape(-1, 3).to(self.device).split(self.chunk) for part in (bundle.origins, bundle.directions))
        rows = []
        for origins, directions in zip(*flat):
            points = self.points(origins, directions)
            found = self.field(points.positions, points.directions)
            rows.append(composite(found.logit.exp(), found.colour, points).colour)
        return torch.cat(rows).view(shape).clamp(0, 1).cpu()


def open_model(config: Any, folder: Path, scene_box: Any, role: str) -> OpenModel:
    """The model of an artefact. InputError where its folder holds no checkpoint."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(folder, contraction=config.teacher.stock_contraction, name=role)
    if isinstance(teacher.field, RadianceField):
        return OpenModel(teacher, teacher.field, config, device)
    space = RadianceField(config.student, scene_box.aabb)
    return OpenModel(teacher, space, config, device)


def compare_models(models: Mapping[str, OpenModel], test: Any) -> dict[str, float]:
    """Metrics of every model on the test views, and of the student against the teacher."""
    pictures = {role: [model.view(test.cameras, i) for i in range(len(test.images))] for role, model in models.items()}
    result: dict[str, float] = {}
    for role, drawn in pictures.items():
        rows = [image_metrics(view, truth) for view, truth in zip(drawn, test.images)]
        for name in rows[0]:
            result[f"{role}/{name}"] = sum(row[name] for row in rows) / len(rows)
        result[f"{role}/parameters"] = sum(parameter.numel() for parameter in models[role].field.parameters())
    pairs = [image_metrics(s, t)["psnr"] for s, t in zip(pictures["student"], pictures["teacher"])]
    result["student/psnr_to_teacher"] = sum(pairs) / len(pairs)
    result["student/logit_gap"] = logit_gap(models["student"], models["teacher"])
    return result


@torch.no_grad()
def logit_gap(student: OpenModel, teacher: OpenModel, count: int = 4096) -> float:
    """Mean |q_S - q_T| at random points of the cells that the teacher occupies."""
    grid = teacher.occupancy
    cells = grid.cells.nonzero()
    generator = torch.Generator().manual_seed(0)
    chosen = cells[torch.randint(len(cells), (count,), generator=generator).to(cells.device)]
    unit = (chosen + torch.rand((count, 3), generator=generator).to(chosen.device)) / grid.resolution
    positions = teacher.space.world(unit)
    up = torch.nn.functional.normalize(torch.ones_like(positions), dim=-1)
    logits = [model.field(positions, up, colour=False).logit for model in (student, teacher)]
    return float((logits[0] - logits[1]).abs().mean())


def rows(models: Mapping[str, OpenModel], test: Any, count: int) -> list[dict[str, Any]]:
    """For the report: truth, both fields' views, and their errors four times as bright."""
    made = []
    for index in range(min(count, len(test.images))):
        truth = test.images[index]
        drawn = {role: model.view(test.cameras, index) for role, model in models.items()}
        quality = ", ".join(f"{role} {image_metrics(view, truth)['psnr']:.1f} dB" for role, view in drawn.items())
        images = {"truth": truth, **drawn}
        images |= {f"error of the {role}": (4 * (view - truth).abs()).clamp(0, 1) for role, view in drawn.items()}
        bytes_ = {name: (image * 255).round().byte().numpy() for name, image in images.items()}
        made.append({"caption": f"test view {index}: {quality}", "images": bytes_})
    return made
