"""The metrics of a set of generated images by name, FID with Inception features, rates and timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_diffusion.metrics._sets import check_finite, labels_of
from kd_diffusion.metrics.features import frechet_distance, kernel_distance, prdc
from kd_diffusion.metrics.network import FeatureNet, embed
from kdcore.errors import InputError


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of logits (N, K) whose largest one is that of labels (N,). InputError on shapes and labels outside K."""
    if logits.ndim != 2 or len(logits) == 0:
        raise InputError(f"logits: given {tuple(logits.shape)}, allowed: (N, K) with N > 0")
    labels = labels_of("labels", labels, len(logits)).to(logits.device)
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        given = f"{int(labels.min())} to {int(labels.max())}"
        raise InputError(f"labels: given {given}, allowed: 0 to {logits.shape[1] - 1}")
    return float((logits.argmax(1) == labels).double().mean())


def attribute_rates(samples: Tensor, predicates: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, float]:
    """Name -> share of samples (N, ...) for which its predicate, (N, ...) -> (N,) bool, holds.

    >>> attribute_rates(torch.tensor([[1.0], [-2.0]]), {"positive_rate": lambda x: x[:, 0] > 0})
    {'positive_rate': 0.5}
    """
    if samples.ndim < 1 or len(samples) == 0:
        raise InputError(f"samples: given {tuple(samples.shape)}, allowed: (N, ...) with N > 0")
    rates = {}
    for name, predicate in predicates.items():
        holds = predicate(samples)
        if holds.dtype != torch.bool or holds.shape != (len(samples),):
            given = f"{tuple(holds.shape)} {holds.dtype}"
            raise InputError(f"predicates.{name}: given {given}, allowed: ({len(samples)},) torch.bool")
        rates[name] = float(holds.double().mean())
    return rates


def generation_metrics(
    net: FeatureNet, samples: Tensor, labels: Tensor | None, reference: Tensor, k: int = 5
) -> dict[str, float]:
    """frechet, precision, recall, density, coverage, mmd, and with labels accuracy, in the features of `net`.

    Args:
        net: a FeatureNet of the reference's kind of images.
        samples: generated pixels (N, C, H, W) in [-1, 1]; values beyond are clamped, as when they are saved as images.
        labels: (N,) classes that were asked for, or None.
        reference: real pixels (M, C, H, W) in [-1, 1]; N, M > k.
        k: neighbours that define the balls of precision, recall, density and coverage.
    Raises: InputError on shapes, labels, too few samples for k, and NaN.
    """
    for name, pixels in (("samples", samples), ("reference", reference)):
        check_finite(name, pixels)
    found, real = embed(net, samples.clamp(-1, 1)), embed(net, reference.clamp(-1, 1))
    balls = prdc(found.features, real.features, k)
    metrics = {"frechet": frechet_distance(found.features, real.features), **balls._asdict()}
    metrics["mmd"] = kernel_distance(found.features, real.features)
    if labels is not None:
        metrics["accuracy"] = class_accuracy(found.logits, labels)
    return metrics


def torchmetrics_fid(
    samples: Tensor,
    reference: Tensor,
    *,
    feature: int = 2048,
    weights: Path | str | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> float:
    """Fréchet Inception distance by torchmetrics, for numbers that compare with published ones.

    Args:
        samples, reference: pixels (N, C, H, W), (M, C, H, W) in [-1, 1], C 1 (repeated) or 3; N, M >= 2.
        feature: layer of Inception by its width: 64, 192, 768 or 2048.
        weights: file of torch-fidelity's Inception weights; None: its download or cache.
    Raises: InputError when torch-fidelity is not installed, its weights cannot be had, and on shapes.
    """
    if feature not in (64, 192, 768, 2048):
        raise InputError(f"feature: given {feature}, allowed: 64, 192, 768, 2048")
    for name, pixels in (("samples", samples), ("reference", reference)):
        check_finite(name, pixels, at_least=2)
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise InputError(f"{name}: given {tuple(pixels.shape)}, allowed: (N, 1 or 3, H, W)")
    metric = _inception(feature, weights).to(device)
    for pixels, real in ((samples, False), (reference, True)):
        for part in pixels.split(batch_size):
            metric.update((part.float().clamp(-1, 1).to(device) + 1).div(2).expand(-1, 3, -1, -1), real=real)
    return float(metric.compute())


def _inception(feature: int, weights: Path | str | None) -> Any:
    from torchmetrics.image.fid import FrechetInceptionDistance

    path = None if weights is None else str(weights)
    if path is not None:
        _check_plain(path)
    try:
        return FrechetInceptionDistance(feature, normalize=True, feature_extractor_weights_path=path)
    except ModuleNotFoundError:
        raise InputError("torchmetrics_fid: needs the package torch-fidelity: not installed") from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # no network (URLError is an OSError), broken file
        source = weights or "torch-fidelity's download"
        reason = str(error).partition("\n")[0].rstrip(":")
        raise InputError(f"weights: Inception's weights cannot be had from {source} ({reason})") from None


def _check_plain(path: str) -> None:
    """InputError unless the file holds plain tensors only: torch-fidelity itself would unpickle whatever is in it."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"weights: {path}: no such file") from None
    except Exception:  # its messages are paragraphs about how to load an untrusted file all the same
        raise InputError(f"weights: {path}: not a checkpoint of plain tensors; no other is read") from None


def seconds_per_sample(function: Callable[[int], Any], count: int, *, repeats: int = 5, warmup: int = 1) -> float:
    """Median wall-clock seconds of `function(count)`, which draws `count` samples, divided by count.

    `warmup` calls come first and are not counted; work that an accelerator still does is waited for.
    """
    for name, value, least in (("count", count, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise InputError(f"{name}: given {value}, allowed: >= {least}")
    times = []
    for _ in range(warmup + repeats):
        _wait()
        start = time.perf_counter()
        function(count)
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:]) / count


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
