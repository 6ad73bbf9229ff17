"""Multi-Granularity Distillation Scheme Towards Lightweight Semi-Supervised Semantic Segmentation
(arXiv 2208.10169, 2022).

Few labelled and many unlabelled images; a light student learns from two frozen teachers of complementary shape, a wide
one W and a deep one D, at three granularities. x, y: labelled images and labels. u_0, u_1: unlabelled images, m: a
CutMix mask. z: logits at the size of the image, A: decoder features before the classifier, sg: no gradient.

    u_mix  = (1 - m) u_0 + m u_1,   yhat_k = argmax_c [(1 - m) z_k(u_0) + m z_k(u_1)],   k in {W, D}
    L_pix  = sum_k CE(z_s(u_mix), yhat_k)  +  sum_k CE(z_s(x), argmax_c z_k(x))               pixel level, hard labels
    L_img  = sum_{b, c} |g_s - sg g_D|,  g = spatial mean of z(u_mix)                         image level, deep teacher
    L_reg  = mean_{b, i, j} (S_s - sg S_W)^2,  S = cosines between the regions of A(u_mix)    region level, wide teacher
             pooled to 7 x 7
    L      = L_sup + L_pix + lambda_1 L_img + lambda_2 L_reg

L_img is a sum over batch and classes, so lambda_1 depends on both (per process).

teacher: W and D, trained by cross pseudo supervision on the same labels. student: any light network.
Ships: the student. The teachers are in eval mode; the released code leaves them in training mode (teacher_norm: batch).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_segmentation.engine.batch import SegBatch
from kd_segmentation.engine.cutmix import draw_masks, full_logits, mixed, predicted, pseudo_labels, two_streams
from kd_segmentation.engine.losses import cross_entropy, ohem_cross_entropy, self_similarity
from kd_segmentation.engine.tapped import inner
from kd_segmentation.runs import Run, segmentation_method
from kdcore.config import MethodConfig, parse
from kdcore.distiller import Distiller, LossTerms
from kdcore.errors import InputError
from kdcore.taps import FeatureTap


class MGDConfig(MethodConfig):
    lambda_image: float = Field(1e-3, ge=0, description="weight of the image-level loss, lambda_1")
    lambda_region: float = Field(100.0, ge=0, description="weight of the region-level loss, lambda_2")
    pixel_labelled: float = Field(1.0, ge=0, description="weight of the teachers' labels on labelled images")
    pixel_unlabelled: float = Field(1.0, ge=0, description="weight of the teachers' labels on mixed unlabelled images")
    supervised: Literal["ce", "ohem"] = Field("ce", description="loss of the true labels; ohem for Cityscapes")
    ohem_threshold: float = Field(0.7, gt=0, lt=1, description="probability above which a pixel is easy")
    ohem_kept: int = Field(50_000, ge=0, description="pixels an image that ohem keeps at least, on average")
    regions: int = Field(7, ge=1, description="side of the grid that features are pooled to")
    student_feature: str = Field("decode_head.sep_bottleneck", description="student's module whose output is A")
    wide_feature: str = Field("decode_head.sep_bottleneck", description="wide teacher's module whose output is A")
    teacher_norm: Literal["eval", "batch"] = Field(
        "eval", description="batch norm of the teachers: running statistics, or those of the batch as released"
    )
    swap: bool = Field(False, description="ablation: image level from the wide teacher, region level from the deep one")
    baseline: Literal["none", "cps"] = Field(
        "none", description="cps: no teacher, the student and a copy of it supervise each other"
    )
    cps_start: int = Field(0, ge=0, description="baseline cps: iterations on the labels alone first")


# ---------------------------------------------------------------- losses


def image_level(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over batch and classes of |spatial mean of the student's logits - the teacher's|; the teacher is detached.

    Logits (B, C, H, W) and (B, C, H', W') -> scalar.
    """
    return (student.mean(dim=(2, 3)) - teacher.detach().mean(dim=(2, 3))).abs().sum()


def region_level(student: Tensor, teacher: Tensor, regions: int = 7) -> Tensor:
    """Mean squared difference of the self-similarities; channels may differ. (B, C, h, w) both -> scalar."""
    return F.mse_loss(self_similarity(student, regions), self_similarity(teacher.detach(), regions))


def pixel_level(logits: Tensor, labels: list[Tensor]) -> Tensor:
    """Sum over the teachers of the cross entropy with their labels: (B, C, H, W), K x (B, H, W) -> scalar."""
    return torch.stack([cross_entropy(logits, item) for item in labels]).sum()


