"""Generalizable Knowledge Distillation from Vision Foundation Models for Semantic Segmentation
(arXiv 2603.02554, 2026).

A foundation model is robust on domains it was never trained for; distilling it while learning the task on one domain
destroys that. Representation comes first and without labels, then the backbone is frozen and a head learns the task.
Student tokens after the final norm: class s_0 (d), patches P (N x d); teacher: t_0 (D), T (N x D). P~: patches of a
second pass with masked patch embeddings.

    QSD(P, T) = A V,   A = softmax(Q T^T),  Q = W_q LN(P) + b_q,  V = W_v LN'(P) + b_v        (no 1/sqrt(D), one head)
    L_token   = mean (QSD_tok(s_0, t_0) - t_0)^2                     one token: A = 1, W_q has no gradient
    L_fea     = mean ([QSD_tok(s_0, t_0); QSD_fea(P, T)] - [t_0; T])^2
    L_patch   = mean (QSD_patch(P~, T) - T)^2                        all patches, also of images without a mask
    L         = l_t L_token + l_f L_fea + l_p L_patch                stages of representation
    L_task    on the frozen backbone                                 stage of the task

Keys are the teacher's tokens, values are the student's own: the student's patches, gathered by what each is like in the
teacher, have to give the teacher's token. Heads are made anew in each stage; only the backbone goes on.

teacher: a frozen transformer of timm (`foundation`), or that in the segmentor `model.teachers.teacher`.
student: `model.student`, a segmentor on mmseg's TIMMBackbone. Ships: that segmentor, a stock mmseg checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_segmentation.engine.batch import SegBatch
from kd_segmentation.engine.tapped import task_terms
from kd_segmentation.engine.tokens import Tokens, draw_patch_masks, last_block, tokens_of, vit_of
from kd_segmentation.runs import Section, SegmentationRun, evaluate, predict, read_config
from kdcore.config import Config, MethodConfig, parse
from kdcore.distiller import Distiller, LossTerms
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import RunContext, Stage
from kdcore.taps import FeatureTap


class FoundationConfig(Config):
    name: str = Field(description="timm name, such as vit_base_patch14_dinov2.lvd142m")
    pretrained: bool = Field(True, description="weights from timm")
    checkpoint: str | None = Field(None, description="weights from a safetensors or .pth file of plain tensors")
    arguments: Section = Field(default_factory=dict, description="of timm.create_model: img_size, patch_size")


class RepresentationStage(Config):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="name of the stage and of its artefact")
    train_dataloader: Section = Field(description="images; labels are not read")
    train_cfg: Section = Field(description="the loop: type, max_iters")
    optim_wrapper: Section = Field(description="the optimiser")
    param_scheduler: list[Section] = Field(default_factory=list, description="learning-rate schedules")
    student: Section = Field(
        default_factory=dict, description="changes of the student's geometry: img_size, patch_size"
    )
    teacher: Section = Field(default_factory=dict, description="changes of the teacher's geometry")


class GKDConfig(MethodConfig):
    token: float = Field(1.0, ge=0, description="weight of the class token's loss, l_t")
    feature: float = Field(1.0, ge=0, description="weight of all tokens' loss, l_f")
    patch: float = Field(1.0, ge=0, description="weight of the masked pass's loss, l_p")
    mask_probability: float = Field(0.5, ge=0, le=1, description="share of a batch whose images are masked")
    mask_ratio: float = Field(0.5, ge=0, le=1, description="share of the patches that are masked in them")
    query: bool = Field(True, description="query-based soft distillation; False: each token's own projection (MSE)")
    freeze: bool = Field(True, description="freeze the backbone in the stage of the task; False: fine-tune it")
    joint: bool = Field(False, description="baseline: one stage, task and representation together, nothing frozen")
    foundation: FoundationConfig | None = Field(None, description="teacher from timm; None: model.teachers.teacher")
    representation: list[RepresentationStage] = Field(
        default_factory=list, description="stages of representation, in order"
    )

    def losses(self) -> dict[str, Any]:
        """The arguments of the distillers."""
        return self.model_dump(mode="python", exclude={"foundation", "representation"})


# ---------------------------------------------------------------- query-based soft distillation


def attention(queries: Tensor, keys: Tensor) -> Tensor:
    """softmax over the keys of Q T^T, (B, N, D) both -> (B, N, N), in at least float32."""
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (queries, keys))
        return (queries @ keys.transpose(-2, -1)).softmax(dim=-1)


def soft_retrieval(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(Q T^T) V without scaling, (B, N, D) all -> (B, N, D); the keys get no gradient."""
    with torch.autocast(queries.device.type, enabled=False):
        parts = [
            x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (queries, keys.detach(), values)
        ]
        return F.scaled_dot_product_attention(*parts, scale=1.0)


