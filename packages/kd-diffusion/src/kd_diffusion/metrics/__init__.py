"""Metrics of generated samples.

    net = train_features(data.train.pixels, data.train.labels, num_classes=10)
    generation_metrics(net, samples, labels, data.held_out.pixels)      # frechet, precision, recall, ..., accuracy

network: the feature network. features: distances of two sets of features. points: metrics of low-dimensional points.
generation: all of them by name, FID with Inception, rates and timing. Generated samples come first, real ones second.
"""

from kd_diffusion.metrics.features import (
    PRDC,
    density_coverage,
    diversity,
    diversity_ratio,
    frechet_distance,
    kernel_distance,
    prdc,
    precision_recall,
    variance_ratio,
)
from kd_diffusion.metrics.generation import (
    attribute_rates,
    class_accuracy,
    generation_metrics,
    seconds_per_sample,
    torchmetrics_fid,
)
from kd_diffusion.metrics.network import FeatureNet, embed, load_features, save_features, train_features
from kd_diffusion.metrics.points import ModeCoverage, energy_distance, mode_coverage, sliced_wasserstein

__all__ = [
    "PRDC",
    "FeatureNet",
    "ModeCoverage",
    "attribute_rates",
    "class_accuracy",
    "density_coverage",
    "diversity",
    "diversity_ratio",
    "embed",
    "energy_distance",
    "frechet_distance",
    "generation_metrics",
    "kernel_distance",
    "load_features",
    "mode_coverage",
    "prdc",
    "precision_recall",
    "save_features",
    "seconds_per_sample",
    "sliced_wasserstein",
    "torchmetrics_fid",
    "train_features",
    "variance_ratio",
]
