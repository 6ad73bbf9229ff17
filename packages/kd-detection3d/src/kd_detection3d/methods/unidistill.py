"""UniDistill: A Universal Cross-Modality Knowledge Distillation Framework for 3D Object Detection in Bird's-Eye View
(arXiv 2303.15083, 2023).

Detectors of any sensors meet in the bird's-eye view (BEV): a low-level map F^low behind the sensors, a high-level map
F^high behind the BEV encoder, and the responses of a centre-based head. A frozen teacher of another modality guides a
camera or LiDAR student at all three, only where boxes are, and each box counts once whatever its size. The student's
architecture and cost do not change. S is the student, T the teacher, n = 1..N the true boxes of the batch.

    c_{n,i}, i = 1..9: corners, centre and edge middles of box n;  f_{n,i}: bilinear sample of a map there
    L_feat = 1/N sum_n 1/9 sum_i 1/C |f^low,S_{n,i} - f^low,T_{n,i}|_1                          crucial points
    R_n = U_n U_n^T in R^{9x9}, rows u_{n,i} = f^high_{n,i} / |f^high_{n,i}|_2
    L_rel = 1/N sum_n mean |R_n^S - R_n^T|                                                      relations
    G: a Gaussian around every box's centre;  p = sigmoid(h^S), q = sigmoid(h^T / 2), max over classes
    L_cls = sum G |max p - max q| / sum G,  L_reg = sum G mean |reg^S - reg^T| / sum G          responses
    L = L_det + w_f L_feat + w_r L_rel + w_o (L_cls + L_reg)

N and sum G get 1e-4 added. The released code reads features at transposed places (x and y swapped) and runs its teacher
with the statistics of the batch: `axis_order` and `teacher_norm` offer both. Its regression maps include an IoU branch,
which mmdet3d's CenterHead does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_detection3d.engine.batch import DetectionBatch, prepared, run_frozen, task_terms
from kd_detection3d.engine.bev import Area, background, centre_mask, key_points, sample
from kd_detection3d.engine.tapped import BEVTap, TapNames, mean_over_ranks
from kd_detection3d.runs import DetectionRun, detection_method
from kd_detection3d.runs import evaluate as base_evaluate
from kdcore.config import MethodConfig, parse
from kdcore.distiller import Distiller, LossTerms
from kdcore.errors import InputError
from kdcore.stages import Artefacts

EPS = 1e-4
# path: (w_f, w_r, w_o) and the clamp of probabilities, from the release's experiments
PATHS: dict[str, tuple[float, float, float, float]] = {
    "L2C": (100.0, 40.0, 10.0, 1e-4),
    "F2C": (10.0, 5.0, 10.0, 1e-3),
    "C2L": (10.0, 5.0, 1.0, 1e-4),
    "F2L": (10.0, 1.0, 10.0, 1e-4),
}
MODALITIES = {"L": "lidar", "C": "camera", "F": "fusion"}


class UniDistillConfig(MethodConfig):
    path: Literal["L2C", "F2C", "C2L", "F2L"] = Field(
        "L2C", description="teacher to student: L LiDAR, C camera, F both"
    )
    point_cloud_range: list[float] = Field(
        [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0], description="x0 y0 z0 x1 y1 z1 of the BEV maps, in metres"
    )
    feature: float | None = Field(None, ge=0, description="w_f, crucial points; None: the paper's for the path")
    relation: float | None = Field(None, ge=0, description="w_r, relations; None: the paper's for the path")
    response: float | None = Field(None, ge=0, description="w_o, responses; None: the paper's for the path")
    clamp: float | None = Field(
        None, gt=0, lt=0.5, description="bound of probabilities; None: the paper's for the path"
    )
    student_temperature: float = Field(1.0, gt=0, description="divides the student's class logits")
    teacher_temperature: float = Field(2.0, gt=0, description="divides the teacher's class logits")
    overlap: float = Field(0.7, gt=0, lt=1, description="overlap that the Gaussian's radius keeps")
    axis_order: Literal["xy", "release"] = Field("xy", description="release: features of transposed places")
    teacher_norm: Literal["eval", "batch"] = Field("eval", description="batch: batch norm of the teacher by the batch")
    student_taps: TapNames | None = Field(None, description="modules for low, high and head; None: by the modality")
    teacher_taps: TapNames | None = Field(None, description="modules for low, high and head; None: by the modality")
    low_channels: tuple[int, int] | None = Field(None, description="student's, teacher's: a 1x1 conv joins them")
    high_channels: tuple[int, int] | None = Field(None, description="student's, teacher's: a 1x1 conv joins them")
    whole_map: float = Field(0.0, ge=0, description="weight of the MSE of whole low maps: a baseline, not the paper's")
    task: float = Field(1.0, ge=0, description="weight of the student's own losses")

    @model_validator(mode="after")
    def _covers_an_area(self) -> UniDistillConfig:
        limits = self.point_cloud_range
        if len(limits) != 6 or any(limits[i] >= limits[i + 3] for i in range(3)):
            raise ValueError("point_cloud_range: expected x0 y0 z0 x1 y1 z1 with x0 < x1, y0 < y1, z0 < z1")
        return self

    def weights(self) -> tuple[float, float, float]:
        """(w_f, w_r, w_o)."""
        given = (self.feature, self.relation, self.response)
        feature, relation, response = (p if g is None else g for g, p in zip(given, PATHS[self.path]))
        return feature, relation, response


# ---------------------------------------------------------------- losses


def crucial_point_loss(student: Tensor, teacher: Tensor, boxes: Tensor | float | None = None) -> Tensor:
    """L_feat of features at the key points of all boxes, (N, 9, C) each -> scalar.

    boxes: N of the denominator where it is not this batch's own, such as the mean over ranks.
    """
    count = len(student) if boxes is None else boxes
    return (student - teacher).abs().mean((1, 2)).sum() / (count + EPS)


def relations(features: Tensor) -> Tensor:
    """R_n: cosines between the features of a box's points, (N, 9, C) -> (N, 9, 9)."""
    unit = features / (torch.linalg.vector_norm(features, dim=-1, keepdim=True) + EPS)
    return unit @ unit.transpose(1, 2)