class QSD(nn.Module):
    """A head from student tokens (B, N, d) to teacher tokens (B, N, D); with `query=False` the values alone."""

    def __init__(self, student_dim: int, teacher_dim: int, *, query: bool = True):
        super().__init__()
        self.norm_v, self.v = nn.LayerNorm(student_dim), nn.Linear(student_dim, teacher_dim)
        self.norm_q = nn.LayerNorm(student_dim) if query else None
        self.q = nn.Linear(student_dim, teacher_dim) if query else None

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        values = self.v(self.norm_v(student))
        if self.norm_q is None or self.q is None:
            return values
        return soft_retrieval(self.q(self.norm_q(student)), teacher, values)


@torch.no_grad()
def attention_entropy(head: QSD, student: Tensor, teacher: Tensor) -> Tensor:
    """Mean entropy of the rows of A, in nats, of the first image: log N where queries ask for everything, 0 where each
    asks for one token. (B, N, d), (B, N, D) -> scalar; 0 for a head without queries."""
    if head.norm_q is None or head.q is None:
        return student.new_zeros(())
    weights = attention(head.q(head.norm_q(student[:1])), teacher[:1])
    return torch.special.entr(weights).sum(-1).mean()


def token_loss(retrieved: Tensor, target: Tensor) -> Tensor:
    """Mean squared error to tokens that get no gradient, scalar."""
    return F.mse_loss(retrieved.float() if retrieved.dtype == torch.bfloat16 else retrieved, target.detach())


# ---------------------------------------------------------------- distillers


class GKD(Distiller):
    """Representation: student and teacher transformers on images alone. Arguments as in GKDConfig.

    Raises InputError: a network is no transformer of timm, the grids of patches differ.
    """

    def __init__(self, student: nn.Module, teachers: Mapping[str, nn.Module], **arguments: Any):
        super().__init__()
        self.args = args = parse(GKDConfig, arguments, source="GKD")
        if "teacher" not in teachers:
            raise InputError(f"model.teachers: GKD needs 'teacher', got {', '.join(teachers) or 'none'}")
        self.student, self.teacher = student, teachers["teacher"]
        self._vit, self._teacher_vit = vit_of(student, "student"), vit_of(self.teacher, "teacher")
        dims = self._vit.embed_dim, self._teacher_vit.embed_dim
        self.heads = nn.ModuleDict({name: QSD(*dims, query=args.query) for name in ("token", "feature", "patch")})
        self.mask_token = nn.Parameter(torch.zeros(dims[0]))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def loss(self, batch: SegBatch, player: str = "student") -> LossTerms:
        args, images = self.args, batch.images
        theirs = self._teacher_tokens(images)
        ours = tokens_of(self._vit, images)
        same_grid(ours, theirs)
        t_0, s_0 = theirs.cls[:, None], ours.cls[:, None]
        token = self.heads["token"](s_0, t_0)
        patches = self.heads["feature"](ours.patches, theirs.patches)
        everything = torch.cat([t_0, theirs.patches], dim=1)
        terms = LossTerms(
            token=(args.token, token_loss(token, t_0)),
            feature=(args.feature, token_loss(torch.cat([token, patches], dim=1), everything)),
        )
        if args.patch:
            hidden = self._with_masked_patches(images, ours.patches)
            retrieved = self.heads["patch"](hidden, theirs.patches)
            terms["patch"] = (args.patch, token_loss(retrieved, theirs.patches))
        if args.query:  # logged, not trained on
            entropy = attention_entropy(self.heads["feature"], ours.patches, theirs.patches)
            terms["attention_entropy"] = (0.0, entropy)
        return terms

    def _with_masked_patches(self, images: Tensor, patches: Tensor) -> Tensor:
        """P~ (B, N, d): a second pass for the images that have masks; the others keep their `patches`."""
        probability, ratio = self.args.mask_probability, self.args.mask_ratio
        mask = draw_patch_masks(len(images), patches.shape[1], probability=probability, ratio=ratio)
        count = int(mask.any(dim=1).sum())  # they come first; counted on the CPU, so that no device waits
        if not count:
            return patches
        hidden = tokens_of(self._vit, images[:count], mask[:count].to(images.device), self.mask_token)
        return torch.cat([hidden.patches, patches[count:]])

    @torch.no_grad()
    def _teacher_tokens(self, images: Tensor) -> Tokens:
        return teacher_tokens(self.teacher, self._teacher_vit, images)


