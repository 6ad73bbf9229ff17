"""Tiny stock text-to-image pipelines of every kind with random weights: Stable Diffusion, SDXL, PixArt, SD3, Flux."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH = 12  # of the text
WORDS = ["digit", "three", "seven", "thin", "bold", "cat", "dog"]


def word_tokenizer(folder: Path) -> Any:
    """CLIPTokenizer whose words in WORDS are tokens of their own."""
    from transformers import CLIPTokenizer

    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    merges, tokens = [], list(letters)
    for word in WORDS:
        left = word[0]
        for i, c in enumerate(word[1:], start=1):
            right = c + ("</w>" if i == len(word) - 1 else "")
            merges.append(f"{left} {right}")
            left += right
            tokens.append(left)
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def tiny_unet(sdxl: bool = False, **kwargs: Any) -> Any:
    """UNet2DConditionModel on 8x8 latents, with SDXL's added conditions where asked for."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4} if sdxl else {}
    added |= {"projection_class_embeddings_input_dim": 16 + 6 * 4} if sdxl else {}
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**(config | added | kwargs)).eval()


def tiny_pixart(**kwargs: Any) -> Any:
    """PixArtTransformer2DModel that predicts a variance too."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "caption_channels": WIDTH,
        "sample_size": 8,
        "use_additional_conditions": False,
    }
    network = PixArtTransformer2DModel(**(config | kwargs)).eval()
    for parameter in network.parameters():  # the zero-initialised ones included
        nn.init.normal_(parameter, std=0.3)
    return network


def sd3_network(pooled: int = 6) -> Any:
    """SD3Transformer2DModel of two blocks."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=pooled,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def tiny_vae() -> Any:
    """AutoencoderKL that keeps the side of an image."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8).eval()


def clip_encoder(tokenizer: Any, kind: str = "CLIPTextModel", width: int = WIDTH) -> Any:
    """A CLIP text encoder of three layers."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = getattr(transformers, kind)(config).eval()
    for parameter in encoder.parameters():  # the default initialisation makes all words alike
        nn.init.normal_(parameter, std=0.5)
    return encoder


def sd_pipeline(tokenizer: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(tokenizer: Any) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=clip_encoder(tokenizer, width=4),
        text_encoder_2=clip_encoder(tokenizer, "CLIPTextModelWithProjection", width=8),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(sdxl=True),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def t5(width: int = WIDTH) -> tuple[Any, Any]:
    """(tokenizer, encoder)."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", *["▁" + word for word in WORDS]]
    tokenizer = T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()


def pixart_pipeline(_: Any = None) -> Any:
    from diffusers import LCMScheduler, PixArtAlphaPipeline

    torch.manual_seed(0)
    t5_tokenizer, encoder = t5()
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer,
        text_encoder=encoder,
        vae=tiny_vae(),
        transformer=tiny_pixart(),
        scheduler=LCMScheduler(),
    )


def flux_pipeline(tokenizer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    t5_tokenizer, encoder = t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=clip_encoder(tokenizer, width=8),
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=t5_tokenizer,
        transformer=transformer.eval(),
    )


def sd3_pipeline(tokenizer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    torch.manual_seed(0)
    return StableDiffusion3Pipeline(
        transformer=sd3_network(pooled=32).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=clip_encoder(tokenizer, "CLIPTextModelWithProjection", width=4),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, "CLIPTextModelWithProjection", width=8),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


PIPELINES = {
    "sd": sd_pipeline,
    "sdxl": sdxl_pipeline,
    "pixart": pixart_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
}
