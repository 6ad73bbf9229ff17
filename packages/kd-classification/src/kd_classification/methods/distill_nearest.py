"""Distilling from Similar Tasks for Transfer Learning on a Budget (arXiv 2304.12314, 2023).

Few labels of a target task, many images without, a small network, and a shelf of source networks that were trained on
other tasks, with other classes. Each source s is scored for the target by how its features of the labelled images go
with their labels (PARC, `kd_classification.engine.similarity`), e_s. The small network phi then learns the labels
through its head h, and through one more linear head g_s a source what that source says of the unlabelled images, in the
source's own classes:

    L_sup = mean CE(h(phi(x)), y) over labelled images
    L_s   = mean -sum_c q_s(x)_c log softmax(g_s(phi(x)))_c over unlabelled images,   q_s = softmax(h_s(phi_s(x)) / T)

    DistillNearest    L = lambda L_sup + (1 - lambda) L_{s*},   s* = argmax_s e_s
    DistillWeighted   L = lambda L_sup + (1 - lambda) sum_s a_s L_s,   a_s = max(0, e_s)^p / sum_r max(0, e_r)^p

p = 0 counts all sources alike, those with negative scores too; a large p is DistillNearest. Sources frozen, in eval
mode; no image of theirs is needed. Labelled and unlabelled images go through phi in one pass, so that batch-norm
statistics are those of both. phi and h ship, the heads g_s do not.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_classification import metrics as m
from kd_classification import runs
from kd_classification.data import Data, DataConfig, Images, load_data
from kd_classification.engine.few_labels import (
    Change,
    Pair,
    Pairs,
    Parts,
    changed,
    collate_pairs,
    plain,
    split_target,
)
from kd_classification.engine.similarity import rsa, similarity_scores
from kd_classification.models import (
    ModelConfig,
    adapted,
    create_model,
    feature_width,
    load_model,
    penultimate,
    save_model,
)
from kd_classification.runs import TeacherConfig
from kd_classification.sources import expanded
from kdcore.config import MethodConfig, MethodRunConfig
from kdcore.data import seeded_loader
from kdcore.distiller import Distiller, LossTerms, freeze
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage, write_atomically
from kdcore.training import TrainSetup, TrainStage

Score = Literal["parc", "cka", "rsa", "h_score", "knn", "leep", "nce"]


class DistillNearestConfig(MethodConfig):
    select: Literal["nearest", "weighted", "farthest"] | list[str] = Field(
        "nearest", description="sources: the best scored, all weighted by score, (control) the worst, or those named"
    )
    score: Score = Field("parc", description="similarity of a source to the target task; rsa needs `reference`")
    components: int | None = Field(
        None, ge=2, description="principal components of the features that PARC sees, 32 in its library; None: all"
    )
    power: float = Field(9.0, ge=0, description="p of the weights a_s; 0 counts all sources alike")
    supervised: float = Field(0.8, ge=0, le=1, description="lambda, weight of the labels; 1 is training on them alone")
    temperature: float = Field(1.0, gt=0, description="T of the sources' probabilities")
    distill_on: Literal["unlabelled", "all"] = Field("unlabelled", description="images that the sources teach on")
    least_weight: float = Field(1e-3, ge=0, lt=1, description="sources with a smaller a_s are left out")


class SourceConfig(TeacherConfig):
    """A source network: weights from timm or a saved folder; or trained on the spot, on what the split leaves over of
    the data, for a task made from it."""

    label: str = Field(description="its name in scores and weights", pattern=r"^[A-Za-z0-9_-]+$")
    num_classes: int | None = Field(None, ge=1, description="its classes; None is that of a saved folder, or of timm")
    classes: list[list[int]] | None = Field(
        None, description="trained on the spot: groups of the data's classes that are its classes; None: one each"
    )
    change: Change = Field("none", description="trained on the spot: what is done to its images, or to its labels")


class DistillNearestRun(MethodRunConfig[DistillNearestConfig]):
    """Sources, the target network, and the target's data, part of which keeps its labels."""

    sources: list[SourceConfig] = Field(min_length=1, description="networks trained on other tasks")
    reference: TeacherConfig | None = Field(
        None, description="network of the target that score rsa compares with; its `train` is on the labelled images"
    )
    student: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    labelled: float = Field(
        0.2, gt=0, description="share of each class's training images with labels; from 1 on: number"
    )
    unlabelled: int | None = Field(None, ge=1, description="images without labels; None: all others")
    method_args: DistillNearestConfig = Field(default_factory=lambda: DistillNearestConfig.model_validate({}))


