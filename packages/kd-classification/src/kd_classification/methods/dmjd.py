"""Disjoint Masking with Joint Distillation for Efficient Masked Image Modeling (arXiv 2301.00230, 2022).

DMJD. Masked image modelling learns from the hidden patches of a view alone. Here each image is seen in several views
whose hidden patches are chosen to cover it together, each view still with the same number of visible ones; and the
visible patches learn as well: the target of the hidden ones is predicted by a decoder, of the visible ones by a
projector on the encoder. L patches, corruption rate m (hidden share of a view), prediction rate q (share hidden in at
least one view), K = floor((1 - m) L) visible patches, V views, t the target features:

    view 1   hides L - K patches at random
    view v   hides e_v = floor(min(q - (v-1) m, m) L) patches that no view has hidden yet, the others at random
             from those that were                                                                                  (1)
    L_mask = sum over views and hidden patches of |y - t|^2 / D, divided by their number                             (2)
    L_vis  = mean over views and visible patches of huber(y' - t),  huber(e) = e^2 / 4 if |e| < 2, else |e| - 1      (3)
    L      = L_mask + theta L_vis                                                                                    (4)
    lr     = base rate * (unique images per step) * (q / m) / 256                                                    (5)

With m >= 1/2 and q = 1 two views are disjoint and hide every patch once. Masks are drawn patch by patch or in blocks of
2x2. Target: histograms of oriented gradients of the unnormalised image, whitened cell by cell (`hog_targets`), or the
whitened last features of a frozen network on the whole image. The release reads theta and q from its command line and
uses 1 for both; here they count. It draws the patches that view 2 takes from the two sets once a batch, here each image
has its own draw. (1) for v > 2 is this file's reading; the release has two views. The numbers of the equations are this
file's.

Everything of the student trains, positions are fixed sines. The encoder ships, as a timm network to be fine-tuned;
decoder, projector and predictor do not. The hybrid ConViT of the paper is not in timm and not included.
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
from kd_classification.engine.hog import hog_targets, whitened
from kd_classification.engine.mae import DecoderConfig, masked_mean
from kd_classification.engine.masked_vit import (
    Mask,
    MaskedDecoder,
    check_same_grid,
    embed,
    encode,
    final_norm,
    fix_positions,
    floor_share,
    gather_tokens,
    initialise_linear,
    inner_vit,
    mask_of,
    own_images,
    run_blocks,
    visible_count,
)
from kd_classification.engine.param_groups import weight_decay_groups
from kd_classification.engine.probing import Alignment, spread
from kd_classification.models import load_model
from kd_classification.pretraining import (
    Encoders,
    MaskedTeacherConfig,
    PretrainingRun,
    load_encoder,
    masked_teacher_stage,
    student_stages,
)
from kdcore.config import MethodConfig
from kdcore.data import seeded
from kdcore.distiller import Distiller, LossTerms, Player, freeze
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, RunContext, Stage

LossName = Literal["l2", "smooth_l1"]
Target = Literal["hog", "teacher"]
BLOCK = 2  # side of a block of patches that is hidden together
HUBER = 2.0


class DMJDConfig(MethodConfig):
    corruption: float = Field(0.6, gt=0, lt=1, description="share m of hidden patches in each view")
    prediction: float = Field(1.0, gt=0, le=1, description="share q of patches that some view hides")
    views: int = Field(2, ge=1, description="masked views of each image in a step")
    disjoint: bool = Field(True, description="choose the views together (eq. 1); false: each on its own")
    mask_type: Literal["block", "random"] = Field("block", description="hide 2x2 patches together, or single ones")
    target: Target = Field("hog", description="gradient histograms, or the last features of `teacher`")
    cells: int = Field(2, ge=1, description="hog: cells along each side of a patch")
    theta: float = Field(1.0, ge=0, description="weight of the visible patches")
    masked_loss: LossName = Field("l2", description="distance at hidden patches; smooth_l1 turns linear at 2")
    visible_loss: LossName = Field("smooth_l1", description="distance at visible patches")
    decoder: DecoderConfig = Field(default_factory=DecoderConfig, description="decoder, and width of the projector")

    @model_validator(mode="after")
    def _predicts_what_it_hides(self) -> DMJDConfig:
        if self.prediction < self.corruption:
            raise ValueError(
                f"prediction = {self.prediction}: below corruption = {self.corruption}, what one view hides"
            )
        return self


class DMJDRun(PretrainingRun[DMJDConfig]):
    """`teacher` gives the target where `method_args.target` says so; the gradient histograms need none."""

    teacher: MaskedTeacherConfig | None = None  # type: ignore[assignment]


# ---------------------------------------------------------------- masks


def newly_hidden(patches: int, corruption: float, prediction: float, view: int) -> int:
    """e_v of eq. (1) for view 2, 3, ...: patches that this view hides first.

    >>> [newly_hidden(196, m, q, 2) for m, q in ((0.6, 1.0), (0.75, 1.0), (0.6, 0.8), (0.4, 1.0))]
    [78, 49, 39, 78]
    """
    return floor_share(max(0.0, min(prediction - (view - 1) * corruption, corruption)), patches)


def disjoint_views(
    batch: int,
    patches: int,
    corruption: float,
    prediction: float = 1.0,
    *,
    views: int = 2,
    disjoint: bool = True,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Visible patches (B, K) of each view by eq. (1), drawn for each image; `disjoint=False`: all like view 1."""
    visible = visible_count(patches, corruption, field="corruption")
    fresh = torch.ones(batch, patches, dtype=torch.bool, device=device)  # what no view has hidden yet
    left, kept = patches, []
    for view in range(1, views + 1):
        hidden = patches - visible
        taken = (
            min(hidden, left) if view == 1 else min(newly_hidden(patches, corruption, prediction, view), left, hidden)
        )
        if not disjoint:
            fresh, left, taken = torch.ones_like(fresh), patches, hidden
        noise = torch.rand(batch, patches, device=device)
        order = (noise + ~fresh * 2.0).argsort(dim=1)  # the fresh ones first, each group at random
        old = left + hidden - taken  # end of the hidden ones among those that were hidden before
        kept.append(torch.cat([order[:, taken:left], order[:, old:]], dim=1))
        fresh = fresh.scatter(1, order[:, :taken], False)
        left -= taken
    return kept


