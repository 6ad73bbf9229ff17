"""What a frozen encoder knows: linear probe and nearest neighbours on its features, and the fit to a teacher's."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from kd_classification.data import AugmentConfig, Batch, Data, Images
from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.engine.masked_vit import inner_vit
from kdcore.config import Config, OptimizerConfig, TrainConfig
from kdcore.distiller import LossTerms, Player
from kdcore.errors import InputError

Pool = Literal["avg", "token"]


class ProbeConfig(Config):
    """Classifiers on the features of the frozen encoder: how much of the classes it knows without being told."""

    pool: Pool = Field("avg", description="feature: mean of the patch tokens, or the class token")
    inverse_penalty: float = Field(1.0, gt=0, description="C of the logistic regression, on standardised features")
    neighbours: int | None = Field(20, ge=1, description="k of the nearest neighbours by cosine; None: without them")
    train: TrainConfig | None = Field(
        None, description="train the linear classifier by steps on augmented images; None: solve it on plain ones"
    )
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="augmentation of train")
    lars: bool = Field(False, description="LARS with the rate, momentum and decay of train.optimizer, as MAE's probes")


def pooled(encoder: nn.Module, images: Tensor, pool: Pool = "avg") -> Tensor:
    """(B, D): the mean of the encoder's last patch tokens, or its class token; no token is hidden."""
    tokens, prefix = cast(Any, encoder).forward_features(images), cast(Any, inner_vit(encoder)).num_prefix_tokens
    if pool == "token" and prefix == 0:
        raise InputError("probe.pool = 'token': the encoder has no class token; allowed: 'avg'")
    return tokens[:, 0] if pool == "token" else tokens[:, prefix:].mean(1)


@torch.no_grad()
def frozen_features(encoder: nn.Module, images: Images, pool: Pool, batch_size: int = 256) -> Tensor:
    """(N, D) float32 on the CPU: `pooled` of every image, in order."""
    device = next(encoder.parameters()).device
    encoder.eval()
    parts = [pooled(encoder, batch.images.to(device), pool).float().cpu() for batch in images.loader(batch_size)]
    return torch.cat(parts)


def probe_metrics(encoder: nn.Module, data: Data, probe: ProbeConfig) -> dict[str, float]:
    """linear_probe and knn: test accuracy of logistic regression and of k nearest neighbours on frozen features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    models: dict[str, Any] = {}
    if probe.train is None:
        logistic = LogisticRegression(C=probe.inverse_penalty, max_iter=1000)
        models["linear_probe"] = make_pipeline(StandardScaler(), logistic)
    if probe.neighbours is not None:
        models["knn"] = KNeighborsClassifier(min(probe.neighbours, len(data.train)), metric="cosine")
    if not models:
        return {}
    train, test = (frozen_features(encoder, part, probe.pool).numpy() for part in (data.train_plain, data.test))
    labels, truth = data.train.labels.numpy(), data.test.labels.numpy()
    return {name: float(model.fit(train, labels).score(test, truth)) for name, model in models.items()}


class LinearProbe(ClassifierDistiller):
    """MAE's linear probing: batch norm without affine and a linear classifier on the frozen encoder's feature."""

    def __init__(self, encoder: nn.Module, classes: int, *, pool: Pool = "avg", lars: OptimizerConfig | None = None):
        width = int(cast(Any, encoder).embed_dim)
        norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        super().__init__(encoder, nn.Sequential(norm, nn.Linear(width, classes)))
        self.pool: Pool = pool
        self.lars = lars

    def players(self) -> list[Player]:
        if self.lars is None:
            return [Player("student", self.student)]
        weights = [parameter for parameter in self.student.parameters() if parameter.ndim > 1]
        biases = [parameter for parameter in self.student.parameters() if parameter.ndim <= 1]
        groups = [{"params": weights, "always_adapt": True}, {"params": biases, "weight_decay": 0.0}]
        return [Player("student", self.student, optimizer=self._lars, param_groups=groups)]

    def _lars(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from timm.optim import Lars

        settings = cast(OptimizerConfig, self.lars)
        rates = {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
        return Lars(groups, **rates)

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        with torch.no_grad():
            features = pooled(cast(nn.Module, self.teacher), batch.images, self.pool)
        return LossTerms(ce=(1.0, cross_entropy(self.student(features), batch.labels)))


def spread(images: Images, most: int = 2000) -> Images:
    """At most `most` images at even distances, of a data set that may be sorted by class."""
    if len(images) <= most:
        return images
    return images.subset(torch.linspace(0, len(images) - 1, most).long())


class Alignment:
    """How much of a teacher's features a least-squares map of the student's holds; every network gets the best map.

    `fit` takes pairs of features (..., D_S), (..., D_T), `measure` held-out ones; `cosine` is then the mean cosine of
    mapped student and teacher features after the teacher's mean is taken from both: 1 is all of it, a constant map 0.
    """

    def __init__(self) -> None:
        self._covariance: Tensor | float = 0.0
        self._product: Tensor | float = 0.0
        self._weights: Tensor | None = None
        self._total, self._count = 0.0, 0

    def fit(self, source: Tensor, target: Tensor) -> None:
        x, y = self._rows(source, target)
        self._covariance = self._covariance + x.T @ x
        self._product = self._product + x.T @ y
        self._weights = None

    def measure(self, source: Tensor, target: Tensor) -> None:
        x, y = self._rows(source, target)
        covariance, product = cast(Tensor, self._covariance), cast(Tensor, self._product)
        if self._weights is None:
            self._weights = torch.linalg.lstsq(covariance, product, driver="gelsd").solution
        mean = product[-1] / covariance[-1, -1]  # the last feature is the constant 1
        self._total += float(cosine_similarity(x @ self._weights - mean, y - mean, dim=1).sum())
        self._count += len(x)

    def cosine(self) -> float:
        return self._total / self._count

    @staticmethod
    def _rows(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (features.detach().flatten(0, -2).double().cpu() for features in (source, target))
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1), y