# ---------------------------------------------------------------- weights and losses


def source_weights(scores: Mapping[str, float], power: float) -> dict[str, float]:
    """a_s = max(0, e_s)^p / sum_r max(0, e_r)^p; p = 0 is uniform over all, and so, with a warning, are scores without
    a positive one.

    >>> source_weights({"cars": 0.4, "birds": 0.1, "noise": -0.2, "dogs": 0.3}, 1.0)
    {'cars': 0.5, 'birds': 0.125, 'noise': 0.0, 'dogs': 0.375}
    """
    e = torch.tensor(list(scores.values()), dtype=torch.float64).clamp_min(0.0)
    if power > 0 and not bool((e > 0).any()):
        warnings.warn("no source has a positive score: all of them count alike", stacklevel=2)
        power = 0.0
    e = torch.ones_like(e) if power == 0 else (e / e.max()) ** power
    return dict(zip(scores, (e / e.sum()).tolist(), strict=True))


def chosen_sources(scores: Mapping[str, float], config: DistillNearestConfig) -> dict[str, float]:
    """Name -> a_s of the sources that teach, those below `least_weight` left out and the others adding up to 1."""
    if config.supervised == 1:
        return {}
    if config.select == "weighted":
        weights = source_weights(scores, config.power)
    elif isinstance(config.select, list):
        weights = source_weights({name: scores[name] for name in config.select}, config.power)
    else:
        best = (max if config.select == "nearest" else min)(scores, key=lambda name: scores[name])
        weights = {best: 1.0}
    kept = {name: weight for name, weight in weights.items() if weight >= config.least_weight}
    total = sum(kept.values())
    return {name: weight / total for name, weight in kept.items()}


def source_loss(logits: Tensor, source_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """L_s of g_s's logits (B, C_s) against the source's (B, C_s): cross-entropy with softmax(./T), mean over images."""
    if logits.shape != source_logits.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(source_logits.shape)}"
        raise InputError(f"logits and source_logits: shapes {shapes}; allowed: one (B, C_s), the source's classes")
    return F.cross_entropy(logits, (source_logits.detach() / temperature).softmax(dim=1))


class DistillWeighted(Distiller):
    """`sources`: name -> (a_s, network, number of its classes); one of weight 1 is DistillNearest. The student is a
    timm network, whose own classifier is h."""

    def __init__(
        self,
        student: nn.Module,
        sources: Mapping[str, tuple[float, nn.Module, int]],
        *,
        supervised: float = 0.8,
        temperature: float = 1.0,
        distill_on: Literal["unlabelled", "all"] = "unlabelled",
    ):
        super().__init__()
        self.student = student
        self.supervised, self.temperature, self.distill_on = supervised, temperature, distill_on
        self.weights = {name: weight for name, (weight, _, _) in sources.items()}
        self.sources = nn.ModuleDict({name: freeze(network) for name, (_, network, _) in sources.items()})
        width = feature_width(student)
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, (_, _, classes) in sources.items()})

    def loss(self, batch: Pair, player: str = "student") -> LossTerms:
        count = len(batch.labelled.images)
        images = torch.cat([batch.labelled.images, batch.unlabelled.images])
        features, logits = penultimate(self.student, images)
        terms = LossTerms(labels=(self.supervised, F.cross_entropy(logits[:count], batch.labelled.labels)))
        first = 0 if self.distill_on == "all" else count
        for name, network in self.sources.items():
            with torch.no_grad():
                answers = network(images[first:])
            term = source_loss(self.heads[name](features[first:]), answers, self.temperature)
            terms[name] = ((1 - self.supervised) * self.weights[name], term)
        return terms


# ---------------------------------------------------------------- the sources' tasks


def source_data(source: SourceConfig, data: Data, rest: Images) -> Data:
    """The task of a source that is trained on the spot."""
    groups = source.classes or [[label] for label in range(data.num_classes)]
    mapping = torch.full((data.num_classes,), -1)
    for index, group in enumerate(groups):
        mapping[torch.tensor(group)] = index
    images = rest.relabelled(mapping[rest.labels])
    images = images.subset(torch.nonzero(images.labels >= 0).flatten())
    images = changed(images, source.change)
    names = ["+".join(data.class_names[label] for label in group) for group in groups]
    return replace(data, train=images, validation=None, class_names=names)


# ---------------------------------------------------------------- stages


