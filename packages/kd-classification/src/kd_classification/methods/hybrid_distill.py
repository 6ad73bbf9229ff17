"""Hybrid Distillation: Connecting Masked Autoencoders with Contrastive Learners (arXiv 2306.15876, 2023).

A supervised or contrastive vision transformer C tells classes apart, but its last layers all attend alike; one
pre-trained as a masked autoencoder, M, keeps them diverse. The student, of their depth, learns C's last features and
M's relations between tokens in the blocks before the last. Tokens that C finds redundant are dropped on the way.

With L blocks counted from 1, x^i the input of block i, Q^i and K^i its queries and keys (H heads of width d), S the
kept tokens, D the smooth L1 distance (0.5 e^2 below 1, |e| - 0.5 above), averaged over all entries:

    R^i = Q^i (K^i)^T / sqrt(d)                                  token relations, (H, |S|, |S|), before the softmax  (1)
    L_C = D( x_S^{L+1}, x_C^{L+1} )                              features after the last block, of the kept tokens   (2)
    L_M = sum over i in {L-1, L-2} of D( R_S^i, R_M^i )                                                              (3)
    L   = alpha L_C + beta L_M                                                                                       (4)
    s_j = max over k in S, k != j, of cos(z_j, z_k)              z: C's tokens before a masking block                (5)

Before blocks 1, 1 + L/3 and 1 + 2L/3 the share rho of the kept patches with the largest s (5) is dropped; ties by the
lower index, the class token never. Both teachers see the whole image; their rows and columns of S are compared.

There is no released code and not all of the paper's settings are confirmed: alpha = beta = 1, the last features and the
roles of the teachers are; the two relation blocks, smooth L1, the scale in (1), (5), rho and where tokens are dropped
are not. The numbers of the equations are this file's.

Both teachers: frozen, in eval mode, no gradient. All of the student trains, from random weights; it ships, as a timm
network to be fine-tuned. No label is read and no token is dropped after pre-training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_classification import pretraining
from kd_classification.data import Batch, load_data
from kd_classification.engine.attention_maps import attention_metrics
from kd_classification.engine.masked_vit import (
    check_blocks,
    check_same_grid,
    check_vit,
    embed,
    floor_share,
    gather_tokens,
    inner_vit,
    own_images,
    run_blocks,
)
from kd_classification.engine.param_groups import weight_decay_groups
from kd_classification.engine.probing import spread
from kd_classification.metrics import classification_metrics, predict, prefixed
from kd_classification.models import load_model
from kd_classification.pretraining import (
    Encoders,
    MaskedTeacherConfig,
    PretrainingRun,
    load_encoder,
    masked_teacher_stage,
    student_stages,
)
from kd_classification.runs import load_teacher, teacher_stage
from kdcore.config import MethodConfig
from kdcore.distiller import Distiller, LossTerms, Player, freeze
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, RunContext, Stage

Relation = Literal["logits", "attn_kl"]
Diversity = Literal["relations", "features"]


class HybridDistillConfig(MethodConfig):
    """Blocks are counted from 0 here, as timm does."""

    alpha: float = Field(1.0, ge=0, description="weight of the features of teacher C")
    beta: float = Field(1.0, ge=0, description="weight of the relations of teacher M")
    relation_blocks: list[int] | None = Field(
        None, min_length=1, description="blocks whose relations are compared; None: the two before the last"
    )
    relation: Relation = Field("logits", description="attention logits by smooth L1, or attention maps by KL")
    scaled: bool = Field(True, description="whether the logits are divided by sqrt(head width)")
    diversity: Diversity = Field("relations", description="features: M's last features instead, both behind a Linear")
    target_norm: bool = Field(False, description="LayerNorm without parameters on C's features")
    drop_ratio: float = Field(0.1, ge=0, lt=1, description="share rho of the patches dropped at each masking block")
    masking_blocks: list[int] | None = Field(
        None, description="blocks before which redundant patches are dropped; None: 0, L/3 and 2L/3"
    )


class HybridRun(PretrainingRun[HybridDistillConfig]):
    """`teacher` is C, trained on the labels where it has no weights; `masked_teacher` is M."""

    masked_teacher: MaskedTeacherConfig


# ---------------------------------------------------------------- losses


def relations(queries: Tensor, keys: Tensor, *, scaled: bool = True) -> Tensor:
    """Eq. (1): queries, keys (B, H, S, d) -> (B, H, S, S) attention logits, in float32 or better.

    >>> q, k = torch.tensor([[[[1.0, 0], [0, 2]]]]), torch.tensor([[[[1.0, 1], [0, 1]]]])
    >>> relations(q, k).round(decimals=4)[0, 0].tolist()
    [[0.7070999741554260, 0.0], [1.4141999483108521, 1.4141999483108521]]
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):  # autocast would take the product back to half precision
        logits = queries.to(dtype) @ keys.to(dtype).transpose(-2, -1)
    return logits * queries.shape[-1] ** -0.5 if scaled else logits


