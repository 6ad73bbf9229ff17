"""Real images in memory by class, and the first images of a synthetic set: random, mixed, herded, clustered, noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_classification.data import Images
from kd_classification.engine.synthetic import encode
from kd_classification.sources import Split
from kdcore.data import mix
from kdcore.errors import InputError

Init = Literal["random", "mix", "noise", "herding", "kmeans", "full"]
NEEDS_NETWORK = ("herding", "kmeans")


class RealImages:
    """A labelled set in memory: uint8 (N, C, H, W), labels (N,) int64, and the indices of each class."""

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int):
        self.images, self.labels, self.num_classes = images, labels, num_classes
        self.indices = [torch.nonzero(labels == label).squeeze(1) for label in range(num_classes)]

    @classmethod
    def of(cls, images: Images, num_classes: int) -> RealImages:
        """From a data set of the package, at its size; image files are read and kept as 8 bits."""
        if images.split.images is not None:
            return cls(images.split.images, images.labels, num_classes)
        parts = [
            (batch.images * images.std + images.mean).mul(255).round().clamp(0, 255).byte()
            for batch in images.loader(256)
        ]
        return cls(torch.cat(parts), images.labels, num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> RealImages:
        return RealImages(self.images.to(device), self.labels.to(device), self.num_classes)

    def pixels(self, index: Tensor) -> Tensor:
        """float32 in [0, 1], (n, C, H, W)."""
        return self.images[index].float() / 255

    def sample(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        """Up to `count` different images of a class, float32 in [0, 1]; the generator is one of the CPU."""
        own = self.indices[label]
        chosen = torch.randperm(len(own), generator=generator)[:count]
        return self.pixels(own[chosen.to(own.device)])

    def loader(self, batch_size: int, seed: int) -> DataLoader:
        """Shuffled batches of pixels as `kd_classification.data.Batch`."""
        plain = (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
        images = Images(Split(self.labels.cpu().numpy(), self.images.cpu()), self.labels.cpu(), None, plain)
        return images.loader(batch_size, seed=seed, train=True)


# ---------------------------------------------------------------- class by class


class ClassBatch(NamedTuple):
    """Real pixels (n, C, H, W) of class `label` to match; none (n = 0) for a calibration step."""

    real: Tensor
    label: int


class ClassSteps:
    """One epoch is one iteration: a matching step for each class in order, then the calibration passes."""

    def __init__(self, real: RealImages, batch_size: int, passes: int, seed: int):
        self.real, self.batch_size, self.passes, self.seed = real, batch_size, passes, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.real.num_classes * (1 + self.passes)

    def __iter__(self) -> Iterator[ClassBatch]:
        nothing = self.real.images[:0].float()
        for step in range(len(self)):
            label = step % self.real.num_classes
            if step >= self.real.num_classes:
                yield ClassBatch(nothing, label)
                continue
            generator = torch.Generator().manual_seed(mix(self.seed, self.epoch, label))
            yield ClassBatch(self.real.sample(label, self.batch_size, generator), label)


# ---------------------------------------------------------------- the first images


def initial_pixels(
    real: RealImages,
    init: Init,
    per_class: int,
    *,
    factor: int = 1,
    generator: torch.Generator,
    network: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Pixels (classes * per_class, C, H, W) and labels, sorted by class; with init: full, every real image.

    random   real images of the class
    mix      factor^2 times as many, reduced and tiled (a multi-formation start)
    noise    normal around 1/2 with deviation 1/4, clipped
    herding  greedy choice whose mean feature follows the class's (Welling 2009); `network` gives features
    kmeans   the real image nearest to each of per_class centres (AST, arXiv 2310.10541); `network` gives logits

    `network` maps pixels to vectors (n, D). Raises InputError where a class has too few images.
    """
    parts = []
    for label, indices in enumerate(real.indices):
        needed = per_class * factor**2 if init == "mix" else per_class
        if init == "full":
            parts.append(real.pixels(indices))
        elif init == "noise":
            shape = (per_class, *real.images.shape[1:])
            parts.append((torch.randn(shape, generator=generator) / 4 + 0.5).clamp(0, 1))
        elif len(indices) < needed:
            raise InputError(
                f"synthetic.per_class = {per_class}: init '{init}' needs {needed} real images of each class, "
                f"class {label} has {len(indices)}"
            )
        elif init in NEEDS_NETWORK:
            assert network is not None
            vectors = torch.cat([network(real.pixels(part)) for part in indices.split(512)])
            choose = herd if init == "herding" else cluster
            parts.append(real.pixels(indices[choose(vectors.cpu(), per_class).to(indices.device)]))
        else:
            parts.append(encode(real.sample(label, needed, generator), factor if init == "mix" else 1))
    labels = torch.cat([torch.full((len(part),), label) for label, part in enumerate(parts)])
    return torch.cat([part.cpu() for part in parts]), labels


def herd(features: Tensor, count: int) -> Tensor:
    """Indices (count,) of rows of (n, D), each the one that keeps the mean of the chosen nearest to the mean of all."""
    target = features.mean(0)
    total = torch.zeros_like(target)
    free = torch.ones(len(features), dtype=torch.bool)
    chosen = []
    for k in range(count):
        distance = ((total + features) / (k + 1) - target).square().sum(1)
        distance[~free] = torch.inf
        best = int(distance.argmin())
        chosen.append(best)
        free[best] = False
        total = total + features[best]
    return torch.tensor(chosen)


def cluster(vectors: Tensor, count: int) -> Tensor:
    """Indices (count,) of the rows of (n, D) nearest to each of `count` k-means centres, no row twice."""
    from sklearn.cluster import KMeans

    values = vectors.double().numpy()
    centres = KMeans(n_clusters=count, n_init=1, random_state=0).fit(values).cluster_centers_
    chosen: list[int] = []
    for centre in centres:
        order = np.argsort(((values - centre) ** 2).sum(1), kind="stable")
        chosen.append(int(next(index for index in order if index not in chosen)))
    return torch.tensor(chosen)


def network_vectors(network: nn.Module, inputs: Callable[[Tensor], Tensor], kind: str) -> Callable[[Tensor], Tensor]:
    """Pixels -> logits (kind: kmeans) or pre-logits features (herding) of a network, without gradient."""

    def vectors(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            features = network.forward_features(inputs(pixels))
            return network.forward_head(features, pre_logits=kind == "herding")

    return vectors