class Sources:
    """The sources of a run: their stages, their networks, their scores."""

    def __init__(self, config: DistillNearestRun, data: Data, parts: Parts):
        self.config, self.data, self.parts = config, data, parts

    def stages(self) -> list[Stage]:
        stages = [self.stage(source) for source in self.config.sources]
        reference = self.config.reference
        if reference is not None:
            task = replace(self.data, train=self.parts.labelled, validation=None)
            stages.append(self._trained("reference", task, reference))
        return stages

    def _trained(self, name: str, task: Data, model: TeacherConfig) -> Stage:
        identity = {"labelled": self.config.labelled, "unlabelled": self.config.unlabelled}
        return runs.teacher_stage(self.config, task, name=name, model=model, fingerprint=identity)  # type: ignore[arg-type]

    def stage(self, source: SourceConfig) -> Stage:
        name = f"source-{source.label}"
        if source.train is None:
            return Procedure(name, lambda context: self._write(source, context))
        return self._trained(name, source_data(source, self.data, self.parts.rest), source)

    def _write(self, source: SourceConfig, context: RunContext) -> Artefacts:
        name = f"source-{source.label}"
        network = self.create(source)
        if context.is_main:
            save_model(network, context.folder / name, self.data)
        context.accelerator.wait_for_everyone()
        return {name: context.folder / name}

    def create(self, source: SourceConfig) -> nn.Module:
        """A source with weights of its own; its classes are its own, too."""
        import timm

        field = f"sources.{source.label}"
        if source.checkpoint is not None:
            source = source.model_copy(update={"checkpoint": str(expanded(source.checkpoint, f"{field}.checkpoint"))})
        classes = source.num_classes
        if classes is None:
            saved = load_model_or_none(source.checkpoint, field)
            if saved is not None:
                return saved
            if not source.pretrained:
                raise InputError(f"{field}.num_classes: required, the checkpoint does not say it")
            classes = int(timm.get_pretrained_cfg_value(source.name, "num_classes") or self.data.num_classes)
        return create_model(source, self.data, field=field, num_classes=classes)

    def load(self, source: SourceConfig, artefacts: Artefacts) -> nn.Module:
        return self._opened(artefacts[f"source-{source.label}"], source, f"sources.{source.label}")

    def _opened(self, folder: Path, model: TeacherConfig, field: str) -> nn.Module:
        return adapted(load_model(folder, field=field), self.data, model, field=field)

    @torch.no_grad()
    def outputs(self, network: nn.Module, device: Any) -> tuple[Tensor, Tensor]:
        """Features (n, D) and logits (n, C) of the labelled images, on the CPU."""
        network, images = network.to(device).eval(), plain(self.parts.labelled, self.data)
        pairs = [penultimate(network, batch.images.to(device)) for batch in images.loader(256)]
        features, logits = (torch.cat(part).cpu() for part in zip(*pairs, strict=True))
        return features, logits

    def score(
        self, source: SourceConfig, artefacts: Artefacts, device: Any, reference: Tensor | None
    ) -> dict[str, float]:
        """All similarity scores on the labelled images, in the source's own preprocessing; rsa with a reference's
        features (n, D')."""
        features, logits = self.outputs(self.load(source, artefacts), device)
        try:
            components, labels = self.config.method_args.components, self.parts.labelled.labels
            found = similarity_scores(features, logits.softmax(dim=1), labels, components=components)
            return found if reference is None else {**found, "rsa": rsa(features, reference)}
        except InputError as error:
            raise InputError(f"sources.{source.label}: {error}") from None

    def scores(self, context: RunContext) -> Artefacts:
        device = context.accelerator.device
        reference = None
        if self.config.reference is not None:
            network = self._opened(context.artefacts["reference"], self.config.reference, "reference")
            reference, _ = self.outputs(network, device)
        found = {s.label: self.score(s, context.artefacts, device, reference) for s in self.config.sources}
        args = self.config.method_args
        weights = chosen_sources({name: scores[args.score] for name, scores in found.items()}, args)
        path = context.folder / "scores.json"
        if context.is_main:
            write_atomically(path, json.dumps({"scores": found, "weights": weights}, indent=2))
        context.accelerator.wait_for_everyone()
        for name, scores in sorted(found.items(), key=lambda item: -item[1][args.score]):
            context.say(f"source {name}: {args.score} {scores[args.score]:.3f}, weight {weights.get(name, 0.0):.3f}")
        return {"scores": path}

    def setup(self, context: RunContext) -> TrainSetup:
        config, args = self.config, self.config.method_args
        weights = json.loads(context.artefacts["scores"].read_text())["weights"]
        networks = {s.label: self.load(s, context.artefacts) for s in config.sources if s.label in weights}
        taught = {name: (weights[name], net, classes_of(net)) for name, net in networks.items()}
        student = create_model(config.student, self.data, field="student")
        options = args.model_dump(include={"supervised", "temperature", "distill_on"})
        pairs = Pairs(self.parts.labelled, self.parts.unlabelled)
        loader = seeded_loader(
            pairs,
            min(config.train.batch_size, len(pairs)),
            seed=config.seed,
            drop_last=True,
            num_workers=config.train.num_workers,
            collate=collate_pairs,
        )
        evaluate = None
        if (held_out := self.data.validation) is not None:

            def evaluate(network: nn.Module) -> dict[str, float]:
                return m.classification_metrics(*m.predict(network, held_out))

        return TrainSetup(DistillWeighted(student, taught, **options), loader, evaluate)


