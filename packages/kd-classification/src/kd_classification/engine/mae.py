"""Masked autoencoder (arXiv 2111.06377): the pixels of hidden patches from the visible ones.

A teacher of masked-image methods is pre-trained by it, and their students add to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_classification.data import Batch
from kd_classification.engine.masked_vit import (
    Encoding,
    Mask,
    MaskedDecoder,
    draw_mask,
    encode,
    final_norm,
    fix_positions,
)
from kd_classification.engine.param_groups import weight_decay_groups
from kdcore.config import Config
from kdcore.distiller import Distiller, LossTerms, Player
from kdcore.errors import InputError


class DecoderConfig(Config):
    """The decoder of masked pre-training, thrown away after it. The defaults are MAE's."""

    width: int = Field(512, ge=4, description="width of the decoder's tokens")
    depth: int = Field(8, ge=1, description="blocks of the decoder")
    heads: int = Field(16, ge=1, description="attention heads of the decoder")


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """images (B, C, H, W) -> (B, L, p_h * p_w * C): patches row by row, pixels ordered row, column, channel."""
    rows, columns = images.shape[2] // patch[0], images.shape[3] // patch[1]
    cut = images.unflatten(3, (columns, patch[1])).unflatten(2, (rows, patch[0]))  # (B, C, rows, p_h, columns, p_w)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def normalised_patches(patches: Tensor) -> Tensor:
    """Each patch (..., P) by its own mean and deviation, sqrt(variance + 1e-6), the variance with P - 1.

    >>> normalised_patches(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    tensor([-0.9258, -0.4629,  0.0000,  1.3887])
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, L) where mask (B, L) is true; InputError where it is true nowhere."""
    if mask.shape != values.shape:
        raise InputError(f"mask: shape {tuple(mask.shape)}, expected {tuple(values.shape)}")
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum()


def masked_square_error(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Squared error, mean over the entries of a patch, then over the hidden patches of the whole batch.

    prediction, target (B, L, P), hidden (B, L) bool -> scalar, in float32 or better.
    """
    if prediction.shape != target.shape:
        raise InputError(f"prediction: shape {tuple(prediction.shape)}, the target's is {tuple(target.shape)}")
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return masked_mean((prediction.to(dtype) - target.to(dtype)).square().mean(-1), hidden)


class MaskedAutoencoder(Distiller):
    """Encoder and decoder of MAE. `student` is a timm VisionTransformer; its positions do not train.

    mask_ratio: share of hidden patches. norm_pix: targets normalised patch by patch.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        mask_ratio: float = 0.75,
        norm_pix: bool = False,
        decoder: DecoderConfig | None = None,
    ):
        super().__init__()
        self.student = fix_positions(student)
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
        vit, settings = cast(Any, student), decoder or DecoderConfig.model_validate({})
        self.patch: tuple[int, int] = tuple(vit.patch_embed.patch_size)
        self.patches: int = vit.patch_embed.num_patches
        self.decoder = MaskedDecoder(
            vit.embed_dim,
            vit.patch_embed.grid_size,
            self.patch[0] * self.patch[1] * vit.in_chans,
            prefix=vit.num_prefix_tokens,
            **settings.model_dump(),
        )

    def players(self) -> list[Player]:
        return [Player("student", self, param_groups=weight_decay_groups(self))]

    def draw(self, images: Tensor) -> Mask:
        """The mask of a batch: drawn once, for every network."""
        return draw_mask(len(images), self.patches, self.mask_ratio, device=images.device)

    def reconstruction(self, images: Tensor, mask: Mask, features: Iterable[int] = ()) -> tuple[Tensor, Encoding]:
        """(pixel loss, the encoder's pass with the residual stream after the blocks `features`)."""
        seen = encode(self.student, images, mask.keep, features=features)
        prediction = self.decoder(final_norm(self.student, seen.tokens), mask.keep)
        target = patchify(images, self.patch)
        if self.norm_pix:
            target = normalised_patches(target)
        return masked_square_error(prediction, target, mask.hidden), seen

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        pixel, _ = self.reconstruction(batch.images, self.draw(batch.images))
        return LossTerms(pixel=(1.0, pixel))
