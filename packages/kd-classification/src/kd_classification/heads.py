"""Harmonic heads: the classifier of a network as class prototypes (arXiv 2502.01628, arXiv 2603.10225).

    p_k = d_k^-n / sum_j d_j^-n = softmax_k( -n log d_k ),   d_k = d(f, w_k)

The scores z_k = -n log d_k are ordinary logits: cross-entropy, and any logit distillation, take them as they are. A
temperature T on them is the exponent n / T. They are computed in log space, in float32 or better.

    model = with_harmonic_head(timm.create_model("resnet18", num_classes=10), distance="cosine")

Any timm network takes a head, a distilled one two. Euclidean, cosine and Mahalanobis heads have a linear layer with the
same argmax, which is what `save_harmonic` puts into the timm folder; the head itself lies beside it and `load_harmonic`
puts it back.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kd_classification.data import Data
from kd_classification.models import load_model, save_model
from kdcore.checkpoint import load_weights
from kdcore.errors import InputError, did_you_mean

Distance = Literal[
    "euclidean",
    "cosine",
    "manhattan",
    "minkowski",
    "chebyshev",
    "chebyshev_smooth",
    "bray_curtis",
    "bray_curtis_standard",
    "bray_curtis_normalized",
    "canberra",
    "canberra_robust",
    "canberra_weighted",
    "mahalanobis",
    "mahalanobis_diagonal",
    "mahalanobis_cholesky",
    "hamming",
    "hamming_hard",
    "hamming_gumbel",
]
DISTANCES: tuple[str, ...] = get_args(Distance)
LINEAR = ("euclidean", "cosine", "mahalanobis", "mahalanobis_diagonal", "mahalanobis_cholesky")
"""Distances whose nearest prototype is the argmax of a linear layer."""

BLOCK = 2**24  # elements of one (B, classes, D) block, where a distance needs every coordinate of every pair
RIDGE = 0.01  # added to a learned full precision matrix
FILES = ("harmonic.safetensors", "harmonic.json")

# ---------------------------------------------------------------- distances: f (B, D), w (K, D) -> (B, K)


def euclidean(f: Tensor, w: Tensor, eps: float = 0.0) -> Tensor:
    """sqrt(||f - w||^2 + eps), by one matrix product; what rounding makes negative counts as 0."""
    square = f.square().sum(1, keepdim=True) + w.square().sum(1) - 2 * f @ w.T
    return (square.clamp_min(0.0) + eps).sqrt()


def cosine(f: Tensor, w: Tensor, eps: float = 0.0) -> Tensor:
    """1 - <f, w> / (||f|| ||w||) + eps, never negative."""
    return (1 - F.normalize(f, dim=1) @ F.normalize(w, dim=1).T).clamp_min(0.0) + eps


def minkowski(f: Tensor, w: Tensor, eps: float = 0.0, *, p: float = 1.5) -> Tensor:
    """(sum |f - w|^p)^(1/p) + eps; p = 1 is Manhattan, p = inf Chebyshev. Needs no (B, K, D) tensor."""
    return torch.cdist(f, w, p=p, compute_mode="donot_use_mm_for_euclid_dist") + eps


def chebyshev_smooth(f: Tensor, w: Tensor, eps: float = 0.0, *, sharpness: float = 10.0) -> Tensor:
    """1/a log sum exp(a |f - w|) + eps: between Chebyshev's distance and that plus log(D) / a."""

    def block(f: Tensor, w: Tensor) -> Tensor:
        return (sharpness * (f[:, None] - w).abs()).logsumexp(dim=2) / sharpness

    return _over_classes(block, f, w) + eps


def bray_curtis(f: Tensor, w: Tensor, eps: float = 0.0, *, form: str = "abs") -> Tensor:
    """sum |f - w| / max(s + eps, 10 eps) + eps; s = sum(|f| + |w|) (abs, in [0, 1]), or |sum(f + w)| (standard).

    form "normalized": standard, on (|f| + eps) / sum(|f| + eps) and likewise w. The standard form's s may vanish for
    features of both signs.
    """
    if form == "normalized":
        f, w = (x / x.sum(1, keepdim=True) for x in (f.abs() + eps, w.abs() + eps))
    if form == "abs":
        total = f.abs().sum(1, keepdim=True) + w.abs().sum(1)
    else:
        total = (f.sum(1, keepdim=True) + w.sum(1)).abs()
    return torch.cdist(f, w, p=1.0) / (total + eps).clamp_min(10 * eps) + eps