def relation_loss(student: Tensor, teacher: Tensor, relation: Relation = "logits") -> Tensor:
    """One summand of eq. (3): relations (B, H, S, S) of both -> scalar mean.

    attn_kl: KL of the teacher's attention over the kept tokens to the student's, mean over images, heads and queries;
    unlike the logits it does not see a constant that is added to all keys. InputError where the shapes differ: the
    networks' heads correspond one to one.
    """
    if student.shape != teacher.shape:
        raise InputError(f"student relations: shape {tuple(student.shape)}, the teacher's is {tuple(teacher.shape)}")
    if relation == "logits":
        return F.smooth_l1_loss(student, teacher.detach())
    log_p, log_q = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) / log_p[..., 0].numel()


def feature_loss(student: Tensor, teacher: Tensor, *, target_norm: bool = False) -> Tensor:
    """Eq. (2): features (B, S, D) of the kept tokens -> scalar mean, in float32 or better."""
    if student.shape != teacher.shape:
        raise InputError(f"student features: shape {tuple(student.shape)}, the teacher's is {tuple(teacher.shape)}")
    dtype = torch.promote_types(student.dtype, torch.float32)
    target = teacher.detach().to(dtype)
    if target_norm:
        target = F.layer_norm(target, target.shape[-1:])
    return F.smooth_l1_loss(student.to(dtype), target)


# ---------------------------------------------------------------- which patches are dropped


def redundancy(features: Tensor) -> Tensor:
    """Eq. (5): features (B, S, D) -> s (B, S), the cosine to the most similar other token.

    >>> z = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [-1, 0.2], [0.6, 0.8]]])
    >>> redundancy(z).round(decimals=4)[0].tolist()
    [0.9950000047683716, 0.9950000047683716, 0.800000011920929, 0.19609999656677246, 0.800000011920929]
    """
    unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    cosine = torch.maximum(cosine, cosine.transpose(1, 2))  # ties of mutual neighbours are exact
    return cosine.masked_fill(torch.eye(cosine.shape[1], dtype=torch.bool, device=cosine.device), -1).amax(-1)


def least_redundant(features: Tensor, dropped: int) -> Tensor:
    """features (B, S, D) -> indices (B, S - dropped), ascending, without the `dropped` most redundant tokens."""
    order = redundancy(features).argsort(dim=1, descending=True, stable=True)
    return order[:, dropped:].sort(dim=1).values


class Kept(NamedTuple):
    """steps: masking block -> patches kept before it, counted among those still there (see `run_blocks`).

    sets: masking block -> the same patches by their place in the image (B, S).
    """

    steps: dict[int, Tensor]
    sets: dict[int, Tensor]

    def at(self, block: int) -> Tensor | None:
        """Patches (B, S) that block `block` sees; None: all."""
        before = [index for index in self.sets if index <= block]
        return self.sets[max(before)] if before else None


def progressive_masking(features: dict[int, Tensor], ratio: float) -> Kept:
    """Drops floor(ratio * |S|) patches at every masking block, the scores anew each time among those still there.

    features: masking block -> patch tokens (B, L, D) of teacher C before it.
    """
    steps, sets = {}, {}
    current: Tensor | None = None
    for block in sorted(features):
        tokens = features[block] if current is None else gather_tokens(features[block], current)
        steps[block] = least_redundant(tokens, floor_share(ratio, tokens.shape[1]))
        current = steps[block] if current is None else current.gather(1, steps[block])
        sets[block] = current
    return Kept(steps, sets)


# ---------------------------------------------------------------- the method


