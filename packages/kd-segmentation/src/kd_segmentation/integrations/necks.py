"""Necks in mmseg's registry."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor

from kdcore.errors import InputError


@MODELS.register_module()
class BilinearPyramid(BaseModule):
    """The maps of a plain transformer, all of one size, resized bilinearly to a pyramid; nothing is learned.

    scales: one factor for each map, 4 for a map of a quarter of the stride.
    """

    def __init__(self, scales: Sequence[float] = (4, 2, 1, 0.5)):
        super().__init__()
        self.scales = tuple(scales)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(B, C, h, w) each -> (B, C, scale * h, scale * w) each. Raises InputError for another number of maps."""
        if len(maps) != len(self.scales):
            raise InputError(f"BilinearPyramid: {len(self.scales)} scales for {len(maps)} maps of the backbone")
        return tuple(
            x if scale == 1 else F.interpolate(x, scale_factor=float(scale), mode="bilinear", align_corners=False)
            for x, scale in zip(maps, self.scales)
        )