def canberra(
    f: Tensor, w: Tensor, eps: float = 0.0, *, form: str = "standard", floor: float = 0.01, power: float = 0.5
) -> Tensor:
    """sum |f - w| / (|f| + |w|) + eps. robust: the denominator is at least `floor`; weighted: the mean of the terms,
    weighted by (|f| + |w|)^power."""
    least = {"standard": eps, "robust": floor, "weighted": 0.0}[form]

    def block(f: Tensor, w: Tensor) -> Tensor:
        f, both = f[:, None], f[:, None].abs() + w.abs()
        both = both + eps if form == "weighted" else both.clamp_min(least or torch.finfo(f.dtype).tiny)
        terms = (f - w).abs() / both
        if form != "weighted":
            return terms.sum(2)
        weights = both**power
        return (weights * terms).sum(2) / weights.sum(2)

    return _over_classes(block, f, w) + eps


def mahalanobis(f: Tensor, w: Tensor, precision: Tensor, eps: float = 0.0) -> Tensor:
    """sqrt((f - w)^T P (f - w) + eps) with one symmetric P (D, D), or its diagonal (D,), for all classes."""
    if precision.ndim == 1:
        scale = precision.sqrt()
        return euclidean(f * scale, w * scale, eps)
    fp, wp = f @ precision, w @ precision
    square = (fp * f).sum(1, keepdim=True) + (wp * w).sum(1) - 2 * fp @ w.T
    return (square.clamp_min(0.0) + eps).sqrt()


def hamming(
    f: Tensor,
    w: Tensor,
    eps: float = 0.0,
    *,
    form: str = "soft",
    temperature: float = 1.0,
    threshold: float = 0.5,
    noisy: bool = False,
) -> Tensor:
    """sum |b(f) - b(w)| + eps, b(x) = sigmoid(x / T). hard: b(x) = 1[x > threshold] with the gradient of the sigmoid;
    gumbel: Gumbel noise on x while `noisy`, in training."""

    def bits(x: Tensor) -> Tensor:
        if form == "gumbel" and noisy:
            uniform = torch.rand_like(x).clamp(1e-7, 1 - 1e-7)
            x = x - (-uniform.log()).log()
        soft = torch.sigmoid(x / temperature)
        return (x > threshold).to(x.dtype) + soft - soft.detach() if form == "hard" else soft

    return torch.cdist(bits(f), bits(w), p=1.0) + eps


