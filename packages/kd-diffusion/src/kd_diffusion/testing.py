"""Tiny stock pipelines with random weights, for tests and for trying a config offline."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from torch import nn


def random_weights(network: nn.Module, seed: int = 0) -> Any:
    """Weights that make a random network's output depend on all of its inputs (several layers start at zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 1 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if parameter.ndim == 1 and bool((parameter == 1).all()) else noise)
    return network.eval()


def tiny_unet(**overrides: Any) -> Any:
    """UNet2DModel on 8x8 images of one channel with 10 classes and the class of none."""
    from diffusers import UNet2DModel

    arguments = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": 11,
        **overrides,
    }
    return random_weights(UNet2DModel(**arguments))


def unet_pipeline() -> Any:
    """ConsistencyModelPipeline in EDM's form around `tiny_unet`."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=1000, clip_denoised=False)
    return ConsistencyModelPipeline(tiny_unet(), scheduler)


def tiny_tokenizer(folder: Path, length: int = 16) -> Any:
    """CLIPTokenizer that reads letter by letter."""
    from transformers import CLIPTokenizer

    letters = [letter + end for letter in string.ascii_lowercase + ",." for end in ("", "</w>")]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def tiny_text_encoder(tokenizer: Any, width: int = 16, kind: str = "CLIPTextModel") -> Any:
    """A CLIP text encoder of two layers."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return random_weights(getattr(transformers, kind)(config), seed=1)


def tiny_vae(channels: int = 1) -> Any:
    """AutoencoderKL that halves the side of an image."""
    from diffusers import AutoencoderKL

    return random_weights(
        AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            mid_block_add_attention=False,
        ),
        seed=2,
    )


def tiny_text_unet(width: int = 16, **overrides: Any) -> Any:
    """UNet2DConditionModel on 8x8 latents of four channels."""
    from diffusers import UNet2DConditionModel

    arguments = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": width,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        **overrides,
    }
    return random_weights(UNet2DConditionModel(**arguments))


def text_pipeline(folder: Path) -> Any:
    """StableDiffusionPipeline on 16x16 images; `folder` takes the tokenizer's files."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from kd_diffusion.worlds.text import stable_diffusion_scheduler

    tokenizer = tiny_tokenizer(folder)
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=tiny_text_unet(),
        scheduler=stable_diffusion_scheduler(DDIMScheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_dit(seed: int = 0, **overrides: Any) -> Any:
    """DiTTransformer2DModel on 4x4 latents of four channels with 10 classes."""
    from diffusers import DiTTransformer2DModel

    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "norm_num_groups": 4,
        "sample_size": 4,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
        **overrides,
    }
    return random_weights(DiTTransformer2DModel(**arguments), seed)


def flow_pipeline(shift: float = 1.0) -> Any:
    """DiTPipeline of a rectified flow on 8x8 images of one channel."""
    from diffusers import DiTPipeline, FlowMapEulerDiscreteScheduler

    return DiTPipeline(tiny_dit(), tiny_vae(), FlowMapEulerDiscreteScheduler(shift=shift))


def tiny_wan(seed: int = 0) -> Any:
    """WanTransformer3DModel on latents of four channels."""
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return random_weights(network, seed)


def wan_pipeline(experts: int = 2) -> Any:
    """WanPipeline with the scheduler and the boundary of Wan 2.2; its VAE takes 4 n + 1 frames, 4x4 pixels to one."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, 0.0, -0.1, 0.2],
        latents_std=[1.0, 2.0, 1.5, 0.5],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_letters(), pad_token="<pad>", eos_token="</s>")
    config = UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=random_weights(UMT5EncoderModel(config), 3),
        vae=random_weights(vae, 4),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=tiny_wan(0),
        transformer_2=tiny_wan(1) if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
    )


def _letters() -> Any:
    """A tokenizer that reads letter by letter and ends with </s>."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    letters = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
