"""Stochastic weight averaging (arXiv 1803.05407) of a network in training, and test-time augmentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.optim.swa_utils import AveragedModel, update_bn

from kdcore.data import seeded, set_epoch


def weight_average(model: nn.Module) -> AveragedModel:
    """An empty running mean of `model`'s weights: `.update_parameters(model)` adds a snapshot.

        w_swa <- w_swa + (w - w_swa) / (n + 1)

    Its parameters take no gradient; as a submodule of a distiller it is part of the checkpoints.
    """
    average = AveragedModel(model)
    average.requires_grad_(False)
    return average


def recompute_statistics(model: nn.Module, loader: Iterable[Any]) -> None:
    """Batch-norm statistics of `model` over one pass of the loader, all batches weighted alike, in place.

    Averaged weights have no statistics of their own. The pass has the order, augmentation and dropout of a fixed seed,
    so that a second call changes nothing.
    """
    set_epoch(loader, 0)
    with seeded(0):
        update_bn(loader, model, device=next(model.parameters()).device)


class TestTimeAugmented(nn.Module):
    """Mean of a network's logits over five views of each image: (B, C, H, W) -> (B, K).

    The image, its horizontal and vertical mirror images, the centre of a 1.1 times enlarged one, and the image turned
    by `angle` degrees. `black` (C,) is what is rotated in, in the normalisation of the images.
    """

    __test__ = False  # not a test, whatever its name begins with

    def __init__(self, model: nn.Module, *, angle: float = 5.0, black: Sequence[float] = (0.0,)):
        super().__init__()
        self.model, self.angle, self.black = model, angle, list(black)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.model(view) for view in self.views(images)]).mean(0)

    def views(self, images: Tensor) -> list[Tensor]:
        """The five views, each of the shape of `images`."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as TF

        height, width = images.shape[-2:]
        larger = interpolate(images, (int(height * 1.1), int(width * 1.1)), mode="bilinear", antialias=True)
        turned = TF.rotate(images, self.angle, InterpolationMode.BILINEAR, fill=self.black)
        return [images, images.flip(-1), images.flip(-2), TF.center_crop(larger, [height, width]), turned]