def _over_classes(block: Callable[[Tensor, Tensor], Tensor], f: Tensor, w: Tensor) -> Tensor:
    """block(f, w) over chunks of classes; beyond one chunk each is computed again in backward."""
    size = max(1, BLOCK // max(1, f.numel()))
    if size >= len(w):
        return block(f, w)
    return torch.cat([checkpoint(block, f, part, use_reentrant=False) for part in w.split(size)], dim=1)


# ---------------------------------------------------------------- the head


class HarmonicHead(nn.Module):
    """Features (..., D) -> scores (..., K), -n log d; the rows of `weight` (K, D) are the class prototypes.

    exponent_on "squared": n acts on the squared distance, as in the released Euclidean heads; it is 2n on the
    distance. `eps` keeps the score of a feature that equals its prototype finite; None is 1e-4, 1e-3 for Bray-Curtis.
    p: of minkowski; sharpness: of chebyshev_smooth; temperature, threshold: of hamming. Raises InputError on an
    unknown distance or features of another width. The features of a 1x1 convolution, (B, D, H, W), come with
    `channels_first`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        distance: Distance = "cosine",
        n: float = 1.0,
        eps: float | None = None,
        exponent_on: Literal["distance", "squared"] = "distance",
        p: float = 1.5,
        sharpness: float = 10.0,
        temperature: float = 1.0,
        threshold: float = 0.5,
        channels_first: bool = False,
    ):
        super().__init__()
        if distance not in DISTANCES:
            raise InputError(f"distance = '{distance}'{did_you_mean(distance, DISTANCES)}")
        if not (n > 0 and math.isfinite(n)) or not p >= 1 or not sharpness > 0 or not temperature > 0:
            raise InputError(
                f"n = {n}, p = {p}, sharpness = {sharpness}, temperature = {temperature}: allowed: above 0, p from 1 on"
            )
        self.in_features, self.num_classes = in_features, num_classes
        self.distance, self.n, self.exponent_on = distance, n, exponent_on
        self.eps = eps if eps is not None else 1e-3 if distance.startswith("bray") else 1e-4
        self.p, self.sharpness, self.temperature, self.threshold = p, sharpness, temperature, threshold
        self.channels_first = channels_first
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # that of nn.Linear
        shape = {"mahalanobis_diagonal": (in_features,), "mahalanobis": (in_features, in_features)}
        shape["mahalanobis_cholesky"] = shape["mahalanobis"]
        if distance in shape:
            self.metric = nn.Parameter(torch.zeros(shape[distance]))
            if distance != "mahalanobis_diagonal":
                self.metric.data += (1 + RIDGE if distance == "mahalanobis" else 0.1) * torch.eye(in_features)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that build this head again."""
        names = ("in_features", "num_classes", "distance", "n", "eps", "exponent_on", "p", "sharpness", "temperature")
        return {name: getattr(self, name) for name in (*names, "threshold", "channels_first")}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_classes}, distance={self.distance}, n={self.n}, eps={self.eps}"

    def precision(self) -> Tensor:
        """P of the Mahalanobis distances: (D,) diagonal, else (D, D)."""
        if self.distance == "mahalanobis_diagonal":
            return self.metric.clamp(-10, 10).exp() + self.eps
        identity = torch.eye(self.in_features, dtype=self.metric.dtype, device=self.metric.device)
        if self.distance == "mahalanobis_cholesky":
            lower = self.metric.tril(-1) + torch.diag(self.metric.diagonal().clamp_min(self.eps))
            return lower @ lower.T + self.eps * identity
        matrix = self.metric + RIDGE * identity
        return (matrix + matrix.T) / 2 + 10 * self.eps * identity

    def distances(self, features: Tensor) -> Tensor:
        """d_k, (B, K), of features (B, D)."""
        f, w, eps = features, self.weight.to(features.dtype), self.eps
        name, _, form = self.distance.partition("_")
        if name == "mahalanobis":
            return mahalanobis(f, w, self.precision().to(f.dtype), eps)
        if name in ("bray", "canberra"):
            form = form.removeprefix("curtis").lstrip("_")
            return (
                bray_curtis(f, w, eps, form=form or "abs")
                if name == "bray"
                else canberra(f, w, eps, form=form or "standard")
            )
        if name == "hamming":
            options = {"temperature": self.temperature, "threshold": self.threshold, "noisy": self.training}
            return hamming(f, w, eps, form=form or "soft", **options)
        if self.distance == "chebyshev_smooth":
            return chebyshev_smooth(f, w, eps, sharpness=self.sharpness)
        powers = {"manhattan": 1.0, "minkowski": self.p, "chebyshev": math.inf}
        if name in powers:
            return minkowski(f, w, eps, p=powers[name])
        return (euclidean if name == "euclidean" else cosine)(f, w, eps)

    def forward(self, features: Tensor) -> Tensor:
        if self.channels_first:
            features = features.movedim(1, -1)
        if features.shape[-1] != self.in_features:
            raise InputError(f"features: width {features.shape[-1]}; the prototypes have {self.in_features}")
        flat = features.reshape(-1, self.in_features)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))  # n log d underflows in half precision
        with torch.autocast(flat.device.type, enabled=False):
            exponent = self.n * (2 if self.exponent_on == "squared" else 1)
            scores = -exponent * self.distances(flat).log()
        scores = scores.view(*features.shape[:-1], self.num_classes)
        return scores.movedim(-1, 1) if self.channels_first else scores

    @torch.no_grad()
    def linear(self) -> tuple[Tensor, Tensor] | None:
        """(W (K, D), b (K,)) with the argmax of this head for every feature; None where there is none.

        Euclidean: 2w, -||w||^2; Mahalanobis: 2wP, -w^T P w; cosine: w / ||w||, 0. The probabilities differ.
        """
        w = self.weight.detach()
        if self.distance == "cosine":
            return F.normalize(w, dim=1), w.new_zeros(len(w))
        if self.distance == "euclidean":
            return 2 * w, -w.square().sum(1)
        if self.distance in LINEAR:
            precision = self.precision()
            wp = w * precision if precision.ndim == 1 else w @ precision
            return 2 * wp, -(wp * w).sum(1)
        return None