# ---------------------------------------------------------------- distiller


class MGD(Distiller):
    """student, and teachers "wide" and "deep": networks with `network(images) -> logits`. Arguments as in MGDConfig.

    A batch has labelled images and two unlabelled streams. Raises InputError: a teacher or a tapped module is missing,
    a feature map is smaller than the grid of regions.
    """

    def __init__(self, student: nn.Module, teachers: Mapping[str, nn.Module], **arguments: Any):
        super().__init__()
        self.args = args = parse(MGDConfig, arguments, source="MGD")
        missing = {"wide", "deep"} - set(teachers)
        if missing:
            raise InputError(f"model.teachers: MGD needs 'wide' and 'deep', got {', '.join(teachers) or 'none'}")
        self.student = student
        self.teachers = nn.ModuleDict({name: teachers[name] for name in ("wide", "deep")})
        self.regional, self.global_ = ("deep", "wide") if args.swap else ("wide", "deep")
        self._student_tap = FeatureTap(student, {"A": args.student_feature})
        self._teacher_tap = FeatureTap(inner(self.teachers[self.regional]), {"A": args.wide_feature}, detach=True)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.args.teacher_norm == "batch":
            for module in self.teachers.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
        return self

    def loss(self, batch: SegBatch, player: str = "student") -> LossTerms:
        return LossTerms({**self._labelled(batch), **self._unlabelled(batch)})

    def _labelled(self, batch: SegBatch) -> LossTerms:
        """L_sup, and the teachers' labels on the labelled images."""
        args, x, y = self.args, batch.images, batch.labels
        if y is None:
            raise InputError("MGD: the labelled stream has no labels")
        size = (y.shape[-2], y.shape[-1])
        z = full_logits(self.student, x, size)
        if args.supervised == "ohem":
            supervised = ohem_cross_entropy(z, y, threshold=args.ohem_threshold, min_kept=args.ohem_kept * len(x))
        else:
            supervised = cross_entropy(z, y)
        terms = LossTerms(ce=(1.0, supervised))
        if args.pixel_labelled:
            with torch.no_grad():
                theirs = [predicted(teacher, x, size) for teacher in self.teachers.values()]
            terms["pixel_labelled"] = (args.pixel_labelled, pixel_level(z, theirs))
        return terms

    def _unlabelled(self, batch: SegBatch) -> LossTerms:
        """The three levels on the mixed images."""
        args = self.args
        if not (args.pixel_unlabelled or args.lambda_image or args.lambda_region):
            return LossTerms()
        u0, u1 = two_streams(batch)
        size = (u0.shape[-2], u0.shape[-1])
        mask = draw_masks(u0)
        mix = mixed(u0, u1, mask)
        with self._student_tap:
            z = full_logits(self.student, mix, size)
            features = self._student_tap["A"]
        self._student_tap.clear()
        terms = LossTerms()
        if args.pixel_unlabelled:
            together = args.teacher_norm == "eval"
            theirs = [pseudo_labels(teacher, u0, u1, mask, together=together) for teacher in self.teachers.values()]
            terms["pixel_unlabelled"] = (args.pixel_unlabelled, pixel_level(z, theirs))
        if args.lambda_image:
            with torch.no_grad():
                z_teacher = full_logits(self.teachers[self.global_], mix, size)
            terms["image"] = (args.lambda_image, image_level(z, z_teacher))
        if args.lambda_region:
            with torch.no_grad(), self._teacher_tap:
                self.teachers[self.regional](mix)
                theirs = self._teacher_tap["A"]
            self._teacher_tap.clear()
            self._check_regions(features, theirs)
            terms["region"] = (args.lambda_region, region_level(features, theirs, args.regions))
        return terms

    def _check_regions(self, *maps: Tensor) -> None:
        for features in maps:
            if features.ndim != 4 or min(features.shape[-2:]) < self.args.regions:
                raise InputError(
                    f"method_args.regions = {self.args.regions}: a feature map is {tuple(features.shape)}; "
                    "pooling would repeat its cells, tap a larger map or take fewer regions"
                )


# ---------------------------------------------------------------- method


def distiller(config: Run) -> dict[str, Any]:
    """What the student is trained under."""
    if config.method_args.baseline == "cps":
        return {"type": "CPS", "start": config.method_args.cps_start}
    return {"type": "MGD", **config.method_args.model_dump()}


METHOD = segmentation_method("mgd", __doc__, MGDConfig, distiller)
