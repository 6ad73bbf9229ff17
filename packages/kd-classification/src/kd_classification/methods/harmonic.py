"""Rethinking the Harmonic Loss via Non-Euclidean Distance Layers (arXiv 2603.10225, 2026).

The last linear layer becomes a set of class prototypes w_k, and a class's probability an inverse power of the distance
from the feature f to its prototype (the harmonic loss of arXiv 2502.01628, with other distances than the Euclidean):

    p_k = d_k^-n / sum_j d_j^-n,   L = mean_i -log p_{y_i},   d_k = d(f, w_k)

    Euclidean   dL/df = n (delta_y / d_y^2 - sum_k p_k delta_k / d_k^2),   dL/dw_k = n (p_k - 1[k = y]) delta_k / d_k^2
    cosine      d = 1 - <f, w> / (||f|| ||w||)          Manhattan, Minkowski, Chebyshev: norms of delta = f - w
    Bray-Curtis d = sum |delta| / sum(|f| + |w|)        Canberra  d = sum |delta| / (|f| + |w|)
    Mahalanobis d^2 = delta^T P delta, P learned, one for all classes       Hamming  d = sum |b(f) - b(w)|, soft bits b

Prototypes come to lie where their class is, so the weights stay bounded and can be read. The scores z_k = -n log d_k
are logits like any others (`kd_classification.heads`), hence any logit distillation goes on top; a temperature T makes
the exponent n / T. That is ours, and off by default: with a teacher

    L = (1 - a) CE(z, y) + a T^2 KL( softmax(z_t / T) || softmax(z / T) )

The released vision code has two paths: one takes log d^-n as logits, as here, the other (MLP, CNN) minus d^-n, which
pushes a class away from its prototype; that one is not offered.

Backbone and prototypes train together from scratch and ship together. Euclidean, cosine and Mahalanobis heads also have
a linear layer with the same argmax, which stock timm loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_classification import metrics as m
from kd_classification import runs
from kd_classification.data import Batch, Data, DataConfig, Images, load_data
from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.heads import (
    Distance,
    HarmonicHead,
    classifier_name,
    load_harmonic,
    save_harmonic,
    with_harmonic_head,
)
from kd_classification.models import ModelConfig, create_model
from kd_classification.runs import TeacherConfig
from kdcore.config import MethodConfig, MethodRunConfig
from kdcore.distiller import LossTerms
from kdcore.errors import InputError
from kdcore.losses import soft_target_kl
from kdcore.method import Method
from kdcore.stages import Artefacts, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage


class HarmonicConfig(MethodConfig):
    head: Distance | Literal["linear"] = Field("cosine", description="distance of the head; linear: an ordinary one")
    n: float = Field(1.0, gt=0, description="harmonic exponent")
    exponent_on: Literal["distance", "squared"] = Field(
        "distance", description="what n is the exponent of; squared is the released Euclidean head, 2n on the distance"
    )
    eps: float | None = Field(None, gt=0, description="added to the distance; None is 1e-4, for Bray-Curtis 1e-3")
    p: float = Field(1.5, ge=1, description="order of the Minkowski distance")
    sharpness: float = Field(10.0, gt=0, description="a of the smooth Chebyshev distance")
    bit_temperature: float = Field(1.0, gt=0, description="temperature of the Hamming distance's soft bits")
    kd_weight: float = Field(0.0, ge=0, le=1, description="a, weight of a teacher's soft targets; 0 needs no teacher")
    temperature: float = Field(4.0, gt=0, description="temperature T of the soft targets")

    @property
    def head_settings(self) -> dict[str, Any]:
        """The arguments of `HarmonicHead`."""
        settings = self.model_dump(include={"n", "exponent_on", "eps", "p", "sharpness"})
        return {**settings, "distance": self.head, "temperature": self.bit_temperature}


class HarmonicRun(MethodRunConfig[HarmonicConfig]):
    """The network, its data and budget; a teacher only for the distillation that can go on top."""

    teacher: TeacherConfig | None = Field(None, description="frozen teacher of the optional soft targets")
    student: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    method_args: HarmonicConfig = Field(default_factory=lambda: HarmonicConfig.model_validate({}))

    @model_validator(mode="after")
    def _teacher_where_needed(self) -> HarmonicRun:
        if (self.teacher is not None) != (self.method_args.kd_weight > 0):
            raise ValueError("teacher and method_args.kd_weight > 0 go together: give both or neither")
        return self


# ---------------------------------------------------------------- losses


def harmonic_loss(distances: Tensor, labels: Tensor, n: float = 1.0) -> Tensor:
    """L = mean_i -log p_{y_i}, p = d^-n / sum d^-n, from positive distances (B, K) and labels (B,), in log space.

    >>> round(harmonic_loss(torch.tensor([[2.0, 5.0, 2.0]]), torch.tensor([0]), 2.0).item(), 6)
    0.770108
    """
    return F.cross_entropy(-n * distances.log(), labels)


class Harmonic(ClassifierDistiller):
    """A student that has its head already, with or without a teacher on its scores."""

    def __init__(
        self, teacher: nn.Module | None, student: nn.Module, *, kd_weight: float = 0.0, temperature: float = 4.0
    ):
        super().__init__(teacher, student)
        if kd_weight > 0 and teacher is None:
            raise InputError(f"kd_weight = {kd_weight}: needs a teacher")
        self.kd_weight, self.temperature = kd_weight, temperature
        # what the prototypes' growth is measured against, kept when a run resumes
        self.register_buffer("initial_norm", prototypes(student).norm().detach())

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        scores = self.student(batch.images)
        terms = LossTerms(ce=(1 - self.kd_weight, F.cross_entropy(scores, batch.labels)))
        if self.kd_weight > 0:
            terms["kd"] = (self.kd_weight, soft_target_kl(scores, self.teacher_logits(batch), self.temperature))
        return terms


def prototypes(model: nn.Module) -> Tensor:
    """The rows (K, D) of a network's classifier, linear or harmonic."""
    weight = model.get_submodule(classifier_name(model)).weight
    assert isinstance(weight, Tensor)
    return weight.flatten(1)