# ---------------------------------------------------------------- in a timm network


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the linear or harmonic layers that give a timm network's logits: one, or two where it is distilled.

    They may lie deeper than `get_classifier` says, behind a norm. InputError where there is none.
    """
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    parts = found if isinstance(found, tuple) else (found,)
    layers = [
        layer
        for part in parts
        if isinstance(part, nn.Module)
        for layer in part.modules()
        if part is layer or _outputs(layer) == getattr(model, "num_classes", None)
        if _outputs(layer) is not None
    ]
    if not layers:
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise InputError(f"{type(model).__name__}: its classifier is {kinds}; allowed: a linear layer")
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def _outputs(layer: nn.Module) -> int | None:
    """Outputs of a layer that a `HarmonicHead` can stand for, or of one; None for any other."""
    if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
        return layer.weight.shape[0]
    return layer.num_classes if isinstance(layer, HarmonicHead) else None


def classifier_name(model: nn.Module) -> str:
    """The name of a timm network's only classifier layer. InputError where it has none, or several."""
    names = classifier_names(model)
    if len(names) > 1:
        raise InputError(f"{type(model).__name__}: has no single classifier, but {', '.join(names)}")
    return names[0]


def with_harmonic_head(model: nn.Module, **settings: Any) -> nn.Module:
    """Puts a `HarmonicHead` in the place of a timm network's linear classifier, in place; the arguments are its own.

    A distilled network gets one for each of its classifiers, whose scores it averages as it averaged logits.
    """
    for name in classifier_names(model):
        old = model.get_submodule(name)
        classes, width = old.weight.shape[:2]
        head = HarmonicHead(width, classes, channels_first=isinstance(old, nn.Conv2d), **settings)
        model.set_submodule(name, head.to(old.weight.device, old.weight.dtype))
    return model


def save_harmonic(model: nn.Module, folder: Path, data: Data) -> None:
    """A timm folder, and its harmonic heads beside it.

    The folder's own classifier is the linear layer of the same argmax; a distance without one, and two classifiers,
    whose average has none, leave a backbone (num_classes 0), so that stock timm never opens a wrong classifier.
    """
    heads = {name: model.get_submodule(name) for name in classifier_names(model)}
    if not all(isinstance(head, HarmonicHead) for head in heads.values()):
        save_model(model, folder, data)
        return
    plain = copy.deepcopy(model)
    (name, first), several = next(iter(heads.items())), len(heads) > 1
    linear = None if several else first.linear()  # type: ignore[operator]
    if linear is None:
        plain.reset_classifier(0)
    else:
        plain.set_submodule(name, _linear_layer(first, *linear))  # type: ignore[arg-type]
    save_model(plain, folder, data)
    kept, inside = plain.state_dict(), tuple(f"{name}." for name in heads)
    state = {k: v.contiguous().cpu() for k, v in model.state_dict().items() if k.startswith(inside) or k not in kept}
    save_file(state, folder / FILES[0])  # the heads, and the norms that go with a classifier
    record = {"heads": {name: head.settings for name, head in heads.items()}, "linear_export": linear is not None}
    (folder / FILES[1]).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _linear_layer(head: HarmonicHead, weight: Tensor, bias: Tensor) -> nn.Module:
    classes, width = weight.shape
    layer: nn.Module = nn.Conv2d(width, classes, 1) if head.channels_first else nn.Linear(width, classes)
    layer.weight.data = weight.view(layer.weight.shape).clone()  # type: ignore[union-attr]
    layer.bias.data = bias.clone()  # type: ignore[union-attr]
    return layer


def load_harmonic(folder: Path, *, field: str = "model") -> nn.Module:
    """What `save_harmonic` wrote, with its heads; a folder without one is a plain timm network. InputError on a broken
    one."""
    model = load_model(folder, field=field)
    path = folder / FILES[1]
    if not path.is_file():
        return model
    try:
        record, state = json.loads(path.read_text(encoding="utf-8")), load_weights(folder / FILES[0])
        heads = {name: HarmonicHead(**settings) for name, settings in record["heads"].items()}
        classes = next(iter(heads.values())).num_classes
        if not record["linear_export"]:  # a backbone: the places of the heads are made anew
            pairs = len(heads) > 1 and "distillation" in signature(model.reset_classifier).parameters
            model.reset_classifier(classes, **({"distillation": True} if pairs else {}))
        for name, head in heads.items():
            model.set_submodule(name, head)
        model.load_state_dict({**model.state_dict(), **state})
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, StopIteration) as error:
        raise InputError(f"{field}.checkpoint = {folder}: not a harmonic head ({error})") from None
    model.num_classes = classes
    return model
