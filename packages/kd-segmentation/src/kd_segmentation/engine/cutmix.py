"""CutMix of unlabelled images and of what a network says of them (arXiv 1906.01916, as CPS and MGD use it)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_segmentation.engine.batch import SegBatch, upsampled
from kdcore.errors import InputError


def boxes(
    count: int,
    size: tuple[int, int],
    *,
    number: int = 3,
    proportion: tuple[float, float] = (0.25, 0.5),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Boxes (count, number, 4) as top, left, bottom, right in pixels, int64, drawn on the CPU.

    Each of the `number` boxes has a share p ~ U(proportion) of the image, a side ratio drawn log-uniformly, both sides
    times sqrt(1 / number), and a uniform place inside: height share exp(U(0, 1) ln p), width share p / height share.
    """
    low, high = proportion
    p = low + (high - low) * torch.rand(count, number, generator=generator)
    rows = torch.exp(torch.rand(count, number, generator=generator) * p.log())
    shares = torch.stack([rows, p / rows], dim=-1) * number**-0.5
    whole = torch.tensor(size, dtype=shares.dtype)
    sides = (shares * whole).round()
    corner = ((whole - sides) * torch.rand(count, number, 2, generator=generator)).round()
    return torch.cat([corner, corner + sides], dim=-1).long()


def toggled(rectangles: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (B, 1, H, W), bool: every box of (B, K, 4) inverts its pixels, an overlap of two is outside."""
    height, width = size
    rows = torch.arange(height, device=rectangles.device)[None, None, :, None]
    columns = torch.arange(width, device=rectangles.device)[None, None, None, :]
    top, left, bottom, right = (side[..., None, None] for side in rectangles.unbind(-1))
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return (inside.sum(dim=1, keepdim=True) % 2).bool()


def draw_masks(images: Tensor, *, number: int = 3, proportion: tuple[float, float] = (0.25, 0.5)) -> Tensor:
    """One mask an image, (B, 1, H, W) bool, on the device of the images."""
    size = (images.shape[-2], images.shape[-1])
    return toggled(boxes(len(images), size, number=number, proportion=proportion), size).to(images.device)


def mixed(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """(1 - m) first + m second, for images, logits or labels with the mask's sizes."""
    return torch.where(mask, second, first)


@torch.no_grad()
def pseudo_labels(network: nn.Module, first: Tensor, second: Tensor, mask: Tensor, *, together: bool = True) -> Tensor:
    """argmax_c of the mixed logits of the unmixed images, (B, H, W) int64.

    The mask is binary, so the labels are mixed in the place of the logits. `together`: both images in one pass, which
    gives the same for a network in eval mode.
    """
    size = (first.shape[-2], first.shape[-1])
    if together:
        labels = predicted(network, torch.cat([first, second]), size).chunk(2)
    else:
        labels = [predicted(network, images, size) for images in (first, second)]
    return mixed(labels[0], labels[1], mask[:, 0])


def predicted(network: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
    """argmax of the logits at the size of the image, (B, H, W) int64."""
    return full_logits(network, images, size).argmax(dim=1)


def full_logits(network: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits at the size of the image, resized as the network's own head resizes."""
    inner = getattr(network, "network", network)
    return upsampled(network(images), size, align_corners=bool(getattr(inner, "align_corners", False)))


def two_streams(batch: SegBatch) -> tuple[Tensor, Tensor]:
    """The two unlabelled streams of a batch. Raises InputError where there are not two of one shape."""
    if len(batch.unlabelled) != 2 or batch.unlabelled[0].shape != batch.unlabelled[1].shape:
        shapes = [tuple(stream.shape) for stream in batch.unlabelled]
        raise InputError(
            f"train_dataloader.dataset: two unlabelled streams of one size are needed, got {shapes}; "
            "use StreamDataset(labelled=..., unlabelled=..., streams=2) with crops of one size"
        )
    return batch.unlabelled[0], batch.unlabelled[1]
