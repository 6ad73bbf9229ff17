"""The pipeline of `ns-train kd-pvd`: rays of random cameras through teacher and student, or photographs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from torch import nn
from torch.nn import Parameter

from kd_nerf.engine.cameras import Intrinsics, RandomViews
from kd_nerf.engine.encodings import SparseGrid
from kd_nerf.engine.fields import GridField, RadianceField
from kd_nerf.engine.rendering import RayPoints
from kd_nerf.integrations.model import RadianceModel, RadianceModelConfig
from kd_nerf.integrations.settings import PVDSettings, typed
from kd_nerf.integrations.teachers import Teacher, density_at, load_teacher
from kd_nerf.methods.pvd import PVD, PVDConfig
from kdcore.distiller import LossTerms
from kdcore.errors import InputError

OUTSIDE_PVD = ("poses", "radius", "from_scratch")  # settings that the distiller itself has no use for


@dataclass
class PVDPipelineConfig(VanillaPipelineConfig):
    _target: type = field(default_factory=lambda: PVDPipeline)
    datamanager: VanillaDataManagerConfig = field(default_factory=VanillaDataManagerConfig)
    """Photographs for evaluation, and the cameras that random ones are made like."""
    model: RadianceModelConfig = field(default_factory=RadianceModelConfig)
    """The student."""
    teacher_checkpoint: Path | None = None
    """Trained field: a .ckpt file or a nerfstudio run's folder, of kd-nerf, nerfacto, instant-ngp, vanilla-nerf or
    tensorf. Needed for training alone."""
    teacher_contraction: bool = True
    """Whether a nerfacto teacher contracts space, which its checkpoint does not say."""
    pvd: PVDSettings = field(default_factory=PVDSettings)
    """The method's arguments."""


class PVDPipeline(VanillaPipeline):
    """Trains the student by PVD; with `pvd.from_scratch` on photographs. Evaluates and renders as any other pipeline.

    The teacher and the distiller are no part of the state dict: a checkpoint is the student's alone.
    """

    config: PVDPipelineConfig
    model: RadianceModel

    def __init__(self, config: PVDPipelineConfig, device: Any, test_mode: str = "val", **arguments: Any):
        super().__init__(config, device, test_mode, **arguments)
        self.settings = typed(PVDConfig, config.pvd, "pvd")
        self.terms = LossTerms()
        self.feature_map: nn.Module = nn.Identity()
        self._aside: dict[str, Any] = {}  # modules that must not be found as submodules
        if test_mode == "val" and not self.settings.from_scratch:
            if self.world_size > 1:
                raise InputError(f"machine.num_devices = {self.world_size}: kd-pvd trains on one device")
            self.prepare(device)

    def prepare(self, device: Any) -> None:
        """Loads the teacher, gives the student its occupancy grid and nets, and makes the distiller."""
        if self.config.teacher_checkpoint is None:
            raise InputError("teacher_checkpoint: is required; give --pipeline.teacher-checkpoint, the teacher's run")
        teacher = load_teacher(self.config.teacher_checkpoint, contraction=self.config.teacher_contraction)
        teacher.field.to(device)
        check_spaces(self.model.radiance, teacher.field)
        give_occupancy(self.model, teacher)
        arguments = self.settings.model_dump(exclude=set(OUTSIDE_PVD))
        around = {"background": self.model.config.background, "occupancy": self.model.occupancy}
        distiller = PVD(teacher.field, self.model.radiance, **around, **arguments)
        self.feature_map = distiller.feature_map.to(device)
        cameras = self.datamanager.train_dataset.cameras
        first = [float(getattr(cameras, name)[0]) for name in ("fx", "fy", "cx", "cy")]
        intrinsics = Intrinsics(*first, int(cameras.width[0]), int(cameras.height[0]))
        seed = int(torch.randint(2**31, (1,)))
        views = RandomViews(
            self.settings.poses, cameras.camera_to_worlds.cpu(), intrinsics, radius=self.settings.radius, seed=seed
        )
        self._aside.update(distiller=distiller, views=views)

    @property
    def distiller(self) -> PVD | None:
        return self._aside.get("distiller")

    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        distiller = self.distiller
        if distiller is None:
            outputs, losses, metrics = super().get_train_loss_dict(step)
            self.terms = LossTerms({name: (1.0, value) for name, value in losses.items()})
            return outputs, losses, metrics
        distiller.progress.step = step
        self.terms = distiller.loss(self.points())
        losses = {name: weight * value for name, (weight, value) in self.terms.items() if weight != 0}
        return {}, losses, {"stage": torch.tensor(float(distiller.stage))}

    def points(self) -> RayPoints:
        """Points on the next rays of the random cameras."""
        count = self.config.datamanager.train_num_rays_per_batch
        origins, directions = (part.to(self.device) for part in self._aside["views"].rays(count))
        bundle = RayBundle(origins, directions, pixel_area=torch.ones_like(origins[:, :1]))
        return self.model.points(bundle, jitter=True)

    def random_state(self) -> dict[str, Any]:
        """What the random cameras have drawn and will draw; empty where photographs train."""
        views = self._aside.get("views")
        return {} if views is None else views.state()

    def set_random_state(self, state: dict[str, Any]) -> None:
        """The counterpart of `random_state`. KeyError where the state is of a training without random cameras."""
        views = self._aside.get("views")
        if views is not None:
            views.restore(state)

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        groups = super().get_param_groups()
        extra = list(self.feature_map.parameters())
        return {**groups, "networks": [*groups.get("networks", []), *extra]} if extra else groups


def check_spaces(student: RadianceField, teacher: nn.Module) -> None:
    """Raises InputError unless teacher and student, where both are the engine's, map the same space."""
    if not isinstance(teacher, RadianceField):
        return
    if student.config.contraction != teacher.config.contraction:
        raise InputError(
            f"model.field.contraction = {student.config.contraction}: the teacher's is {teacher.config.contraction}; "
            "both have to map the same space"
        )
    if not torch.allclose(student.box.cpu(), teacher.box.cpu()):
        boxes = [field.box.tolist() for field in (student, teacher)]
        raise InputError(
            f"the student's box is {boxes[0]}, the teacher's {boxes[1]}: give data with the same scene box"
        )


def give_occupancy(model: RadianceModel, teacher: Teacher) -> None:
    """The teacher's grid for the student, or one from the teacher's densities; a sparse grid keeps what is in it."""
    radiance, grid = model.radiance, model.occupancy
    if teacher.occupancy is not None and teacher.occupancy.resolution == grid.resolution:
        grid.load_state_dict(teacher.occupancy.state_dict())
    else:
        grid.fill(lambda unit: density_at(teacher.field, radiance.world(unit)))
    model.inherited_occupancy = True
    if isinstance(radiance, GridField) and isinstance(radiance.grid, SparseGrid):
        radiance.grid.keep(grid.cells)
