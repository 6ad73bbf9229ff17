"""Weights of training problems from how often the student solves them, and what they do to the gradient.

A weight is a function of the pass rate p in [0, 1]; see `Weighter.raw`. It becomes the column `kd_weight`, which every
objective of the engine multiplies its examples with, so any loss can be weighted like this:

    weighter = Weighter("paced")
    rows = weighter.attach(rows, rates)                  # a data set with `kd_weight`, without the rows of weight 0
    student trained on rows by any objective with reduction "sequence" minimises
        (1/B) sum_x w~(x) D(x),    D(x) a mean over the response's tokens

Source: PACED (arXiv 2603.11178): w(p) = p^a (1 - p)^b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_llm.engine.rollouts import evaluating
from kd_llm.engine.rows import sum_over_processes
from kdcore.errors import InputError

Scheme = Literal["paced", "unweighted", "filter", "inverse"]
Normalisation = Literal["dataset", "batch", "none"]


def competence_weight(p: Tensor, a: float = 1.0, b: float = 1.0) -> Tensor:
    """w(p) = p^a (1 - p)^b, with 0^0 = 1: largest at a / (a + b), where it is a^a b^b / (a + b)^(a + b).

    Any shape, p in [0, 1] -> the same shape. InputError for p outside of [0, 1] and for negative exponents.

    >>> competence_weight(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    tensor([0.0000, 0.1875, 0.2500, 0.0000])
    """
    if not (a >= 0 and b >= 0 and math.isfinite(a) and math.isfinite(b)):
        raise InputError(f"competence_weight: a = {a}, b = {b}; allowed: finite numbers of 0 or more")
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise InputError("competence_weight: a pass rate is outside of [0, 1]")
    return p.pow(a) * (1 - p).pow(b)


@dataclass(frozen=True)
class Weighter:
    """From pass rates to weights of examples.

    scheme: `paced` is (E2) of the paper; `unweighted` is 1; `filter` is 1 for low <= p <= high and else 0; `inverse`
        is 1 - 4 p (1 - p), the ablation that trains most on what is mastered or hopeless.
    normalise: `dataset` divides by the mean over the rows that are trained on, so that their mean weight is 1 and a
        learning rate means the same for every scheme; `none` leaves w as it is; `batch` leaves it too, and the
        objective divides by the mean over the optimiser step.
    """

    scheme: Scheme = "paced"
    a: float = 1.0
    b: float = 1.0
    low: float = 0.2
    high: float = 0.8
    normalise: Normalisation = "dataset"

    def raw(self, p: Tensor) -> Tensor:
        """w(p), any shape, before normalisation."""
        if self.scheme == "paced":
            return competence_weight(p, self.a, self.b)
        if self.scheme == "unweighted":
            return torch.ones_like(p)
        if self.scheme == "filter":
            return ((p >= self.low) & (p <= self.high)).to(p.dtype)
        return 1 - 4 * p * (1 - p)

    def weights(self, p: Tensor) -> Tensor:
        """Pass rates (N,) of all problems -> weights (N,).

        With `dataset` the mean is over the weights that are not 0: those rows alone are trained on. Dropping the
        others changes the expected gradient by nothing then, since both are sum w g / sum w.
        Raises InputError where every weight is 0.
        """
        w = self.raw(p)
        kept = w > 0
        if not bool(kept.any()):
            rates = f"{float(p.min()):g} to {float(p.max()):g}" if len(p) else "none"
            raise InputError(
                f"weighting '{self.scheme}': every problem has weight 0 (pass rates: {rates}); "
                "allowed: problems of which the student solves some samples and misses others"
            )
        return w / w[kept].mean() if self.normalise == "dataset" else w

    def attach(self, rows: Any, p: Tensor) -> Any:
        """A `datasets.Dataset` (or list of dicts) of N rows with `kd_weight`, without the rows of weight 0."""
        if len(rows) != len(p):
            raise InputError(f"weighting: {len(rows)} rows and {len(p)} pass rates; allowed: one for each row")
        w = self.weights(p.double()).tolist()
        kept = [index for index, weight in enumerate(w) if weight > 0]
        if isinstance(rows, list):
            return [{**rows[index], "kd_weight": w[index]} for index in kept]
        return rows.select(kept).add_column("kd_weight", [w[index] for index in kept])


def normalised_over_step(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of one optimiser step, `kd_weight` divided by its mean over the step and all processes.

    Where every weight is 0 they stay 0, and the step has no gradient.
    """
    total = torch.stack([batch["kd_weight"].double().sum() for batch in batches]).sum()
    count = torch.tensor(float(sum(len(batch["kd_weight"]) for batch in batches)), dtype=torch.float64)
    sums = sum_over_processes(torch.stack([total, count.to(total.device)]))
    mean = sums[0] / sums[1]
    scale = torch.where(mean > 0, 1 / mean.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return [{**batch, "kd_weight": batch["kd_weight"] * scale.to(batch["kd_weight"])} for batch in batches]


# ---------------------------------------------------------------- the diagnostic


@dataclass(frozen=True)
class SNR:
    """Signal and noise of a set of problems with gradients g_i, i = 1..n.

    signal: ||mean g||^2; noise: mean ||g_i - mean g||^2; norm: mean ||g_i||.
    """

    signal: float
    noise: float
    norm: float
    n: int

    @property
    def ratio(self) -> float:
        """Signal over noise. Without any signal its expectation is still about 1/n: compare sets of one size."""
        return self.signal / self.noise if self.noise > 0 else math.inf if self.signal > 0 else 0.0

    @property
    def unbiased(self) -> float:
        """The same with the noise's own share taken off the signal and n - 1 in the noise; may be negative."""
        if self.n < 2:
            return math.nan
        noise = self.noise * self.n / (self.n - 1)
        return (self.signal - noise / self.n) / noise if noise > 0 else self.ratio


def gradient_snr(gradients: Iterable[Tensor]) -> SNR:
    """Cross-problem gradient SNR, ||mean g||^2 / mean ||g_i - mean g||^2, of flat gradients (P,), one at a time.

    Three sums are kept, in float64: memory is that of one gradient. InputError where there is none.

    >>> gradient_snr([torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])]).ratio   # mean (1, 1), noise 1
    2.0
    """
    total: Tensor | None = None
    squares, norms, n = 0.0, 0.0, 0
    for gradient in gradients:
        g = gradient.double()
        total = g.clone() if total is None else total.add_(g)
        square = float(g.square().sum())
        squares, norms, n = squares + square, norms + math.sqrt(square), n + 1
    if total is None:
        raise InputError("gradient_snr: no gradient; allowed: one or more")
    signal = float((total / n).square().sum())
    return SNR(signal, max(0.0, squares / n - signal), norms / n, n)


def problem_gradients(student: nn.Module, objective: Any, batches: Iterable[dict[str, Any]]) -> Iterable[Tensor]:
    """The flat gradient (P,) of the objective for each batch (of one problem), in the trainable parameters' order.

    Without dropout: its noise is not the problems'.
    """
    from kd_llm.engine.objective import StudentCall

    parameters = [p for p in student.parameters() if p.requires_grad]
    for batch in batches:
        with evaluating(student):
            call = StudentCall(student, objective.shift, student.forward)
            loss = objective.loss(call, batch, None).total()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        yield torch.cat([g.reshape(-1) for g in flat])


def pass_rate_bins(p: Tensor, bins: int = 5) -> Tensor:
    """(N,) -> (N,) int64, the bin of each rate among `bins` of equal width; 1 is in the last."""
    return (p * bins).floor().clamp(0, bins - 1).long()


def binned_snr(
    p: Tensor, gradients: Callable[[Sequence[int]], Iterable[Tensor]], per_bin: int, seed: int, *, bins: int = 5
) -> tuple[dict[str, SNR], float]:
    """The SNR of each bin of the pass rates p (N,), and the share of the gradient norm of all problems that comes from
    p = 0 and p = 1.

    gradients: numbers of problems -> their flat gradients. Of each bin `per_bin` problems are drawn by the seed, or all
    it has; the names are bin1 to bin5, empty ones are left out.
    """
    where = pass_rate_bins(p, bins)
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))
    found, edge, whole = {}, 0.0, 0.0
    for number in range(bins):
        members = order[where[order] == number]
        chosen = members[:per_bin].tolist()
        if not chosen:
            continue
        norms: list[float] = []
        found[f"bin{number + 1}"] = gradient_snr(_with_norms(gradients(chosen), norms))
        weight = len(members) / len(chosen)
        whole += weight * sum(norms)
        edge += weight * sum(norm for i, norm in zip(chosen, norms, strict=True) if p[i] in (0, 1))
    return found, edge / whole if whole else 0.0


def _with_norms(gradients: Iterable[Tensor], norms: list[float]) -> Iterator[Tensor]:
    for gradient in gradients:
        norms.append(float(gradient.norm()))
        yield gradient