class JointGKD(Distiller):
    """The single-stage baseline: the segmentor's own losses and L_token + L_fea of its last block, nothing frozen."""

    def __init__(self, student: nn.Module, teachers: Mapping[str, nn.Module], **arguments: Any):
        super().__init__()
        self.args = args = parse(GKDConfig, arguments, source="GKD")
        if "teacher" not in teachers:
            raise InputError(f"model.teachers: GKD needs 'teacher', got {', '.join(teachers) or 'none'}")
        self.student, self.teacher = student, teachers["teacher"]
        self._vit, self._teacher_vit = vit_of(student, "student"), vit_of(self.teacher, "teacher")
        dims = self._vit.embed_dim, self._teacher_vit.embed_dim
        self.heads = nn.ModuleDict({name: QSD(*dims, query=args.query) for name in ("token", "feature")})
        self._tap = FeatureTap(self._vit, {"tokens": f"blocks.{len(self._vit.blocks) - 1}"})

    def loss(self, batch: SegBatch, player: str = "student") -> LossTerms:
        args = self.args
        with torch.no_grad():
            theirs = teacher_tokens(self.teacher, self._teacher_vit, batch.images)
        with self._tap:
            terms = task_terms(self.student.loss(batch.images, batch.samples))
            ours = last_block(self._vit, self._tap["tokens"])
        self._tap.clear()
        same_grid(ours, theirs)
        t_0 = theirs.cls[:, None]
        token = self.heads["token"](ours.cls[:, None], t_0)
        patches = self.heads["feature"](ours.patches, theirs.patches)
        everything = torch.cat([t_0, theirs.patches], dim=1)
        terms["token"] = (args.token, token_loss(token, t_0))
        terms["feature"] = (args.feature, token_loss(torch.cat([token, patches], dim=1), everything))
        return terms


def teacher_tokens(teacher: nn.Module, vit: nn.Module, images: Tensor) -> Tokens:
    """Tokens of the frozen transformer, behind the teacher's own normalisation where it has one."""
    prepare = getattr(teacher, "prepare", None)
    return tokens_of(vit, images if prepare is None else prepare(images))


def same_grid(ours: Tokens, theirs: Tokens) -> None:
    if ours.patches.shape[1] != theirs.patches.shape[1]:
        raise InputError(
            f"student has {ours.patches.shape[1]} patches, teacher {theirs.patches.shape[1]}: give both one patch size "
            "and image size (img_size, patch_size)"
        )


# ---------------------------------------------------------------- method


GKDRun = SegmentationRun[GKDConfig]


def stages(config: GKDRun, context: RunContext) -> list[Stage]:
    from kd_segmentation.integrations.representation import all_stages

    return all_stages(config)


METHOD = Method("gkd", __doc__ or "", GKDRun, stages, evaluate, predict, read=read_config)
