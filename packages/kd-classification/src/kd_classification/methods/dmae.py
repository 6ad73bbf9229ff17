"""Masked Autoencoders Enable Efficient Knowledge Distillers (arXiv 2208.12256, 2022).

DMAE. A large encoder that was pre-trained as a masked autoencoder, and not fine-tuned, teaches a small one while that
is itself pre-trained as one. Both see the same few patches, so the teacher costs little, and it is run only up to the
block that is imitated. L patches, K = floor(L (1 - r)) of them visible, the same for both; m_bl = 1 where a patch is
hidden; y the decoder's prediction and t the P pixels of a patch; F the residual stream after a block, class token
included, before any norm; W and b the projector; u(v) = v / max(||v||_2, 1e-12) over the features:

    L_pixel = sum_bl m_bl (1/P) sum_p (y_blp - t_blp)^2 / sum_bl m_bl                                               (1)
    L_align = mean over images, tokens and features of | u(W F_S + b) - u(F_T) |                                    (2)
    L       = L_pixel + alpha sum over pairs of blocks of L_align                                                   (3)

The pair is at 3/4 of both depths: student block 8 of 12, teacher block 17 of 24, counted from 0. (2) is a mean, of size
1 / sqrt(D_T): alpha = 1 goes with that. `distance: l2` squares the difference. Without a projector (equal widths) the
release compares the features as they are, not their directions. The numbers of the equations are this file's.

Teacher: frozen, in eval mode, no gradient. Student: encoder, decoder and projectors train; positions are fixed sines.
The encoder ships, as a timm network to be fine-tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_classification import pretraining
from kd_classification.data import Batch, Data, load_data
from kd_classification.engine.mae import DecoderConfig, MaskedAutoencoder
from kd_classification.engine.masked_vit import (
    Mask,
    block_at,
    check_blocks,
    check_same_grid,
    draw_mask,
    encode,
    inner_vit,
    own_images,
    visible_count,
)
from kd_classification.engine.probing import Alignment, spread
from kd_classification.models import load_model
from kd_classification.pretraining import Encoders, MaskedRun, load_encoder, masked_teacher_stage, student_stages
from kdcore.config import MethodConfig
from kdcore.data import seeded
from kdcore.distiller import LossTerms, freeze
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, RunContext, Stage

Distance = Literal["l1", "l2"]
Projector = Literal["linear", "mlp", "none"]
DEPTH = 0.75  # where the aligned blocks are by default, as a share of the depth


class DMAEConfig(MethodConfig):
    mask_ratio: float = Field(0.75, ge=0, lt=1, description="share r of hidden patches")
    alpha: float = Field(1.0, ge=0, description="weight of the alignment; 0 is a masked autoencoder without a teacher")
    student_blocks: list[int] | None = Field(None, description="aligned student blocks, from 0; None: 3/4 of the depth")
    teacher_blocks: list[int] | None = Field(None, description="their partners in the teacher; None: 3/4 of the depth")
    distance: Distance = Field("l1", description="mean absolute or mean squared difference of the directions")
    projector: Projector = Field("linear", description="student to teacher width; none compares the raw features")
    norm_pix: bool = Field(False, description="pixel targets normalised patch by patch")
    decoder: DecoderConfig = Field(default_factory=DecoderConfig, description="the student's decoder")

    @model_validator(mode="after")
    def _blocks_are_pairs(self) -> DMAEConfig:
        counts = [len(blocks or [0]) for blocks in (self.student_blocks, self.teacher_blocks)]
        if counts[0] != counts[1] or self.student_blocks == [] or self.teacher_blocks == []:
            raise ValueError(f"student_blocks and teacher_blocks are pairs: {counts[0]} and {counts[1]} are given")
        return self


Run = MaskedRun[DMAEConfig]


# ---------------------------------------------------------------- losses


def alignment_loss(projected: Tensor, teacher: Tensor, distance: Distance = "l1", *, normalise: bool = True) -> Tensor:
    """Eq. (2): mean distance of the directions of projected student and teacher features (B, N, D) -> scalar.

    Neither side's length counts. `normalise=False` compares the features as they are. In float32 or better.
    InputError where the shapes differ.

    >>> student, teacher = torch.tensor([[[0.0, 0, 5, 12]]]), torch.tensor([[[3.0, 4, 0, 0]]])
    >>> round(alignment_loss(student, teacher).item(), 6)  # 44 / 65
    0.676923
    """
    if projected.shape != teacher.shape:
        raise InputError(f"projected: shape {tuple(projected.shape)}, the teacher's is {tuple(teacher.shape)}")
    dtype = torch.promote_types(projected.dtype, torch.float32)
    s, t = projected.to(dtype), teacher.detach().to(dtype)
    if normalise:
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    return F.l1_loss(s, t) if distance == "l1" else F.mse_loss(s, t)


def make_projector(kind: Projector, student_width: int, teacher_width: int) -> nn.Module:
    """Student features (..., D_S) -> (..., D_T). InputError where `none` meets two widths."""
    if kind == "linear":
        return nn.Linear(student_width, teacher_width)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(student_width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width)
        )
    if student_width != teacher_width:
        raise InputError(f"projector = 'none': the widths differ, {student_width} and {teacher_width}")
    return nn.Identity()


# ---------------------------------------------------------------- the method


class DMAE(MaskedAutoencoder):
    """Arguments as in `DMAEConfig`. Teacher and student are timm VisionTransformers with the same grid of patches."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        mask_ratio: float = 0.75,
        alpha: float = 1.0,
        student_blocks: Sequence[int] | None = None,
        teacher_blocks: Sequence[int] | None = None,
        distance: Distance = "l1",
        projector: Projector = "linear",
        norm_pix: bool = False,
        decoder: DecoderConfig | None = None,
    ):
        super().__init__(student, mask_ratio=mask_ratio, norm_pix=norm_pix, decoder=decoder)
        self.teacher = freeze(teacher)
        self.alpha, self.distance, self.normalise = alpha, distance, projector != "none"
        self.pairs = aligned_pairs(teacher, student, student_blocks, teacher_blocks)
        widths = [int(cast(Any, inner_vit(network)).embed_dim) for network in (student, teacher)]
        self.projectors = nn.ModuleList([make_projector(projector, *widths) for _ in self.pairs])

    @torch.no_grad()
    def teacher_features(self, images: Tensor, mask: Mask) -> list[Tensor]:
        """F_T of every pair, (B, T + K, D_T); the teacher's blocks above the last of them do not run."""
        return partial_features(self.teacher, images, mask.keep, [pair[1] for pair in self.pairs])

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        mask = self.draw(batch.images)
        pixel, seen = self.reconstruction(batch.images, mask, [pair[0] for pair in self.pairs])
        terms = LossTerms(pixel=(1.0, pixel))
        if self.alpha == 0:
            return terms
        known = self.teacher_features(batch.images, mask)
        for (block, _), projector, target in zip(self.pairs, self.projectors, known, strict=True):
            align = alignment_loss(projector(seen.features[block]), target, self.distance, normalise=self.normalise)
            terms[f"align_{block}"] = (self.alpha, align)
        return terms