def relation_loss(student: Tensor, teacher: Tensor, boxes: Tensor | float | None = None) -> Tensor:
    """L_rel of features at the key points of all boxes, (N, 9, C) each, channels may differ -> scalar."""
    count = len(student) if boxes is None else boxes
    return (relations(student) - relations(teacher)).abs().mean((1, 2)).sum() / (count + EPS)


def class_response_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    temperatures: tuple[float, float] = (1.0, 2.0),
    clamp: float = EPS,
    total: Tensor | float | None = None,
) -> Tensor:
    """L_cls of class logits (B, K, H, W) under a mask (B, H, W) -> scalar. total: sum of G where it is over ranks.

    The maximum is taken in each network, so its class may differ.
    """
    scores = [
        torch.sigmoid(logits / temperature).clamp(clamp, 1 - clamp).amax(1)
        for logits, temperature in zip((student, teacher), temperatures)
    ]
    return (mask * (scores[0] - scores[1]).abs()).sum() / ((mask.sum() if total is None else total) + EPS)


def regression_response_loss(
    student: Tensor, teacher: Tensor, mask: Tensor, *, total: Tensor | float | None = None
) -> Tensor:
    """L_reg of the raw regression maps of all tasks (B, M, H, W) under a mask (B, H, W) -> scalar."""
    return (mask * (student - teacher).abs().mean(1)).sum() / ((mask.sum() if total is None else total) + EPS)


# ---------------------------------------------------------------- the distiller


