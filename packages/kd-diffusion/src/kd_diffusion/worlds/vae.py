"""The autoencoder of the small latent worlds: trained on the data's images, stored as a stock AutoencoderKL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_diffusion.data import Data
from kdcore.distiller import Distiller, LossTerms
from kdcore.errors import InputError

KL_WEIGHT = 1e-4


def build_vae(data: Data, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A random AutoencoderKL for the data's images that halves their side; `overrides` are diffusers' arguments.

    One latent channel: drawings of 16x16 say no more, and latents that repeat themselves look almost clean at the
    noise levels where a network should decide what to draw.
    """
    from diffusers import AutoencoderKL

    arguments = {
        "in_channels": data.channels,
        "out_channels": data.channels,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "latent_channels": 1,
        "norm_num_groups": 2,  # groups of few channels forget how much ink an image has
        "sample_size": data.image_size,
        "scaling_factor": 1.0,
        "mid_block_add_attention": False,
        **(overrides or {}),
    }
    return created(AutoencoderKL, arguments, "vae")


def created(model_class: Any, arguments: Mapping[str, Any], field: str) -> Any:
    """An instance of a diffusers class; InputError that names `field` when it refuses the arguments."""
    try:
        return model_class(**arguments)
    except (TypeError, ValueError, AssertionError, KeyError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{field}: {model_class.__name__} refuses {dict(arguments)} ({error})") from None


class VAEDistiller(Distiller):
    """Reconstruction error plus a light pull of the posterior to N(0, I), on batches with `pixels`."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.student = vae

    def loss(self, batch: dict[str, Tensor], player: str = "student") -> LossTerms:
        pixels = batch["pixels"]
        posterior = self.student.encode(pixels).latent_dist
        decoded = self.student.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return LossTerms(reconstruction=(1.0, F.mse_loss(decoded, pixels)), kl=(KL_WEIGHT, kl))


@torch.no_grad()
def encode(vae: nn.Module, pixels: Tensor, batch_size: int = 256) -> Tensor:
    """Scaled latents (N, c, h, w): the posterior's mean times scaling_factor."""
    latents = [vae.encode(part).latent_dist.mean for part in pixels.split(batch_size)]
    return torch.cat(latents) * vae.config.scaling_factor


def fit_scale(vae: nn.Module, pixels: Tensor) -> None:
    """Sets scaling_factor, so that the latents of `pixels` have deviation 1."""
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=float(1 / encode(vae, pixels).std()))
