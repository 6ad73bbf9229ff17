"""Conditioners: from what a batch holds (class labels, token ids) to what the network is conditioned on."""

from __future__ import annotations

from typing import Any

import torch
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

    One encoder (SD 1.x, 2.x), two with a pooled embedding and time ids (SDXL), T5 with a mask (PixArt), or UMT5 whose
    padding is set to zero (Wan). `null` is the empty prompt, or zeros where the pipeline says
    `force_zeros_for_empty_prompt` (SDXL).
    """

    def __init__(self, pipe: Any):
        super().__init__()
        pairs = [(getattr(pipe, f"text_encoder{n}", None), getattr(pipe, f"tokenizer{n}", None)) for n in ("", "_2")]
        if getattr(pipe, "text_encoder_3", None) is not None:
            raise InputError("teacher: pipelines with three text encoders need embeddings from data.embeddings")
        pairs = [pair for pair in pairs if pair[0] is not None]
        self.encoders = nn.ModuleList([encoder for encoder, _ in pairs])
        self.tokenizers = [tokenizer for _, tokenizer in pairs]
        self.is_xl = "time_ids" in _added(pipe)
        self.has_mask = type(self.encoders[0]).__name__.startswith(("T5", "UMT5"))
        self.zero_padding = type(self.encoders[0]).__name__.startswith("UMT5")
        self.zero_null = bool(pipe.config.get("force_zeros_for_empty_prompt", False)) and self.is_xl
        self.max_length = _max_length(pipe, self.tokenizers[0])
        self.size = _pixel_size(pipe) if self.is_xl else 0
        self._null: Condition | None = None

    def tokens(self, prompts: list[str]) -> dict[str, Tensor]:
        """`input_ids` (N, L) int64 (and `input_ids_2`, `attention_mask`), padded and cut to the encoder's length."""
        found = {}
        for number, tokenizer in enumerate(self.tokenizers):
            kept = tokenizer(
                prompts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            found["input_ids" if number == 0 else f"input_ids_{number + 1}"] = kept.input_ids
            if self.has_mask:
                found["attention_mask"] = kept.attention_mask
        return found

    @torch.no_grad()
    def embed(self, batch: dict[str, Any]) -> Condition:
        if "input_ids" not in batch:
            raise InputError("data: the teacher is conditioned on text and the data has no prompts")
        if self.has_mask:
            mask = batch["attention_mask"]
            embeds = self.encoders[0](batch["input_ids"], attention_mask=mask)[0]
            if self.zero_padding:
                return {"prompt_embeds": embeds * mask[..., None].to(embeds.dtype)}
            return {"prompt_embeds": embeds, "prompt_mask": mask}
        if not self.is_xl:
            return {"prompt_embeds": self.encoders[0](batch["input_ids"])[0]}
        outputs = [
            encoder(batch[name], output_hidden_states=True)
            for encoder, name in zip(self.encoders, ("input_ids", "input_ids_2"), strict=False)
        ]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        times = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]], device=embeds.device)
        return {
            "prompt_embeds": embeds,
            "pooled_embeds": outputs[-1][0],
            "time_ids": times.expand(len(embeds), -1).to(embeds.dtype),
        }

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


def conditioner_of(
    pipe: Any, network: nn.Module, null_class: int | None = None
) -> NoConditioner | ClassConditioner | TextConditioner:
    """The conditioner that fits a pipeline and its network.

    `null_class`: the label of UNet2DModel that stands for none, which diffusers' configs do not say; DiT's is the one
    after its classes.
    """
    if getattr(pipe, "text_encoder", None) is not None:
        return TextConditioner(pipe)
    config = network.config
    if type(network).__name__ == "DiTTransformer2DModel":
        return ClassConditioner(config.num_embeds_ada_norm, config.num_embeds_ada_norm)
    rows = config.get("num_class_embeds")
    if rows is None:
        return NoConditioner()
    if null_class is not None and not 0 <= null_class < rows:
        raise InputError(f"teacher.null_class = {null_class}: the network has classes 0 to {rows - 1}")
    return ClassConditioner(rows if null_class is None else rows - 1, null_class)


def _added(pipe: Any) -> str:
    network = getattr(pipe, "unet", None)
    return "time_ids" if network is not None and network.config.get("addition_embed_type") == "text_time" else ""


def _max_length(pipe: Any, tokenizer: Any) -> int:
    if type(pipe).__name__.startswith("Wan"):
        return 512
    if type(tokenizer).__name__.startswith("T5"):
        return 300 if "Sigma" in type(pipe).__name__ else 120
    return tokenizer.model_max_length


def _pixel_size(pipe: Any) -> int:
    network = getattr(pipe, "unet", None) or pipe.transformer
    return int(network.config.sample_size * getattr(pipe, "vae_scale_factor", 1))
