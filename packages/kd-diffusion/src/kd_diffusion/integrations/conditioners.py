"""Conditioners: from what a batch holds (class labels, token ids) to what the network is conditioned on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_diffusion.engine.conditions import Condition
from kdcore.errors import InputError


class NoConditioner:
    """Unconditional generation."""

    def blank(self, count: int) -> Condition:
        return {}

    def embed(self, batch: dict[str, Any]) -> Condition:
        return {}

    def null(self, count: int, device: torch.device | str) -> Condition:
        return {}


class ClassConditioner:
    """Class labels, with the index that stands for none (None where the network was trained without one)."""

    def __init__(self, num_classes: int, null_class: int | None):
        self.num_classes, self.null_class = num_classes, null_class

    def embed(self, batch: dict[str, Any]) -> Condition:
        if "class_labels" not in batch:
            raise InputError("data: the teacher is class-conditional and the data has no labels")
        return {"class_labels": batch["class_labels"]}

    def null(self, count: int, device: torch.device | str) -> Condition:
        if self.null_class is None:
            raise InputError(
                "teacher.null_class: guidance needs a class that stands for none, and the teacher has none"
            )
        return {"class_labels": torch.full((count,), self.null_class, dtype=torch.int64, device=device)}

    def blank(self, count: int) -> Condition:
        """Any valid condition, to probe a network with."""
        return {"class_labels": torch.zeros(count, dtype=torch.int64)}


class TextConditioner(nn.Module):
    """The text side of a pipeline: tokenizers for the data, frozen encoders for the loop.

    `null` is the empty prompt, or zeros where the pipeline says `force_zeros_for_empty_prompt` (SDXL). Which parts of
    the encoders' outputs a network is given is a property of its kind, see `_KINDS`.
    """

    def __init__(self, pipe: Any):
        super().__init__()
        names = [n for n in ("", "_2", "_3") if getattr(pipe, f"text_encoder{n}", None) is not None]
        self.encoders = nn.ModuleList([getattr(pipe, f"text_encoder{n}") for n in names])
        self.tokenizers = [getattr(pipe, f"tokenizer{n}") for n in names]
        self.fields = [f"input_ids{n}" for n in names]
        self.kind = _kind(pipe, self.encoders[0])
        self.lengths = [_max_length(pipe, tokenizer) for tokenizer in self.tokenizers]
        self.zero_null = bool(pipe.config.get("force_zeros_for_empty_prompt", False)) and self.kind == "sdxl"
        sized = self.kind == "sdxl" or getattr(getattr(pipe, "transformer", None), "use_additional_conditions", False)
        self.size = _pixel_size(pipe) if sized else 0
        self.width = pipe.transformer.config.joint_attention_dim if self.kind == "sd3" else 0
        self._null: Condition | None = None

    def tokens(self, prompts: list[str]) -> dict[str, Tensor]:
        """`input_ids` (N, L) int64 (`input_ids_2`, `input_ids_3`, `attention_mask`), padded and cut to the length."""
        found = {}
        for name, tokenizer, length in zip(self.fields, self.tokenizers, self.lengths, strict=True):
            kept = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            found[name] = kept.input_ids
            if self.kind in ("t5", "umt5"):
                found["attention_mask"] = kept.attention_mask
        return found

    @torch.no_grad()
    def embed(self, batch: dict[str, Any]) -> Condition:
        if "input_ids" not in batch:
            raise InputError("data: the teacher is conditioned on text and the data has no prompts")
        return _KINDS[self.kind](self, batch)

    @torch.no_grad()
    def null(self, count: int, device: torch.device | str) -> Condition:
        if self._null is None:
            ids = {name: value.to(self._device()) for name, value in self.tokens([""]).items()}
            self._null = self.embed(ids)
            if self.zero_null:
                zeroed = ("prompt_embeds", "pooled_embeds")
                self._null = {k: v.zero_() if k in zeroed else v for k, v in self._null.items()}
        return {name: value.to(device).expand(count, *value.shape[1:]) for name, value in self._null.items()}

    def blank(self, count: int) -> Condition:
        """Any valid condition, to probe a network with."""
        return self.null(count, self._device())

    def _device(self) -> torch.device:
        return next(self.encoders.parameters()).device


# ---------------------------------------------------------------- what each kind of network is given


def _clip(text: TextConditioner, batch: dict[str, Any]) -> Condition:
    """Stable Diffusion 1.x and 2.x: the last hidden states."""
    return {"prompt_embeds": text.encoders[0](batch["input_ids"])[0]}


def _sdxl(text: TextConditioner, batch: dict[str, Any]) -> Condition:
    """The last hidden states but one of both encoders, the pooled embedding of the second, sizes and crop."""
    embeds, pooled = _hidden(text, batch)
    times = torch.tensor([[text.size, text.size, 0, 0, text.size, text.size]], device=embeds.device)
    return {
        "prompt_embeds": embeds,
        "pooled_embeds": pooled[-1],
        "time_ids": times.expand(len(embeds), -1).to(embeds.dtype),
    }


def _t5(text: TextConditioner, batch: dict[str, Any]) -> Condition:
    """PixArt: T5's hidden states with their mask; of 1024 pixels also the size and the aspect ratio."""
    mask = batch["attention_mask"]
    embeds = text.encoders[0](batch["input_ids"], attention_mask=mask)[0]
    found = {"prompt_embeds": embeds, "prompt_mask": mask}
    if text.size:
        found["resolution"] = embeds.new_full((len(embeds), 2), text.size)
        found["aspect_ratio"] = embeds.new_ones(len(embeds), 1)
    return found