class HybridDistill(Distiller):
    """Arguments as in `HybridDistillConfig`. Three timm VisionTransformers of one depth and one grid of patches."""

    def __init__(
        self,
        teacher: nn.Module,
        masked_teacher: nn.Module,
        student: nn.Module,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        relation_blocks: Sequence[int] | None = None,
        relation: Relation = "logits",
        scaled: bool = True,
        diversity: Diversity = "relations",
        target_norm: bool = False,
        drop_ratio: float = 0.1,
        masking_blocks: Sequence[int] | None = None,
    ):
        super().__init__()
        self.student, self.teacher, self.masked_teacher = student, freeze(teacher), freeze(masked_teacher)
        self.alpha, self.beta, self.relation, self.scaled = alpha, beta, relation, scaled
        self.diversity, self.target_norm, self.drop_ratio = diversity, target_norm, drop_ratio
        self.depth = check_networks(student, teacher, masked_teacher, relations=beta > 0 and diversity == "relations")
        self.relation_blocks = relation_blocks_of(self.depth, relation_blocks)
        self.masking_blocks = masking_blocks_of(self.depth, masking_blocks) if drop_ratio > 0 else []
        check_blocks(self.relation_blocks, student, "relation_blocks")
        check_blocks(self.masking_blocks, student, "masking_blocks")
        widths = [int(cast(Any, inner_vit(network)).embed_dim) for network in (student, teacher, masked_teacher)]
        two = diversity == "features"
        self.head = nn.Linear(widths[0], widths[1]) if two or widths[0] != widths[1] else nn.Identity()
        self.masked_head = nn.Linear(widths[0], widths[2]) if two else nn.Identity()

    def players(self) -> list[Player]:
        return [Player("student", self, param_groups=weight_decay_groups(self))]

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        features, kept = self.known_features(batch.images)
        by_relations = self.beta > 0 and self.diversity == "relations"
        compared = self.relation_blocks if by_relations else []
        last = self.alpha > 0 or self.diversity == "features"
        stop = self.depth if last else max(compared)
        tokens = embed(self.student, batch.images)
        seen = run_blocks(self.student, tokens, kept.steps, queries_keys=compared, blocks=stop)
        terms = LossTerms()
        if self.alpha > 0:
            own, target = self._common(self.head(seen.tokens), features, kept.at(self.depth), self.teacher)
            terms["feature"] = (self.alpha, feature_loss(own, target, target_norm=self.target_norm))
        if by_relations:
            terms["relation"] = (self.beta, self._relations(batch.images, seen.queries_keys, kept))
        elif self.beta > 0:
            known = self._masked_features(batch.images)
            own, target = self._common(self.masked_head(seen.tokens), known, kept.at(self.depth), self.masked_teacher)
            terms["masked_feature"] = (self.beta, feature_loss(own, target))
        return terms

    @torch.no_grad()
    def known_features(self, images: Tensor) -> tuple[Tensor, Kept]:
        """Teacher C on the whole image: tokens after the last block that is needed, and the patches that it keeps."""
        vit = cast(Any, inner_vit(self.teacher))
        stop = self.depth if self.alpha > 0 else max(self.masking_blocks, default=0)
        if stop == 0 and not self.masking_blocks:
            return images.new_zeros(0), Kept({}, {})
        tokens = embed(vit, own_images(self.teacher, images))
        seen = run_blocks(vit, tokens, features=[block - 1 for block in self.masking_blocks if block > 0], blocks=stop)
        before = {block: seen.features[block - 1] if block > 0 else tokens for block in self.masking_blocks}
        patches = {block: found[:, vit.num_prefix_tokens :] for block, found in before.items()}
        return seen.tokens, progressive_masking(patches, self.drop_ratio)

    @torch.no_grad()
    def _masked_features(self, images: Tensor) -> Tensor:
        vit = inner_vit(self.masked_teacher)
        return run_blocks(vit, embed(vit, own_images(self.masked_teacher, images))).tokens

    def _relations(self, images: Tensor, own: dict[int, tuple[Tensor, Tensor]], kept: Kept) -> Tensor:
        """Eq. (3), over the tokens that the student has at each of the blocks."""
        vit = inner_vit(self.masked_teacher)
        with torch.no_grad():
            tokens = embed(vit, own_images(self.masked_teacher, images))
            known = run_blocks(vit, tokens, queries_keys=own, blocks=max(own)).queries_keys
        total = images.new_zeros(())
        for block, student in own.items():
            pairs = [self._common(s, t, kept.at(block), self.masked_teacher) for s, t in zip(student, known[block])]
            (q_s, q_t), (k_s, k_t) = pairs
            target = relations(q_t, k_t, scaled=self.scaled)
            total = total + relation_loss(relations(q_s, k_s, scaled=self.scaled), target, self.relation)
        return total

    def _common(self, own: Tensor, known: Tensor, kept: Tensor | None, teacher: nn.Module) -> tuple[Tensor, Tensor]:
        """The tokens that both have: the class token where both know one, and the kept patches.

        own (..., T_s + S, d) of the student's kept tokens, known (..., T_t + L, d) of the whole image. Distillation
        and register tokens have no counterpart.
        """
        vits = [cast(Any, inner_vit(network)) for network in (self.student, teacher)]
        classes = int(all(vit.has_class_token for vit in vits))
        patches = known[..., vits[1].num_prefix_tokens :, :]
        if kept is not None:
            index = kept.view(len(kept), *[1] * (patches.ndim - 3), -1, 1)
            patches = patches.gather(-2, index.expand(*patches.shape[:-2], -1, patches.shape[-1]))
        student = torch.cat([own[..., :classes, :], own[..., vits[0].num_prefix_tokens :, :]], dim=-2)
        return student, torch.cat([known[..., :classes, :], patches], dim=-2)


