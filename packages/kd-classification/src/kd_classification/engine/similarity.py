"""How well a source model's outputs suit a labelled target task: PARC, CKA, RSA, H-score, k-NN, LEEP and NCE.

Each takes what a frozen source says of n labelled target images - features (n, D), or probabilities (n, C_s) over its
own classes - and gives one number, higher for a better suited source. Nothing is trained, and the source's label space
need not be the target's. All compute in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdcore.errors import InputError
from kdcore.losses import cka_linear


def parc(features: Tensor, labels: Tensor, *, components: int | None = None) -> float:
    """Pairwise annotation representation comparison (Bolya et al., arXiv 2111.06977), in [-1, 1].

        Spearman( upper triangle of 1 - Pearson(rows of F), of 1 - Pearson(rows of one-hot Y) )

    F (n, D) has its columns standardised (constant ones dropped), optionally reduced to `components` principal
    components before; labels (n,). Two one-hot rows are 0 apart for one class and C / (C - 1) for two, so only whether
    the labels differ counts: the values are taken as such, free of the rounding that would break the ties.

    >>> f = torch.tensor([[1.0, 0, 2], [2, 0, 2], [0, 3, 1], [0, 2, 0]])
    >>> round(parc(f, torch.tensor([0, 0, 1, 1])), 6)
    0.828079
    """
    features = _features(features, labels)
    apart = _upper((labels[:, None] != labels[None, :]).double())
    if float(apart.min()) == float(apart.max()):
        raise InputError("labels: of one class, or each of another; PARC compares pairs of one class with the others")
    return spearman(_upper(row_distances(_reduced(features, components))), apart)


def rsa(features: Tensor, reference: Tensor) -> float:
    """Representation similarity analysis (arXiv 1904.11740): `parc` against a reference model's features (n, D') of the
    same images, a model trained on the target, in place of the labels."""
    if features.ndim != 2 or reference.ndim != 2 or len(features) != len(reference):
        raise InputError(
            f"features {tuple(features.shape)}, reference {tuple(reference.shape)}: allowed: (n, D), (n, D')"
        )
    return spearman(_upper(row_distances(features.double())), _upper(row_distances(reference.double())))


def cka(features: Tensor, labels: Tensor) -> float:
    """Linear CKA of features (n, D) and one-hot labels, in [0, 1] (arXiv 1905.00414)."""
    return float(cka_linear(_features(features, labels), _one_hot(labels)))


def h_score(features: Tensor, labels: Tensor) -> float:
    """tr( pinv(cov F) cov(E[F | Y]) ) (arXiv 2212.10082): how much of the features' variance is between classes."""
    features = _features(features, labels)
    centred = features - features.mean(dim=0)
    means = torch.stack([centred[labels == k].mean(dim=0) for k in labels.unique()])
    between = means[torch.unique(labels, return_inverse=True)[1]]
    covariance, explained = centred.T @ centred, between.T @ between
    return float(torch.trace(torch.linalg.pinv(covariance, hermitian=True) @ explained))


def knn_accuracy(features: Tensor, labels: Tensor, k: int = 1) -> float:
    """Leave-one-out accuracy of k nearest neighbours, Euclidean; the nearest wins a tied vote."""
    from sklearn.neighbors import NearestNeighbors

    features = _features(features, labels)
    if not 0 < k < len(features):
        raise InputError(f"k = {k}: allowed: 1 to {len(features) - 1}, the other images")
    order = NearestNeighbors(n_neighbors=k).fit(features.numpy()).kneighbors(return_distance=False)
    votes = labels[torch.from_numpy(order)]
    counts = (votes[:, :, None] == votes[:, None, :]).sum(dim=2)
    best = votes.gather(1, counts.argmax(dim=1, keepdim=True))[:, 0]
    return float((best == labels).double().mean())