def aligned_pairs(
    teacher: nn.Module,
    student: nn.Module,
    student_blocks: Sequence[int] | None = None,
    teacher_blocks: Sequence[int] | None = None,
) -> list[tuple[int, int]]:
    """(student block, teacher block) from 0; by default one pair at 3/4 of both depths."""
    chosen = []
    for field, network, blocks in (("student", student, student_blocks), ("teacher", teacher, teacher_blocks)):
        vit = cast(Any, inner_vit(network))
        chosen.append(list(blocks) if blocks is not None else [block_at(DEPTH, len(vit.blocks))])
        check_blocks(chosen[-1], network, f"{field}_blocks")
    prefixes = [cast(Any, inner_vit(network)).num_prefix_tokens for network in (student, teacher)]
    if prefixes[0] != prefixes[1]:
        raise InputError(f"teacher: {prefixes[1]} prefix tokens, the student has {prefixes[0]}; they are aligned too")
    check_same_grid({"student": student, "teacher": teacher})
    return list(zip(*chosen, strict=True))


def partial_features(network: nn.Module, images: Tensor, keep: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Residual stream (B, T + K, D) after each of `blocks`, from a pass that ends with the last of them."""
    vit = inner_vit(network)
    seen = encode(vit, own_images(network, images), keep, features=blocks, blocks=max(blocks) + 1)
    return [seen.features[block] for block in blocks]


# ---------------------------------------------------------------- stages and evaluation


def build(config: Run, encoders: Encoders) -> DMAE:
    args = {name: getattr(config.method_args, name) for name in DMAEConfig.model_fields}
    return DMAE(encoders.teachers["teacher"], encoders.student, **args)


def stages(config: Run, context: RunContext) -> list[Stage]:
    data, teachers = load_data(config.data, config.seed), {"teacher": config.teacher}
    networks = pretraining.check(config, data, teachers)
    build(config, Encoders({"teacher": networks["teacher"]}, networks["student"], data))
    visible_count(cast(Any, networks["student"]).patch_embed.num_patches, config.method_args.mask_ratio)
    return [masked_teacher_stage(config, data), *student_stages(config, data, build, teachers)]


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics, and how much of the teacher the student's aligned block holds (see `Alignment`).

    student/alignment: on held-out images with hidden patches. teacher/relative_cost: tokens x blocks of the teacher in
    training, as a share of all tokens through all blocks.
    """
    data = load_data(config.data, config.seed)
    result = pretraining.evaluate(config, artefacts, {"teacher": config.teacher}, data)
    teacher = load_encoder(artefacts["teacher"], data, config.teacher, field="teacher")
    student = load_model(artefacts["student"], field="student")
    args = config.method_args
    pairs = aligned_pairs(teacher, student, args.student_blocks, args.teacher_blocks)
    vit = cast(Any, inner_vit(teacher))
    patches, prefix = vit.patch_embed.num_patches, vit.num_prefix_tokens
    tokens = (prefix + visible_count(patches, args.mask_ratio)) / (prefix + patches)
    result["teacher/relative_cost"] = tokens * (max(pair[1] for pair in pairs) + 1) / len(vit.blocks)
    result["student/alignment"] = alignment(student, teacher, data, pairs, args.mask_ratio)
    return result


@torch.no_grad()
def alignment(
    student: nn.Module, teacher: nn.Module, data: Data, pairs: Sequence[tuple[int, int]], ratio: float
) -> float:
    """Mean over the pairs of `Alignment`, fitted on training images and measured on test images."""
    fits = [Alignment() for _ in pairs]
    student.eval(), teacher.eval()
    patches = cast(Any, student).patch_embed.num_patches
    with seeded(0):  # the masks
        for images, learning in ((data.train_plain, True), (data.test, False)):
            for batch in spread(images).loader(256):
                keep = draw_mask(len(batch.images), patches, ratio).keep
                own = partial_features(student, batch.images, keep, [pair[0] for pair in pairs])
                known = partial_features(teacher, batch.images, keep, [pair[1] for pair in pairs])
                for fit, source, target in zip(fits, own, known, strict=True):
                    fit.fit(source, target) if learning else fit.measure(source, target)
    return sum(fit.cosine() for fit in fits) / len(fits)


METHOD = Method("dmae", __doc__ or "", Run, stages, evaluate, pretraining.predict)