def load_model_or_none(checkpoint: str | None, field: str) -> nn.Module | None:
    """The saved folder's network, or None where `checkpoint` is no folder."""
    return load_model(Path(checkpoint), field=field) if checkpoint and Path(checkpoint).is_dir() else None


def classes_of(network: nn.Module) -> int:
    return int(getattr(network, "model", network).num_classes)


def stages(config: DistillNearestRun, context: RunContext) -> list[Stage]:
    data = load_data(config.data, config.seed)
    parts = split_target(data, config.labelled, config.unlabelled, config.seed)
    check(config, data, parts)
    sources = Sources(config, data, parts)

    def save(network: nn.Module, folder: Any) -> None:
        save_model(network, folder, data)

    scores = Procedure("scores", sources.scores)
    return [*sources.stages(), scores, TrainStage("student", config.train, sources.setup, save)]


def check(config: DistillNearestRun, data: Data, parts: Parts) -> None:
    """What can be wrong with the config, before anything trains."""
    names = [source.label for source in config.sources]
    if len(set(names)) != len(names):
        raise InputError(f"sources: labels {names} are not all different")
    select = config.method_args.select
    if isinstance(select, list) and (not select or set(select) - set(names)):
        raise InputError(
            f"method_args.select = {select}: allowed: 'nearest', 'weighted', 'farthest', or some of {names}"
        )
    if config.data.augment.mixup or config.data.augment.cutmix:
        raise InputError("data.augment.mixup, cutmix: not for this method, whose images have no common label")
    if config.data.augment.repeats > 1:
        raise InputError(f"data.augment.repeats = {config.data.augment.repeats}: must be 1 for this method")
    if config.method_args.score == "rsa" and config.reference is None:
        raise InputError("method_args.score = 'rsa': needs `reference`, a network of the target to compare with")
    runs.check_monitor(config.train, data, "train", m.VALIDATION)
    networks = {"reference": config.reference, **{f"sources.{source.label}": source for source in config.sources}}
    for field, network in networks.items():
        if network is not None and network.cache is not None:
            raise InputError(f"{field}.cache: not for this method; its answers are computed as they are needed")
    for source in config.sources:
        field = f"sources.{source.label}"
        if source.train is None:
            continue
        groups = source.classes or [[label] for label in range(data.num_classes)]
        flat = [label for group in groups for label in group]
        if len(groups) < 2 or len(set(flat)) != len(flat) or not set(flat) <= set(range(data.num_classes)):
            raise InputError(f"{field}.classes: allowed: two or more disjoint groups of 0 to {data.num_classes - 1}")
        if len(parts.rest) == 0:
            raise InputError(
                f"{field}.train: no training image is left over for it; give `unlabelled` a smaller number"
            )
        task = source_data(source, data, parts.rest)
        if len(task.train) == 0:
            raise InputError(f"{field}.classes: no image of these classes is left over for it")
    with torch.random.fork_rng(devices=[]):
        runs.try_forward(create_model(config.student, data, field="student"), data, "student")


def evaluate(config: DistillNearestRun, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics; score and weight of every source."""
    result = runs.evaluate(config, artefacts)  # type: ignore[arg-type]
    record = json.loads(artefacts["scores"].read_text())
    for name, scores in record["scores"].items():
        result.update({f"{score}/{name}": value for score, value in scores.items()})
        result[f"weight/{name}"] = record["weights"].get(name, 0.0)
    return result


METHOD = Method("distill_nearest", __doc__ or "", DistillNearestRun, stages, evaluate, runs.predict)