def expand_blocks(keep: Tensor, grid: tuple[int, int], side: int = BLOCK) -> Tensor:
    """Kept blocks (B, K) of side x side patches -> kept patches (B, K * side^2); grid: (rows, columns) of patches."""
    columns = grid[1] // side
    corner = keep // columns * side * grid[1] + keep % columns * side
    steps = torch.arange(side, device=keep.device)
    offsets = (steps[:, None] * grid[1] + steps).flatten()
    return (corner.unsqueeze(-1) + offsets).flatten(1)


def scaled_learning_rate(base: float, images: int, corruption: float, prediction: float = 1.0) -> float:
    """Eq. (5): `images` is the number of different images in a step, over all processes.

    >>> round(scaled_learning_rate(6e-4, 512, 0.6), 6)
    0.002
    """
    return base * images * (prediction / corruption) / 256


# ---------------------------------------------------------------- losses


def distance(prediction: Tensor, target: Tensor, loss: LossName) -> Tensor:
    """Entry-wise squared difference, or Huber's with its bend at 2 (eq. 3), in float32 or better; same shape.

    >>> distance(torch.tensor([1.0, -3, 2, 0.5]), torch.zeros(4), "smooth_l1").tolist()
    [0.25, 2.0, 1.0, 0.0625]
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = prediction.to(dtype), target.detach().to(dtype).expand_as(prediction)
    if loss == "l2":
        return (prediction - target).square()
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=HUBER)


def masked_loss(prediction: Tensor, target: Tensor, hidden: Tensor, loss: LossName = "l2") -> Tensor:
    """Eq. (2): predictions (V, B, L, D) of all views, target (B, L, D), hidden (V, B, L) bool -> scalar."""
    per_patch = distance(prediction, target, loss).mean(-1)
    return masked_mean(per_patch.flatten(0, 1), hidden.flatten(0, 1))


def visible_loss(prediction: Tensor, target: Tensor, keep: Tensor, loss: LossName = "smooth_l1") -> Tensor:
    """Eq. (3): predictions (V, B, K, D) of the visible patches `keep` (V, B, K), target (B, L, D) -> scalar."""
    own = torch.stack([gather_tokens(target, view) for view in keep])
    return distance(prediction, own, loss).mean()


# ---------------------------------------------------------------- the method


def make_visible_branch(encoder_width: int, width: int, outputs: int) -> nn.Sequential:
    """The release's projector of three layers and its linear predictor: (..., D_S) -> (..., outputs)."""
    layers: list[nn.Module] = []
    for index, inputs in enumerate((encoder_width, width, width)):
        last = index == 2
        layers += [nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-6, elementwise_affine=not last)]
        layers += [] if last else [nn.GELU()]
    branch = nn.Sequential(*layers, nn.Linear(width, outputs))
    initialise_linear(branch)
    return branch


