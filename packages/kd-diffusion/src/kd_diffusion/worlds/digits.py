"""Class-conditional pipelines with random weights: a pixel U-Net in EDM's form, and a latent DiT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kd_diffusion.data import Data
from kd_diffusion.engine.process import TABLE
from kd_diffusion.worlds.vae import created

SIGMA_MAX = 80.0


def consistency_pipeline(network: nn.Module) -> Any:
    """ConsistencyModelPipeline of a network in EDM's form: with sigma_min 0 the scheduler's scalings are EDM's own."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=TABLE,
        sigma_min=0.0,
        sigma_max=SIGMA_MAX,
        sigma_data=0.5,
        s_noise=1.0,
        rho=7.0,
        clip_denoised=False,
    )
    return ConsistencyModelPipeline(network, scheduler)


def build_digits_unet(data: Data, network: Mapping[str, Any] | None = None) -> Any:
    """ConsistencyModelPipeline of a UNet2DModel on the data's pixels; the last class embedding is the null class."""
    from diffusers import UNet2DModel

    arguments = {
        "sample_size": data.image_size,
        "in_channels": data.channels,
        "out_channels": data.channels,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [16, 48],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 16,
        "num_class_embeds": data.num_classes + 1,
        "resnet_time_scale_shift": "scale_shift",
        **(network or {}),
    }
    return consistency_pipeline(created(UNet2DModel, arguments, "world.network"))


def build_digits_dit(data: Data, vae: nn.Module, network: Mapping[str, Any] | None = None) -> Any:
    """DiTPipeline on the latents of `vae`. The null class is `num_embeds_ada_norm`.

    The stock DiTPipeline guides with class 1000: guidance_scale above 1 works in it only with num_embeds_ada_norm 1000.
    """
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    arguments = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "in_channels": vae.config.latent_channels,
        "out_channels": vae.config.latent_channels,
        "num_layers": 4,
        "norm_num_groups": 8,
        "sample_size": latent_size(vae, data),
        "patch_size": 2,
        "num_embeds_ada_norm": data.num_classes,
        **(network or {}),
    }
    transformer = created(DiTTransformer2DModel, arguments, "world.network")
    labels = dict(enumerate(data.class_names))
    return DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False), id2label=labels)


def latent_size(vae: nn.Module, data: Data) -> int:
    """Side of the latents of the data's images."""
    return data.image_size // 2 ** (len(vae.config.block_out_channels) - 1)
