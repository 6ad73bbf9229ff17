"""Tokens of timm's vision transformers: after the final norm, class token and patches apart, with masked patches.

Register tokens and DeiT's distillation token are neither class nor patch; they are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_segmentation.engine.tapped import inner
from kdcore.errors import InputError


@dataclass(frozen=True)
class Tokens:
    """cls (B, D) and patches (B, N, D)."""

    cls: Tensor
    patches: Tensor


def vit_of(network: nn.Module, field: str = "network") -> nn.Module:
    """The timm transformer itself, or that inside a segmentor with mmseg's TIMMBackbone."""
    network = inner(network)
    backbone = getattr(network, "backbone", network)
    vit = getattr(backbone, "timm_model", backbone)
    vit = getattr(vit, "model", vit)
    if not hasattr(vit, "forward_features") or not hasattr(vit, "blocks") or not hasattr(vit, "patch_embed"):
        raise InputError(
            f"{field}: a {type(vit).__name__} is no vision transformer of timm with patch_embed and blocks"
        )
    if getattr(vit, "num_prefix_tokens", 0) < 1:
        raise InputError(f"{field}: the transformer has no class token")
    return vit


def tokens_of(vit: nn.Module, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tokens:
    """Final tokens of `images` (B, 3, H, W); where `mask` (B, N) is True the patch embedding is `mask_token` (d,)."""
    if mask is None or mask_token is None:
        return split(vit, final(vit, vit.forward_features(images)))
    with masked(vit, mask, mask_token):
        return split(vit, final(vit, vit.forward_features(images)))


def last_block(vit: nn.Module, x: Tensor) -> Tokens:
    """Tokens of what the last block gave, after the final norm."""
    norm = getattr(vit, "norm", None)
    return split(vit, final(vit, x) if isinstance(norm, nn.Identity | None) else norm(x))


def final(vit: nn.Module, x: Tensor) -> Tensor:
    """Tokens of `forward_features` after the final norm: the transformer's own, which it has run, that of its pooled
    output, or one without learned scale where both were cut off, as they are in a backbone."""
    if not isinstance(getattr(vit, "norm", None), nn.Identity | None):
        return x
    norm = getattr(vit, "fc_norm", None)
    if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
        return norm(x)
    return F.layer_norm(x, x.shape[-1:])


def split(vit: nn.Module, x: Tensor) -> Tokens:
    """(B, prefix + N, D) as class token and patches."""
    return Tokens(x[:, 0], x[:, vit.num_prefix_tokens :])


@contextmanager
def masked(vit: nn.Module, mask: Tensor, token: Tensor) -> Iterator[None]:
    """Inside, patch embeddings at masked places are `token`, before positions are added."""

    def replace(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        places = mask.reshape(*output.shape[:-1], 1)
        return torch.where(places, token.to(output.dtype), output)

    handle = vit.patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def draw_patch_masks(count: int, patches: int, *, probability: float, ratio: float) -> Tensor:
    """(count, patches) bool on the CPU: the first floor(probability * count) images have floor(ratio * patches) random
    masked patches each, the others none."""
    chosen = int(probability * count)
    mask = torch.zeros(count, patches, dtype=torch.bool)
    order = torch.rand(chosen, patches).argsort(dim=1)
    mask[:chosen] = order < int(ratio * patches)
    return mask
