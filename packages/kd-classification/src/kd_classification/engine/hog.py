"""Histograms of oriented gradients on the images' device: a target of masked image modelling that needs no network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.errors import InputError


def hog(images: Tensor, cell: int = 8, orientations: int = 9) -> Tensor:
    """Gradient histograms of each cell and channel, without block normalisation.

    images (B, C, H, W) of values 0 to 255 -> (B, C, H / cell, W / cell, orientations). Central differences without the
    factor 1/2, 0 along the border; unsigned angle atan2(row, column) in degrees modulo 180, in bins of equal width;
    each bin is the sum of the magnitudes divided by the pixels of a cell. In float32 or better.

    InputError where the cells do not tile the image.
    """
    if images.shape[-2] % cell or images.shape[-1] % cell:
        raise InputError(f"cell = {cell}: does not divide images of {images.shape[-2]}x{images.shape[-1]} pixels")
    values = images.to(torch.promote_types(images.dtype, torch.float32))
    rows, columns = torch.zeros_like(values), torch.zeros_like(values)
    rows[..., 1:-1, :] = values[..., 2:, :] - values[..., :-2, :]
    columns[..., 1:-1] = values[..., 2:] - values[..., :-2]
    angle = torch.rad2deg(torch.atan2(rows, columns)) % 180
    bins = torch.div(angle, 180 / orientations, rounding_mode="floor") % orientations  # 180 degrees are 0
    magnitude = torch.hypot(rows, columns)
    histograms = [F.avg_pool2d(magnitude * (bins == index), cell) for index in range(orientations)]
    return torch.stack(histograms, dim=-1)


def whitened(features: Tensor) -> Tensor:
    """Each vector (..., D) less its mean and by its deviation: LayerNorm without parameters, eps 1e-5.

    A constant vector becomes 0.
    """
    return F.layer_norm(features, features.shape[-1:])


def hog_targets(images: Tensor, patch: int, *, cells: int = 2, orientations: int = 9) -> Tensor:
    """A target for each patch: the whitened histograms of its cells x cells cells.

    images (B, C, H, W) of values 0 to 255 -> (B, L, cells * cells * orientations * C), ordered cell row, cell column,
    orientation, channel: 108 values for 16-pixel patches of colour images in 8-pixel cells.
    """
    if patch % cells:
        raise InputError(f"cells = {cells}: does not divide patches of {patch} pixels")
    found = whitened(hog(images, patch // cells, orientations))
    parts = found.unflatten(3, (-1, cells)).unflatten(2, (-1, cells))  # (B, C, rows, cell, columns, cell, bins)
    return parts.permute(0, 2, 4, 3, 5, 6, 1).flatten(3).flatten(1, 2)
