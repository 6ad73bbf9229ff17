"""Denoiser: any diffusers network as a predictor mu(x_t, t, c) of x, with guidance.

Guidance is written with the scale kappa of  mu(null) + kappa (mu(c) - mu(null)): 1 is the conditional prediction, 0
the unconditional one, above 1 amplifies and below 0 turns away. At a fixed x_t it commutes with every conversion
between prediction types, so guiding x is guiding the noise or the flow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kd_diffusion.engine.conditions import Condition, concat
from kd_diffusion.engine.process import Process, expand, to_x0
from kdcore.errors import InputError

Call = Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]


class Denoiser(nn.Module):
    """`network` (a diffusers model) behind its noise process and prediction type.

    x_t (B, C, H, W), t (B,) a time of the process, condition a dict of tensors; gives x (B, C, H, W) in the dtype of
    x_t. The network may have its own dtype. Raises InputError for a network whose call is not known.
    """

    def __init__(self, network: nn.Module, process: Process, prediction_type: str):
        super().__init__()
        self.network = network
        self.process, self.prediction_type = process, prediction_type
        self._call = call_of(network)
        keep_labels(network)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return to_x0(self.process, self.prediction_type, self.output(x_t, t, condition), x_t, t)

    def output(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the network itself predicts, without a learned variance, in the dtype of x_t."""
        scaled = expand(self.process.input_scale(t), x_t).to(x_t.dtype) * x_t
        dtype = next(self.network.parameters()).dtype
        condition = {name: v.to(dtype) if v.is_floating_point() else v for name, v in condition.items()}
        time = self.process.network_time(t)
        if time.is_floating_point():
            time = time.to(torch.promote_types(dtype, torch.float32))
        output = self._call(self.network, scaled.to(dtype), time, condition)
        return output[:, : x_t.shape[1]].to(x_t.dtype)

    def guided(self, x_t: Tensor, t: Tensor, condition: Condition, null: Condition, kappa: float | Tensor) -> Tensor:
        """mu(null) + kappa (mu(c) - mu(null)); kappa a number or (B,). One forward where kappa is 1 or 0."""
        return _guided(self, x_t, t, condition, null, kappa)

    def guided_output(
        self, x_t: Tensor, t: Tensor, condition: Condition, null: Condition, kappa: float | Tensor
    ) -> Tensor:
        """The same of what the network itself predicts."""
        return _guided(self.output, x_t, t, condition, null, kappa)

    @property
    def middle(self) -> nn.Module:
        """The module in the middle of the network: a U-Net's mid-block, a transformer's middle block."""
        if getattr(self.network, "mid_block", None) is not None:
            return self.network.mid_block
        blocks = getattr(self.network, "transformer_blocks", None)
        if blocks is None:
            raise InputError(f"{type(self.network).__name__}: has neither a mid-block nor transformer blocks")
        return blocks[len(blocks) // 2]


def _guided(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    null: Condition,
    kappa: float | Tensor,
) -> Tensor:
    if not isinstance(kappa, Tensor):
        if kappa == 1 or not condition:
            return predict(x_t, t, condition)
        if kappa == 0:
            return predict(x_t, t, null)
    both = predict(torch.cat((x_t, x_t)), torch.cat((t, t)), concat(null, condition))
    return guide(*both.chunk(2), kappa)


def guide(unconditional: Tensor, conditional: Tensor, kappa: float | Tensor) -> Tensor:
    """u + kappa (c - u); kappa a number or (B,)."""
    if isinstance(kappa, Tensor):
        kappa = expand(kappa, conditional).to(conditional.dtype)
    return unconditional + kappa * (conditional - unconditional)


def keep_labels(network: nn.Module) -> None:
    """Switches DiT's own dropping of labels in training mode off: the caller decides what is unconditional."""
    for module in network.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0


# ---------------------------------------------------------------- how each network is called


def call_of(network: nn.Module) -> Call:
    """The function that calls a network of this class with (network, x, time, condition).

    A network that is not a diffusers class is called like UNet2DModel when its forward takes the same arguments.
    """
    if hasattr(network, "experts"):  # integrations.experts: called like one of its networks
        network = network.experts[0]
    for known in type(network).__mro__:
        if known.__name__ in _CALLS:
            return _CALLS[known.__name__]
    parameters = inspect.signature(network.forward).parameters
    if {"sample", "timestep", "class_labels"} <= parameters.keys() and "encoder_hidden_states" not in parameters:
        return _unet
    raise InputError(f"network {type(network).__name__}: not known how to call it; known: {', '.join(_CALLS)}")


def _unet(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    return network(x, time, class_labels=condition.get("class_labels"), return_dict=False)[0]


def _unet_condition(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    added: dict[str, Any] | None = None
    if "pooled_embeds" in condition:
        added = {"text_embeds": condition["pooled_embeds"], "time_ids": condition["time_ids"]}
    return network(
        x,
        time,
        encoder_hidden_states=condition["prompt_embeds"],
        class_labels=condition.get("class_labels"),
        encoder_attention_mask=condition.get("prompt_mask"),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def _dit(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    return network(x, timestep=time, class_labels=condition["class_labels"], return_dict=False)[0]


def _pixart(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    added = {"resolution": condition.get("resolution"), "aspect_ratio": condition.get("aspect_ratio")}
    return network(
        x,
        encoder_hidden_states=condition["prompt_embeds"],
        encoder_attention_mask=condition.get("prompt_mask"),
        timestep=time,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def _sd3(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    return network(
        hidden_states=x,
        encoder_hidden_states=condition["prompt_embeds"],
        pooled_projections=condition["pooled_embeds"],
        timestep=time,
        return_dict=False,
    )[0]


def _wan(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Video: x (B, C, F, H, W)."""
    return network(x, timestep=time, encoder_hidden_states=condition["prompt_embeds"], return_dict=False)[0]


def _flux(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Flux reads 2x2 patches as tokens, times in [0, 1], and (dev) the guidance it was distilled with as an input."""
    count, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    tokens = x.reshape(count, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    tokens = tokens.reshape(count, rows * columns, channels * 4)
    grid = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    grid[..., 1] += torch.arange(rows, device=x.device)[:, None]
    grid[..., 2] += torch.arange(columns, device=x.device)[None]
    guidance = condition.get("guidance", torch.ones(count, device=x.device, dtype=x.dtype))
    output = network(
        hidden_states=tokens,
        encoder_hidden_states=condition["prompt_embeds"],
        pooled_projections=condition["pooled_embeds"],
        timestep=time / 1000,
        img_ids=grid.reshape(-1, 3),
        txt_ids=torch.zeros(condition["prompt_embeds"].shape[1], 3, device=x.device, dtype=x.dtype),
        guidance=guidance if network.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    output = output.reshape(count, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return output.reshape(count, channels, height, width)


_CALLS: dict[str, Call] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet_condition,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _wan,
}