def check_networks(student: nn.Module, teacher: nn.Module, masked_teacher: nn.Module, *, relations: bool = True) -> int:
    """The common depth L. InputError where depth, patches or, for relations, heads differ."""
    networks = {"student": student, "teacher": teacher, "masked_teacher": masked_teacher}
    vits = {field: cast(Any, inner_vit(network)) for field, network in networks.items()}
    for field, network in networks.items():
        check_vit(network, field, attention=relations and field != "teacher")
    check_same_grid(networks)
    depth = len(vits["student"].blocks)
    for field, vit in vits.items():
        if len(vit.blocks) != depth:
            raise InputError(
                f"{field}: {len(vit.blocks)} blocks, the student has {depth}; blocks are compared by index"
            )
    heads = [vits[field].blocks[0].attn.num_heads for field in ("student", "masked_teacher")] if relations else [0, 0]
    if heads[0] != heads[1]:
        raise InputError(
            f"masked_teacher: {heads[1]} heads, the student has {heads[0]}; relations are compared by head"
        )
    return depth


def relation_blocks_of(depth: int, blocks: Sequence[int] | None = None) -> list[int]:
    """The two blocks before the last, from 0, unless others are named."""
    return sorted(blocks) if blocks is not None else [block for block in (depth - 3, depth - 2) if block >= 0]


def masking_blocks_of(depth: int, blocks: Sequence[int] | None = None) -> list[int]:
    """Blocks 0, L/3 and 2L/3 unless others are named."""
    return sorted(set(blocks if blocks is not None else (0, depth // 3, 2 * depth // 3)))


# ---------------------------------------------------------------- stages and evaluation


def build(config: HybridRun, encoders: Encoders) -> HybridDistill:
    teachers = encoders.teachers
    args = config.method_args.model_dump()
    return HybridDistill(teachers["teacher"], teachers["masked_teacher"], encoders.student, **args)


def _teachers(config: HybridRun) -> dict[str, Any]:
    return {"teacher": config.teacher, "masked_teacher": config.masked_teacher}


def stages(config: HybridRun, context: RunContext) -> list[Stage]:
    data, teachers, args = load_data(config.data, config.seed), _teachers(config), config.method_args
    if args.alpha == 0 and args.beta == 0:
        raise InputError("method_args: alpha and beta are both 0; nothing is left to learn")
    networks = pretraining.check(config, data, teachers)
    build(config, Encoders({name: networks[name] for name in teachers}, networks["student"], data))
    first = [teacher_stage(config, data), masked_teacher_stage(config, data, name="masked_teacher")]
    return [*first, *student_stages(config, data, build, teachers)]


def evaluate(config: HybridRun, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics, C's accuracy where it was trained here, and how the relation blocks attend on test images.

    Of all three networks: nmi, attention_distance and distance_spread (see `attention_metrics`). student/nmi_gap: the
    distance between the student's nmi and M's.
    """
    data, teachers = load_data(config.data, config.seed), _teachers(config)
    result = pretraining.evaluate(config, artefacts, teachers, data)
    if config.teacher.train is not None:  # others may have no classifier for these classes
        classifier = load_teacher(config, data, artefacts["teacher"])
        result["teacher/accuracy"] = classification_metrics(*predict(classifier, data.test))["accuracy"]
    networks = {name: load_encoder(artefacts[name], data, model, field=name) for name, model in teachers.items()}
    networks["student"] = load_model(artefacts["student"], field="student")
    depth = len(cast(Any, networks["student"]).blocks)
    blocks = relation_blocks_of(depth, config.method_args.relation_blocks)
    for name, network in networks.items():
        result.update(prefixed(name, attention_metrics(network, spread(data.test), blocks)))
    result["student/nmi_gap"] = abs(result["student/nmi"] - result["masked_teacher/nmi"])
    return result


METHOD = Method("hybrid_distill", __doc__ or "", HybridRun, stages, evaluate, pretraining.predict)