def leep(probabilities: Tensor, labels: Tensor) -> float:
    """LEEP (arXiv 2002.12462): mean log sum_z P(y | z) q_z of source probabilities q (n, C_s), at most 0.

    P(y, z) is the mean of q_z over the images of label y.
    """
    q = _features(probabilities, labels, "probabilities")
    joint = _one_hot(labels).T @ q / len(q)
    conditional = joint / joint.sum(dim=0).clamp_min(torch.finfo(q.dtype).tiny)
    return float((q @ conditional.T).gather(1, _codes(labels)[:, None]).log().mean())


def nce(probabilities: Tensor, labels: Tensor) -> float:
    """Negative conditional entropy -H(Y | Z) of the labels given the source's answers Z (arXiv 1908.08142), nats."""
    q = _features(probabilities, labels, "probabilities")
    answers = torch.zeros_like(q).scatter_(1, q.argmax(dim=1, keepdim=True), 1.0)
    return leep(answers, labels)


ON_FEATURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "parc": parc,
    "cka": cka,
    "h_score": h_score,
    "knn": knn_accuracy,
}
ON_PROBABILITIES: dict[str, Callable[[Tensor, Tensor], float]] = {"leep": leep, "nce": nce}


def similarity_scores(
    features: Tensor, probabilities: Tensor, labels: Tensor, *, components: int | None = None
) -> dict[str, float]:
    """Every score that needs no reference model, by name. `components`: of PARC."""
    scores = {name: score(features, labels) for name, score in ON_FEATURES.items()}
    if components is not None:
        scores["parc"] = parc(features, labels, components=components)
    return {**scores, **{name: score(probabilities, labels) for name, score in ON_PROBABILITIES.items()}}


# ---------------------------------------------------------------- parts


def row_distances(features: Tensor) -> Tensor:
    """1 - Pearson correlation of every two rows, (n, n), of features (n, D) with standardised columns.

    Rounded to 12 digits, so that repeated images stay tied. Raises InputError for a row without variance, which
    correlates with nothing.
    """
    spread = features.std(dim=0)
    kept = spread > 1e-12 * features.abs().amax(dim=0).clamp_min(1e-300)
    f = (features[:, kept] - features[:, kept].mean(dim=0)) / spread[kept]
    rows = f - f.mean(dim=1, keepdim=True)
    norms = rows.norm(dim=1)
    constant = norms <= 1e-12 * f.norm(dim=1).clamp_min(1e-300)
    if f.shape[1] < 2 or bool(constant.any()):
        raise InputError(f"features: {int(constant.sum()) or len(f)} rows do not vary and correlate with nothing")
    unit = rows / norms[:, None]
    return ((1 - unit @ unit.T) * 1e12).round() / 1e12


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of (m,), (m,), ties at their average rank; 0 where one side is constant."""
    ranks = [average_ranks(values) for values in (x, y)]
    a, b = (values - values.mean() for values in ranks)
    norm = a.norm() * b.norm()
    return float(a @ b / norm) if norm > 0 else 0.0


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 on, (m,) float64; equal values share the mean of theirs.

    >>> average_ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def _upper(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(*matrix.shape, offset=1)
    return matrix[rows, columns]


def _reduced(features: Tensor, components: int | None) -> Tensor:
    if components is None:
        return features
    from sklearn.decomposition import PCA

    count = min(components, *features.shape)
    return torch.from_numpy(PCA(count, random_state=0).fit_transform(features.numpy()))


def _features(features: Tensor, labels: Tensor, name: str = "features") -> Tensor:
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels) or len(labels) < 3:
        raise InputError(
            f"{name} {tuple(features.shape)}, labels {tuple(labels.shape)}: allowed: (n, D), (n,) of n >= 3 images"
        )
    features = features.detach().double().cpu()
    if not bool(torch.isfinite(features).all()):
        raise InputError(f"{name}: not all finite")
    return features


def _codes(labels: Tensor) -> Tensor:
    return torch.unique(labels, return_inverse=True)[1]


def _one_hot(labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(_codes(labels)).double()