class UniDistill(Distiller):
    """A camera or LiDAR student of mmdet3d beside a frozen teacher of another modality.

    student, teachers["teacher"]: detectors (see `engine.batch`); further arguments are those of UniDistillConfig.
    Raises InputError: no teacher, a tap that does not exist, maps or heads that do not fit.
    """

    def __init__(self, student: nn.Module, teachers: Mapping[str, nn.Module], **arguments: Any):
        super().__init__()
        self.config = parse(UniDistillConfig, arguments, source="model.distiller")
        if len(teachers) != 1:
            raise InputError(f"model.teachers: UniDistill has one teacher, got {len(teachers)}")
        self.student = student
        self.teachers = teachers if isinstance(teachers, nn.ModuleDict) else nn.ModuleDict(dict(teachers))
        self.area = Area.of_range(self.config.point_cloud_range)
        names = [
            given or TapNames.of(MODALITIES[letter])
            for given, letter in zip((self.config.student_taps, self.config.teacher_taps), self.config.path[::-2])
        ]
        self._taps = (
            BEVTap(student, names[0], "method_args.student_taps"),
            BEVTap(self.teacher, names[1], "method_args.teacher_taps"),
        )
        self.connectors = nn.ModuleDict()
        for name in ("low", "high"):
            channels = getattr(self.config, f"{name}_channels")
            if channels is not None:
                self.connectors[name] = nn.Conv2d(*channels, kernel_size=1)

    @property
    def teacher(self) -> nn.Module:
        return next(iter(self.teachers.values()))

    @property
    def watches(self) -> bool:
        """Whether any term needs the teacher."""
        return any(self.config.weights()) or self.config.whole_map > 0

    def loss(self, batch: DetectionBatch, player: str = "student") -> LossTerms:
        terms = LossTerms()
        own, theirs = self._taps
        with own if self.watches else nullcontext(), theirs if self.watches else nullcontext():
            losses = self.student.loss(*prepared(self.student, batch, training=self.training))
            for name, value in task_terms(losses).items():
                terms[name] = (self.config.task, value)
            if self.watches:
                with batch_statistics(self.teacher) if self.config.teacher_norm == "batch" else nullcontext():
                    run_frozen(self.teacher, batch)
                terms.update(self._distilled(batch.boxes()))
                own.clear()
                theirs.clear()
        return terms

    def _distilled(self, boxes: Sequence[Tensor]) -> LossTerms:
        own, theirs, config = *self._taps, self.config
        terms, (feature, relation, response) = LossTerms(), config.weights()
        points = [key_points(item) for item in boxes]
        count = mean_over_ranks(own.low.new_tensor(float(sum(map(len, boxes)))))
        if feature:
            terms["feature"] = (feature, crucial_point_loss(*self._sampled("low", points), count))
        if relation:
            terms["relation"] = (relation, relation_loss(*self._sampled("high", points), count))
        if config.whole_map:
            terms["whole_map"] = (config.whole_map, (self._joined("low") - theirs.low).square().mean())
        if response:
            own.check_head_fits(theirs)
            mask = centre_mask(boxes, self.area, *own.classes.shape[-2:], overlap=config.overlap)
            total = mean_over_ranks(mask.sum())
            temperatures = (config.student_temperature, config.teacher_temperature)
            clamp = PATHS[config.path][3] if config.clamp is None else config.clamp
            classes = class_response_loss(
                own.classes, theirs.classes, mask, temperatures=temperatures, clamp=clamp, total=total
            )
            terms["class_response"] = (response, classes)
            boxes_of_head = regression_response_loss(own.regression, theirs.regression, mask, total=total)
            terms["box_response"] = (response, boxes_of_head)
        return terms

    def _sampled(self, level: str, points: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        swapped = self.config.axis_order == "release"
        student = sample(self._joined(level), points, self.area, swapped=swapped)
        teacher = sample(getattr(self._taps[1], level), points, self.area, swapped=swapped)
        return student, teacher

    def _joined(self, level: str) -> Tensor:
        """The student's map with the teacher's number of channels."""
        own, theirs = (getattr(tap, level) for tap in self._taps)
        found = self.connectors[level](own) if level in self.connectors else own
        if found.shape[1] != theirs.shape[1]:
            raise InputError(
                f"method_args.{level}_channels: the student's map has {own.shape[1]} channels, the teacher's "
                f"{theirs.shape[1]}; give {level}_channels = ({own.shape[1]}, {theirs.shape[1]})"
            )
        return found


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, batch norms of a frozen network use the batch's statistics; their running averages stay as they are."""
    norms = [item for item in network.modules() if isinstance(item, nn.modules.batchnorm._BatchNorm)]
    kept = [(item, item.momentum, item.num_batches_tracked) for item in norms]
    for item in norms:
        item.training, item.momentum, item.num_batches_tracked = True, 0.0, None
    try:
        yield
    finally:
        for item, momentum, seen in kept:
            item.training, item.momentum, item.num_batches_tracked = False, momentum, seen


# ---------------------------------------------------------------- evaluation

FRAMES = 50  # of the test data, in which the gaps are measured


def evaluate(config: DetectionRun[UniDistillConfig], artefacts: Artefacts) -> dict[str, Any]:
    """AP and errors as `runs.evaluate`, and what distillation did to the student's maps on test frames.

    foreground_gap: mean |F^low,S - F^low,T| at the nine points of a box, mean over boxes; background_gap: in cells that
    no box comes near; relation_gap: mean |R^S - R^T|. The maps of arms that do not match features are not in the
    teacher's units, but they are measured all the same. clutter_detections: boxes of a score of at least 0.3 a frame
    on painted patches (rendered scenes), more than 2 m from every true box.
    """
    from kd_detection3d.integrations import evaluation

    result = base_evaluate(config, artefacts)
    networks = evaluation.open_networks(artefacts)
    section = config.test_dataloader["dataset"]
    limits = config.method_args.point_cloud_range
    result.update(evaluation.clutter(networks["student"], config, section, limits, FRAMES))
    args = config.method_args
    if args.low_channels is None and args.high_channels is None and "teacher" in networks:
        distiller = UniDistill(networks["student"], {"teacher": networks["teacher"]}, **args.model_dump())
        frames = evaluation.annotated_frames(config, section, FRAMES)
        result.update(gaps(distiller.eval(), frames))
    return result


@torch.no_grad()
def gaps(distiller: UniDistill, frames: Iterable[tuple[DetectionBatch, Sequence[Tensor]]]) -> dict[str, float]:
    """The three gaps over batches with their true boxes, (N, 5) a frame."""
    own, theirs = distiller._taps
    sums = dict.fromkeys(("foreground", "relation", "background"), 0.0)
    count, cells = 0, 0
    for batch, boxes in frames:
        with own, theirs:
            run_frozen(distiller.student, batch)
            run_frozen(distiller.teacher, batch)
        boxes = [item.to(own.low.device) for item in boxes]
        points = [key_points(item) for item in boxes]
        low, high = distiller._sampled("low", points), distiller._sampled("high", points)
        sums["foreground"] += float((low[0] - low[1]).abs().mean((1, 2)).sum())
        sums["relation"] += float((relations(high[0]) - relations(high[1])).abs().mean((1, 2)).sum())
        count += len(low[0])
        if own.low.shape == theirs.low.shape:
            far = background(boxes, distiller.area, *own.low.shape[-2:])
            sums["background"] += float(((own.low - theirs.low).abs().mean(1) * far).sum())
            cells += int(far.sum())
    counts = {"foreground": count, "relation": count, "background": cells}
    return {f"{name}_gap": sums[name] / counts[name] for name in sums if counts[name]}


METHOD = detection_method("unidistill", __doc__, UniDistillConfig, "UniDistill", evaluation=evaluate)
