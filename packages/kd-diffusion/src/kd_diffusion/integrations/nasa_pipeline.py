"""A negative prompt for a stock pipeline of one or a few steps, by NASA (arXiv 2412.02687).

images = nasa_call(pipe, "a portrait", "glasses", alpha=0.2, num_inference_steps=1).images
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_diffusion.integrations.nasa import Alpha, checked_alpha, is_off, nasa, network_of
from kdcore.errors import InputError


def nasa_call(
    pipe: Any,
    prompt: str | list[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    alpha: Alpha = 0.2,
    **kwargs: Any,
) -> Any:
    """`pipe(prompt, **kwargs)` without guidance and with NASA for `negative_prompt`; the pipeline's own output.

    The negative prompt, one for all or one per prompt, goes through the pipeline's own text encoders (for SDXL and SD3
    `negative_prompt_2` and `_3` as there); pooled embeddings stay those of the positive prompt. None: the stock
    pipeline without guidance. `guidance_scale` may be given where it is an input of the network (LCM, Flux).
    """
    if kwargs.get("negative_prompt_embeds") is not None:
        raise InputError("negative_prompt_embeds: allowed here: negative_prompt; for embeddings `with nasa(pipe, ...)`")
    kwargs = {"prompt": prompt, **_without_guidance(pipe, kwargs)}
    others = {name: kwargs.pop(f"negative_{name}", None) for name in ("prompt_2", "prompt_3")}
    if negative_prompt is None or is_off(checked_alpha(alpha)):
        return pipe(**kwargs)
    negative, mask = encode_negative(pipe, negative_prompt, kwargs, others)
    with nasa(pipe, negative, alpha, mask):
        return pipe(**kwargs)


@torch.no_grad()
def encode_negative(
    pipe: Any, negative_prompt: str | Sequence[str], call: dict[str, Any], others: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The negative prompt's embeddings (1 or B, L, D) and mask by `pipe.encode_prompt`, for the call `pipe(**call)`."""
    negative_prompt = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
    count = _prompt_count(call)
    if len(negative_prompt) not in {1, count} or not all(isinstance(text, str) for text in negative_prompt):
        raise InputError(f"negative_prompt = {negative_prompt!r}: allowed: None, a string, or {count} strings")
    parameters = inspect.signature(pipe.encode_prompt).parameters
    defaults = inspect.signature(pipe.__call__).parameters
    shared = ("clip_skip", "clean_caption", "max_sequence_length")  # how the pipeline reads a prompt
    arguments = {name: call.get(name, defaults[name].default) for name in shared if name in defaults}
    for name in ("cross_attention_kwargs", "joint_attention_kwargs"):
        arguments["lora_scale"] = (call.get(name) or {}).get("scale", arguments.get("lora_scale"))
    arguments |= {
        **(others or {}),
        "prompt": negative_prompt,
        "device": pipe._execution_device,
        "num_images_per_prompt": 1 if len(negative_prompt) == 1 else call.get("num_images_per_prompt", 1),
        "do_classifier_free_guidance": False,
    }
    encoded = pipe.encode_prompt(**{name: value for name, value in arguments.items() if name in parameters})
    return encoded[0], encoded[1] if "prompt_attention_mask" in parameters else None


def _prompt_count(call: dict[str, Any]) -> int:
    if call.get("prompt") is None:
        return len(call["prompt_embeds"]) if call.get("prompt_embeds") is not None else 1
    return 1 if isinstance(call["prompt"], str) else len(call["prompt"])


def _without_guidance(pipe: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if "guidance_scale" not in inspect.signature(pipe.__call__).parameters:
        return kwargs
    config = getattr(network_of(pipe), "config", {})
    joint = "true_cfg_scale" in inspect.signature(pipe.__call__).parameters  # Flux: guidance_scale is no guidance
    if joint or config.get("time_cond_proj_dim") is not None or config.get("guidance_embeds"):
        return kwargs
    scale = kwargs.get("guidance_scale", 0.0)
    if scale > 1:
        raise InputError(f"guidance_scale = {scale}: NASA stands in for guidance; allowed: at most 1 (off)")
    return {**kwargs, "guidance_scale": scale}