# ---------------------------------------------------------------- what can be read from the features


@torch.no_grad()
def features_of(model: nn.Module, images: Images) -> Tensor:
    """What the classifier reads of every image (N, D), in eval mode."""
    model, found = model.eval(), []
    device = next(model.parameters()).device
    head = model.get_submodule(classifier_name(model))
    handle = head.register_forward_pre_hook(lambda _, given: found.append(given[0].flatten(1).cpu()))
    try:
        for batch in images.loader(512):
            model(batch.images.to(device))
    finally:
        handle.remove()
    return torch.cat(found)


def prototype_metrics(weights: Tensor, features: Tensor, labels: Tensor) -> dict[str, float]:
    """How prototypes (K, D) lie to the class means of features (N, D): the mean cosine, and the mean distance relative
    to the means' mean norm. A class whose features are all 0 (after a ReLU) has no direction and no cosine."""
    classes = labels.unique()
    means = torch.stack([features[labels == k].mean(0) for k in classes])
    kept, norms = weights.detach().float().cpu()[classes], means.norm(dim=1)
    directed = norms > 1e-3 * norms.mean()
    return {
        "prototype_cosine": float(F.cosine_similarity(kept[directed], means[directed], dim=1).mean()),
        "prototype_distance": float((kept - means).norm(dim=1).mean() / norms.mean()),
    }