class DMJD(Distiller):
    """Arguments as in `DMJDConfig`. `mean` and `std` undo the images' normalisation for the gradient histograms."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        corruption: float = 0.6,
        prediction: float = 1.0,
        views: int = 2,
        disjoint: bool = True,
        mask_type: Literal["block", "random"] = "block",
        target: Target = "hog",
        cells: int = 2,
        theta: float = 1.0,
        masked_loss: LossName = "l2",
        visible_loss: LossName = "smooth_l1",
        decoder: DecoderConfig | None = None,
    ):
        super().__init__()
        vit = cast(Any, student)
        self.student = fix_positions(student)
        self.teacher = freeze(teacher) if teacher is not None and target == "teacher" else None
        self.grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)
        self.patch: int = vit.patch_embed.patch_size[0]
        self.corruption, self.prediction, self.views, self.disjoint = corruption, prediction, views, disjoint
        self.mask_type, self.target, self.cells, self.theta = mask_type, target, cells, theta
        self.masked_loss, self.visible_loss = masked_loss, visible_loss
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        outputs = self._check(vit)
        settings = decoder or DecoderConfig.model_validate({})
        self.decoder = MaskedDecoder(
            vit.embed_dim, self.grid, outputs, prefix=vit.num_prefix_tokens, **settings.model_dump()
        )
        self.visible = make_visible_branch(vit.embed_dim, settings.width, outputs)

    def _check(self, vit: Any) -> int:
        """Width of the target; InputError where masks, cells or the teacher do not fit."""
        if self.mask_type == "block" and (self.grid[0] % BLOCK or self.grid[1] % BLOCK):
            raise InputError(f"mask_type = 'block': {self.grid[0]}x{self.grid[1]} patches do not form 2x2 blocks")
        blocks = BLOCK**2 if self.mask_type == "block" else 1
        visible_count(self.grid[0] * self.grid[1] // blocks, self.corruption, field="corruption")
        if self.target == "teacher":
            if self.teacher is None:
                raise InputError("target = 'teacher': no teacher is given")
            check_same_grid({"student": vit, "teacher": self.teacher})
            return int(cast(Any, inner_vit(self.teacher)).embed_dim)
        if vit.patch_embed.patch_size[1] != self.patch:
            raise InputError("student: its patches are not square; gradient histograms are for square ones")
        if self.patch % self.cells:
            raise InputError(f"cells = {self.cells}: does not divide patches of {self.patch} pixels")
        return self.cells**2 * 9 * int(vit.in_chans)

    def players(self) -> list[Player]:
        return [Player("student", self, param_groups=weight_decay_groups(self))]

    def draw(self, images: Tensor) -> Mask:
        """keep (V, B, K) and hidden (V, B, L) of all views of a batch."""
        side = BLOCK if self.mask_type == "block" else 1
        rows, columns = self.grid
        views = disjoint_views(
            len(images),
            rows * columns // side**2,
            self.corruption,
            self.prediction,
            views=self.views,
            disjoint=self.disjoint,
            device=images.device,
        )
        masks = [mask_of(expand_blocks(keep, self.grid, side), rows * columns) for keep in views]
        return Mask(torch.stack([mask.keep for mask in masks]), torch.stack([mask.hidden for mask in masks]))

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """t (B, L, D): the same for every view."""
        if self.teacher is not None:
            vit = cast(Any, inner_vit(self.teacher))
            tokens = encode(vit, own_images(self.teacher, images)).tokens
            return whitened(final_norm(vit, tokens)[:, vit.num_prefix_tokens :])
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        pixels = (images * std + mean).mul(255).round().clamp(0, 255)
        return hog_targets(pixels, self.patch, cells=self.cells)

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        mask, target = self.draw(batch.images), self.targets(batch.images)
        tokens = embed(self.student, batch.images).repeat(self.views, 1, 1)  # patches are embedded once
        keep = mask.keep.flatten(0, 1)
        encoded = final_norm(self.student, run_blocks(self.student, tokens, keep).tokens)
        shape = mask.keep.shape[:2]
        hidden = masked_loss(self.decoder(encoded, keep).unflatten(0, shape), target, mask.hidden, self.masked_loss)
        terms = LossTerms(masked=(1.0, hidden))
        if self.theta > 0:
            prediction = self.visible(encoded[:, self.decoder.prefix :]).unflatten(0, shape)
            terms["visible"] = (self.theta, visible_loss(prediction, target, mask.keep, self.visible_loss))
        return terms


# ---------------------------------------------------------------- stages and evaluation


def build(config: DMJDRun, encoders: Encoders) -> DMJD:
    args = {name: getattr(config.method_args, name) for name in DMJDConfig.model_fields}
    data = encoders.data
    return DMJD(encoders.student, encoders.teachers.get("teacher"), mean=data.mean, std=data.std, **args)


def _teachers(config: DMJDRun) -> dict[str, MaskedTeacherConfig]:
    return {} if config.teacher is None else {"teacher": config.teacher}


def stages(config: DMJDRun, context: RunContext) -> list[Stage]:
    data, teachers = load_data(config.data, config.seed), _teachers(config)
    networks = pretraining.check(config, data, teachers)
    build(config, Encoders({name: networks[name] for name in teachers}, networks["student"], data))
    first = [masked_teacher_stage(config, data)] if teachers else []
    return [*first, *student_stages(config, data, build, teachers)]


def evaluate(config: DMJDRun, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics, and what the two ideas do.

    student/predicted_share: share of an image's patches that a step hides in some view. student/target_fit: how much of
    the target of held-out images a linear map of the encoder's patch tokens holds (see `Alignment`).
    """
    data, teachers = load_data(config.data, config.seed), _teachers(config)
    result = pretraining.evaluate(config, artefacts, teachers, data)
    student = load_model(artefacts["student"], field="student")
    known = {name: load_encoder(artefacts[name], data, model, field=name) for name, model in teachers.items()}
    distiller = build(config, Encoders(known, student, data)).eval()
    with seeded(0):
        hidden = distiller.draw(torch.zeros(1000, 1)).hidden
    result["student/predicted_share"] = float(hidden.any(0).double().mean())
    result["student/target_fit"] = target_fit(distiller, data)
    return result


@torch.no_grad()
def target_fit(distiller: DMJD, data: Data) -> float:
    """`Alignment` of the student's last patch tokens, of the whole image, with the targets."""
    fit, student = Alignment(), distiller.student
    for images, learning in ((data.train_plain, True), (data.test, False)):
        for batch in spread(images).loader(256):
            tokens = final_norm(student, encode(student, batch.images).tokens)
            own, target = tokens[:, distiller.decoder.prefix :], distiller.targets(batch.images)
            fit.fit(own, target) if learning else fit.measure(own, target)
    return fit.cosine()


METHOD = Method("dmjd", __doc__ or "", DMJDRun, stages, evaluate, pretraining.predict)
