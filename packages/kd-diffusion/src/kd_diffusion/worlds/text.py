"""A text-to-image pipeline in small, with a tokenizer and a text encoder for the words of the data's own prompts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd_diffusion.data import Data
from kd_diffusion.worlds.digits import latent_size
from kd_diffusion.worlds.vae import created
from kdcore.errors import InputError

START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(prompts: Sequence[str], length: int) -> Any:
    """A CLIPTokenizer whose byte pairs are merged until every word of the prompts is one token.

    length: model_max_length, with the start and end tokens. Other words fall apart into known pieces and characters.
    """
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(prompts, Path(folder))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def write_vocabulary(prompts: Sequence[str], folder: Path) -> None:
    """Writes vocab.json and merges.txt of CLIP's byte-pair encoding, learned from the prompts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    if not any(prompt.strip() for prompt in prompts):
        raise InputError("prompts: no word in them; a tokenizer needs text")
    # Words are single tokens in the end; single characters and their word-final forms stay for unknown words.
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=30_000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(prompts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = sorted(alphabet)
    names = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)])
    vocabulary = {name: index for index, name in enumerate([*names, START, END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def tokens(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Padded input_ids (N, L) int64, as StableDiffusionPipeline makes them."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def build_digits_text(
    data: Data,
    vae: nn.Module,
    network: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
    *,
    length: int = 12,
) -> Any:
    """StableDiffusionPipeline with a random text encoder and U-Net, on the latents of `vae`.

    `network` and `text_encoder` are arguments of UNet2DConditionModel and CLIPTextConfig. Raises InputError for data
    without prompts.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if data.train.prompts is None:
        raise InputError(f"data.name = '{data.config.name}': it has no prompts, world 'digits_text' needs them")
    tokenizer = build_tokenizer(data.train.prompts, length)
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "projection_dim": 64,
        **(text_encoder or {}),
        "vocab_size": len(tokenizer),
        "max_position_embeddings": length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    encoder = CLIPTextModel(created(CLIPTextConfig, text, "world.text_encoder"))
    arguments = {
        "sample_size": latent_size(vae, data),
        "in_channels": vae.config.latent_channels,
        "out_channels": vae.config.latent_channels,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [16, 48],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "attention_head_dim": 2,
        "cross_attention_dim": text["hidden_size"],
        **(network or {}),
    }
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=created(UNet2DConditionModel, arguments, "world.network"),
        scheduler=stable_diffusion_scheduler(DDIMScheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_scheduler(scheduler_class: Any) -> Any:
    """The noise table of Stable Diffusion 1.5, without its clipping."""
    return scheduler_class(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def prompt_condition(text_encoder: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Token embeddings (B, L, D) of a batch's `input_ids`, with the text encoder's graph."""
    return {"prompt_embeds": text_encoder(batch["input_ids"])[0]}
