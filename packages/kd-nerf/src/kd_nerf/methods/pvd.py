"""One is All: Bridging the Gap Between Neural Radiance Fields Architectures with
Progressive Volume Distillation (arXiv 2211.15977, 2022).

A trained radiance field of one architecture becomes a field of another one, from rays of random cameras and without
photographs. Both fields are asked at the same points, and the losses switch on from shallow to deep: the features that
architectures have in common, then density and colour of the points, then the colour of the rays. With q the density
logit, f = [q, geometry channels], c the colour, S the student, T the teacher, and |.|_F the Frobenius norm over all M
points (a norm: neither squared nor averaged, so its gradient has the size of its weight whatever M is):

    q       = clamp(q_raw, -2, 7),   sigma = exp(q)                                                                 (1)
    L_f     = |f_S - f_T|_F                                                                                         (2)
    L_c     = |c_S - c_T|_F,   L_q = |q_S - q_T|_F                                                                  (3)
    C       = sum_k T_k (1 - exp(-sigma_k delta_k)) c_k + (1 - opacity) background,   L_rgb = |C_S - C_T|_F         (4)
    L_reg   = sum over the planes and lines of the student's density of mean |entry|                                (5)

    L = w_f L_f                                                    n < n_1, with w_f = 0.002 * 0.995^n              (6)
    L = w_f L_f + 0.002 L_c + 0.002 L_q                            n_1 <= n < n_2
    L = w_f L_f + 0.002 L_c + 0.002 L_q + L_rgb + 1e-4 L_reg       n_2 <= n

n counts steps from 1; n_1 = 2000, n_2 = 5000 of 30000. Comparing logits instead of densities, and clipping them, is
what keeps the density term stable: sigma spans four orders of magnitude, q nine units. A grid that stores density and
spherical harmonics has no f: then L_f is absent and training starts in the second stage. In the first stage no colour
is computed, in the first two no ray. The numbers of the equations are this file's.

Not the paper's: a student that ships without an occupancy grid (`nerfacto`) also gets

    L_empty = |relu(q_S - (-10))|_F,   weight 0.002, at as many random points of the grid's empty cells as rays

for nothing else says anything about space that the grid leaves out, where it would be drawn as fog.

Teacher frozen. The student inherits the nets that read f from the teacher where their shapes agree, and the teacher's
occupancy grid, which decides where on the rays the points are. Where f has another width, a linear map of the
student's geometry channels, which does not ship, goes to the teacher's. The student ships.

In a loop of your own:

    distiller = PVD(teacher, student)                   # fields of kd_nerf.engine.fields, or kd_nerf.integrations'
    points = march(rays, student, occupancy, 512, jitter=True)
    distiller.loss(points).total().backward()
    distiller.progress.step += 1                        # n - 1; it decides the stage
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_nerf.engine.cameras import Poses
from kd_nerf.engine.fields import EMPTY, Points, RadianceField, density_of, inherit
from kd_nerf.engine.rendering import OccupancyGrid, RayPoints, composite
from kd_nerf.runs import nerf_method
from kdcore.config import MethodConfig
from kdcore.distiller import Distiller, LossTerms, freeze
from kdcore.errors import InputError

Norm = Literal["frobenius", "mse", "l1"]
EMPTY_WEIGHT = 0.002  # as that of the other losses on points


class PVDConfig(MethodConfig):
    """The defaults are the paper's and its release's."""

    stage_ends: tuple[int, int] = Field((2000, 5000), description="steps n_1 and n_2 at which the next losses join")
    rgb: float = Field(1.0, ge=0, description="weight of the rays' colour")
    feature: float = Field(0.002, ge=0, description="weight of the common features at n = 0")
    feature_decay: float = Field(0.995, gt=0, le=1, description="factor of that weight per step")
    colour: float = Field(0.002, ge=0, description="weight of the points' colour")
    density: float = Field(0.002, ge=0, description="weight of the points' density logit")
    l1: float = Field(1e-4, ge=0, description="weight of the density factors' mean size (vm and cp students)")
    empty: float | None = Field(
        None,
        ge=0,
        description="weight of emptiness in cells that the occupancy grid leaves out; null: 0.002 for nerfacto, else 0",
    )
    norm: Norm = Field("frobenius", description="frobenius: the paper's; mse and l1 are means, as the release offers")
    density_space: Literal["logit", "sigma"] = Field("logit", description="what the density loss compares")
    inherit: bool = Field(True, description="start from the teacher's nets where they have one name and shape")
    freeze_inherited: bool = Field(False, description="leave the inherited nets as they are")
    poses: Poses = Field("synthetic", description="random cameras: on a sphere, a band of it, a box, or the real ones")
    radius: float = Field(4.0, gt=0, description="distance of the random cameras from the origin, in world units")
    from_scratch: bool = Field(False, description="the baseline: train the student on the photographs instead")

    @model_validator(mode="after")
    def _stages_in_order(self) -> PVDConfig:
        first, second = self.stage_ends
        if not 0 <= first <= second:
            raise ValueError(f"stage_ends = [{first}, {second}]: expected 0 <= n_1 <= n_2")
        if self.rgb == 0 and self.colour == 0 and self.density == 0:
            raise ValueError("rgb, colour and density are all 0: nothing is left after the first stage")
        return self


# ---------------------------------------------------------------- losses


def distance(student: Tensor, teacher: Tensor, norm: Norm = "frobenius") -> Tensor:
    """Eqs. (2) to (4): the Frobenius norm of the difference of two tensors of one shape, a scalar.

    Where they are equal its gradient is 0. `mse` and `l1` are means, thousands of times weaker at the same weight.

    >>> distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.zeros(2, 2))
    tensor(5.)
    """
    if student.shape != teacher.shape:
        raise InputError(f"distance: shapes {tuple(student.shape)} and {tuple(teacher.shape)}; expected one shape")
    dtype = torch.promote_types(student.dtype, torch.float32)  # half precision overflows in the sum
    difference = student.to(dtype) - teacher.to(dtype)
    if norm == "frobenius":
        return torch.linalg.vector_norm(difference)
    return difference.square().mean() if norm == "mse" else difference.abs().mean()


def stage_of(n: int, stage_ends: tuple[int, int], *, has_features: bool = True) -> int:
    """Stage 1, 2 or 3 of step n, which counts from 1. Without common features there is no stage 1.

    >>> [stage_of(n, (2000, 5000)) for n in (1999, 2000, 4999, 5000)]
    [1, 2, 2, 3]
    """
    if n < stage_ends[0] and has_features:
        return 1
    return 2 if n < stage_ends[1] else 3


def feature_weight(n: int, weight: float = 0.002, decay: float = 0.995) -> float:
    """w_f of step n, eq. (6): it decays from the first step on, also within the first stage.

    >>> f"{feature_weight(1):.5f} {feature_weight(2000):.3e}"
    '0.00199 8.855e-08'
    """
    return weight * decay**n


def mean_size(factors: list[Tensor]) -> Tensor:
    """Eq. (5): the sum over factors of the mean absolute entry, a scalar."""
    return torch.stack([factor.abs().mean() for factor in factors]).sum()


# ---------------------------------------------------------------- the method


class PVD(Distiller):
    """Arguments as in `PVDConfig`. Teacher and student are called `field(positions, directions, colour=...)` and give
    `Points`; `feature_dim` is the width of their common features, or None. `background` is a grey value, `occupancy`
    the grid that the rays are marched through, needed where `empty` is not 0."""

    student: RadianceField

    def __init__(
        self,
        teacher: nn.Module,
        student: RadianceField,
        *,
        stage_ends: tuple[int, int] = (2000, 5000),
        rgb: float = 1.0,
        feature: float = 0.002,
        feature_decay: float = 0.995,
        colour: float = 0.002,
        density: float = 0.002,
        l1: float = 1e-4,
        empty: float | None = None,
        norm: Norm = "frobenius",
        density_space: Literal["logit", "sigma"] = "logit",
        inherit: bool = True,
        freeze_inherited: bool = False,
        background: float = 1.0,
        occupancy: OccupancyGrid | None = None,
    ):
        super().__init__()
        self.teacher, self.student = freeze(teacher), student
        self.stage_ends, self.norm, self.density_space = tuple(stage_ends), norm, density_space
        self.rgb, self.feature, self.feature_decay = rgb, feature, feature_decay
        self.colour, self.density, self.l1, self.background = colour, density, l1, background
        self.empty = EMPTY_WEIGHT * student.gridless if empty is None else empty
        self._occupancy = [occupancy]  # a list: no submodule
        if self.empty > 0 and occupancy is None:
            raise InputError("occupancy: is required where empty is not 0, as for nerfacto students; give its grid")
        self.inherited = _inherit(student, teacher) if inherit else []
        if freeze_inherited:
            for name in self.inherited:
                freeze(getattr(student, name))
        mine, other = student.feature_dim, teacher.feature_dim
        self.has_features = mine is not None and other is not None and feature > 0
        self.feature_map: nn.Module = nn.Identity()
        if self.has_features and mine != other:
            self.feature_map = nn.Linear(mine - 1, other - 1, bias=False)

    @property
    def step(self) -> int:
        """n of the step to come."""
        return self.progress.step + 1

    @property
    def stage(self) -> int:
        return stage_of(self.step, self.stage_ends, has_features=self.has_features)

    def loss(self, batch: RayPoints, player: str = "student") -> LossTerms:
        """Eq. (6) on the points of some rays."""
        stage = self.stage
        student = self.student(batch.positions, batch.directions, colour=stage > 1)
        with torch.no_grad():
            teacher = self.teacher(batch.positions, batch.directions, colour=stage > 1)
        terms = LossTerms()
        if self.has_features:
            weight = feature_weight(self.step, self.feature, self.feature_decay)
            terms["feature"] = (weight, self.feature_loss(student, teacher))
        if stage > 1:
            terms["colour"] = (self.colour, distance(student.colour, teacher.colour, self.norm))
            terms["density"] = (self.density, self.density_loss(student.logit, teacher.logit))
        if stage > 2:
            terms["rgb"] = (self.rgb, distance(self.rendered(student, batch), self.rendered(teacher, batch), self.norm))
            factors = self.student.regularised()
            if factors and self.l1 > 0:
                terms["l1"] = (self.l1, mean_size(factors))
        if self.empty > 0:
            terms["empty"] = (self.empty, self.emptiness(len(batch.lengths)))
        return terms

    def emptiness(self, count: int) -> Tensor:
        """L_empty at `count` random points, a scalar; 0 where the grid has no empty cell."""
        (occupancy,) = self._occupancy
        unit = occupancy.empty_points(count) if occupancy is not None else self.student.box.new_zeros(0, 3)
        if len(unit) == 0:
            return unit.sum()
        return torch.linalg.vector_norm((self.student.stored(unit)[:, 0].float() - EMPTY).relu())

    def feature_loss(self, student: Points, teacher: Points) -> Tensor:
        """Eq. (2); the logit is compared with the logit, whatever the widths of the rest."""
        geometry = self.feature_map(student.features[:, 1:])
        return distance(torch.cat([student.features[:, :1], geometry], dim=1), teacher.features, self.norm)

    def density_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """L_q of eq. (3), or the same on the densities themselves."""
        if self.density_space == "sigma":
            student, teacher = density_of(student), density_of(teacher)
        return distance(student, teacher, self.norm)

    def rendered(self, points: Points, batch: RayPoints) -> Tensor:
        """C of eq. (4), (R, 3)."""
        return composite(density_of(points.logit), points.colour, batch, self.background).colour


_inherit = inherit  # the constructor has an argument of this name

METHOD = nerf_method("pvd", __doc__, PVDConfig)