def _umt5(text: TextConditioner, batch: dict[str, Any]) -> Condition:
    """Wan: UMT5's hidden states, zero where there is padding."""
    found = _t5(text, batch)
    return {"prompt_embeds": found["prompt_embeds"] * found["prompt_mask"][..., None].to(found["prompt_embeds"].dtype)}


def _sd3(text: TextConditioner, batch: dict[str, Any]) -> Condition:
    """Both CLIPs side by side, padded to T5's width, followed by T5's tokens (zeros without T5); both pooled."""
    clip, pooled = _hidden(text, batch)
    if len(text.encoders) > 2:
        t5 = text.encoders[2](batch["input_ids_3"])[0]
    else:
        t5 = clip.new_zeros(len(clip), SD3_T5_TOKENS, text.width)
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return {"prompt_embeds": torch.cat((clip, t5.to(clip.dtype)), dim=1), "pooled_embeds": torch.cat(pooled, dim=-1)}


def _flux(text: TextConditioner, batch: dict[str, Any]) -> Condition:
    """T5's tokens, and CLIP's pooled embedding."""
    pooled = text.encoders[0](batch["input_ids"]).pooler_output
    return {"prompt_embeds": text.encoders[1](batch["input_ids_2"])[0], "pooled_embeds": pooled}


def _hidden(text: TextConditioner, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The last hidden states but one of two CLIPs, side by side, and their first outputs."""
    outputs = [
        encoder(batch[name], output_hidden_states=True)
        for encoder, name in zip(text.encoders[:2], text.fields[:2], strict=True)
    ]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), [output[0] for output in outputs]


SD3_T5_TOKENS = 256
_KINDS: dict[str, Callable[[TextConditioner, dict[str, Any]], Condition]] = {
    "clip": _clip,
    "sdxl": _sdxl,
    "t5": _t5,
    "umt5": _umt5,
    "sd3": _sd3,
    "flux": _flux,
}


def _kind(pipe: Any, encoder: nn.Module) -> str:
    unet, transformer = getattr(pipe, "unet", None), type(getattr(pipe, "transformer", None)).__name__
    if transformer.startswith(("SD3", "Flux")):
        return "sd3" if transformer.startswith("SD3") else "flux"
    if type(encoder).__name__.startswith(("T5", "UMT5")):
        return "umt5" if type(encoder).__name__.startswith("UMT5") else "t5"
    return "sdxl" if unet is not None and unet.config.get("addition_embed_type") == "text_time" else "clip"


# ---------------------------------------------------------------- choosing


def conditioner_of(
    pipe: Any, network: nn.Module, null_class: int | None = None
) -> NoConditioner | ClassConditioner | TextConditioner:
    """The conditioner that fits a pipeline and its network.

    `null_class`: the label of UNet2DModel that stands for none, which diffusers' configs do not say; DiT's is the one
    after its classes (1000 for ImageNet's, which is what DiTPipeline guides with), where `null_class` is not another.
    """
    if getattr(pipe, "text_encoder", None) is not None:
        return TextConditioner(pipe)
    config = network.config
    rows = config.get("num_class_embeds")
    if type(network).__name__ == "DiTTransformer2DModel":
        rows = config.num_embeds_ada_norm + 1
        null_class = rows - 1 if null_class is None else null_class
    if rows is None:
        return NoConditioner()
    if null_class is not None and not 0 <= null_class < rows:
        raise InputError(f"teacher.null_class = {null_class}: the network has classes 0 to {rows - 1}")
    return ClassConditioner(rows if null_class is None else rows - 1, null_class)


def _max_length(pipe: Any, tokenizer: Any) -> int:
    """Tokens of a prompt: CLIP's own limit; of T5 what the pipeline's class takes by default."""
    if type(tokenizer).__name__.startswith("CLIP"):
        return tokenizer.model_max_length
    lengths = {"Wan": 512, "Flux": 512, "StableDiffusion3": SD3_T5_TOKENS, "PixArtSigma": 300}
    return next((length for name, length in lengths.items() if type(pipe).__name__.startswith(name)), 120)


def _pixel_size(pipe: Any) -> int:
    network = getattr(pipe, "unet", None) or pipe.transformer
    return int(network.config.sample_size * getattr(pipe, "vae_scale_factor", 1))