def spectrum_metrics(features: Tensor, *, samples: int = 2000, components: int = 50) -> dict[str, float]:
    """PCA of standardised features (N, D): variance of two components, effective rank exp(-sum v log v), participation
    ratio 1 / sum v^2, and how many components hold 90 and 95 %; v: shares of the first `components` components."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    values = StandardScaler().fit_transform(features[:samples].double().numpy())
    shares = PCA(min(components, *values.shape), random_state=0).fit(values).explained_variance_ratio_
    shares = torch.from_numpy(shares).clamp_min(1e-12)
    total = shares.cumsum(0)
    return {
        "variance_of_two": float(total[min(1, len(total) - 1)]),
        "effective_rank": float((-(shares * shares.log()).sum()).exp()),
        "participation_ratio": float(1 / shares.square().sum()),
        "dimensions_90": float(min(int((total < 0.9).sum()) + 1, len(total))),
        "dimensions_95": float(min(int((total < 0.95).sum()) + 1, len(total))),
    }


# ---------------------------------------------------------------- stages


def create_student(config: HarmonicRun, data: Data) -> nn.Module:
    student = create_model(config.student, data, field="student")
    args = config.method_args
    try:
        classifier_name(student)
    except InputError as error:
        raise InputError(f"student.name = '{config.student.name}': {error}") from None
    return student if args.head == "linear" else with_harmonic_head(student, **args.head_settings)


class Training:
    """Sets the student's training up and saves what comes of it, with the initial norm of its prototypes."""

    def __init__(self, config: HarmonicRun, data: Data):
        self.config, self.data = config, data

    def setup(self, context: RunContext) -> TrainSetup:
        config, args = self.config, self.config.method_args
        teacher = None
        if config.teacher is not None:
            teacher = runs.load_teacher(config, self.data, context.artefacts["teacher"])  # type: ignore[arg-type]
        student = create_student(config, self.data)
        self.distiller = Harmonic(teacher, student, kd_weight=args.kd_weight, temperature=args.temperature)
        return runs.supervised_setup(self.distiller, self.data, config.train, config.seed)

    def save(self, network: nn.Module, folder: Path) -> None:
        save_harmonic(network, folder, self.data)
        record = {
            "initial_norm": float(self.distiller.initial_norm),
            "final_norm": float(prototypes(network).detach().norm()),
        }
        (folder / "prototypes.json").write_text(json.dumps(record), encoding="utf-8")


def stages(config: HarmonicRun, context: RunContext) -> list[Stage]:
    data = load_data(config.data, config.seed)
    check(config, data)
    training = Training(config, data)
    student = TrainStage("student", config.train, training.setup, training.save)
    if config.teacher is None:
        return [student]
    return [runs.teacher_stage(config, data), student]  # type: ignore[arg-type]


def check(config: HarmonicRun, data: Data) -> None:
    """What can be wrong with the config, before anything trains."""
    runs.check_monitor(config.train, data, "train", m.VALIDATION)
    with torch.random.fork_rng(devices=[]):
        runs.try_forward(create_student(config, data), data, "student")
        if config.teacher is not None:
            if config.teacher.cache is not None:
                raise InputError("teacher.cache: not for this method; the teacher answers on the training images")
            runs.check_monitor(config.teacher.train, data, "teacher.train", m.VALIDATION)
            runs.try_forward(create_model(config.teacher, data, field="teacher"), data, "teacher")


def evaluate(config: HarmonicRun, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics; growth of the prototypes' norm; where they lie; the spectrum of the features; the export."""
    data = load_data(config.data, config.seed)
    student = load_harmonic(artefacts["student"], field="student")
    result = runs.evaluate(config, artefacts, data=data, student=student)  # type: ignore[arg-type]
    record = json.loads((artefacts["student"] / "prototypes.json").read_text(encoding="utf-8"))
    result["norm_growth"] = record["final_norm"] / record["initial_norm"]
    result.update(prototype_metrics(prototypes(student), features_of(student, data.train_plain), data.train.labels))
    test = features_of(student, data.test)
    result.update(spectrum_metrics(test))
    head = student.get_submodule(classifier_name(student))
    linear = head.linear() if isinstance(head, HarmonicHead) else None
    if linear is not None:
        answers = F.linear(test, *linear).argmax(1)
        result["export_agreement"] = float((answers == m.predict(student, data.test)[0].argmax(1)).double().mean())
    return result


def predict(config: HarmonicRun, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    student = load_harmonic(artefacts["student"])
    return runs.predict(config, artefacts, count, student=student)  # type: ignore[arg-type]


METHOD = Method("harmonic", __doc__ or "", HarmonicRun, stages, evaluate, predict)
