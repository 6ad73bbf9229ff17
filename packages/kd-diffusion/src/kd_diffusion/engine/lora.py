"""LoRA through peft: adapters on a diffusers network, and a fake score that shares the teacher's weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.denoiser import Denoiser
from kdcore.config import Config
from kdcore.distiller import freeze
from kdcore.errors import InputError


class LoRAConfig(Config):
    rank: int = Field(64, ge=1, description="rank of the update")
    alpha: float = Field(64.0, gt=0, description="the update is scaled by alpha / rank")
    targets: list[str] = Field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"], description="ends of the names of adapted layers"
    )


def add_lora(network: nn.Module, config: LoRAConfig, *, field: str = "lora") -> None:
    """Adds adapters in place (B starts at 0) and freezes everything else, so that checkpoints hold adapters alone.

    Raises InputError when no layer's name ends with one of the targets.
    """
    names = [name for name, _ in network.named_modules()]
    if not any(name == end or name.endswith(f".{end}") for name in names for end in config.targets):
        raise InputError(f"{field}.targets = {config.targets}: no layer of {type(network).__name__} ends like this")
    network.requires_grad_(False)
    _add_adapter(network, config, "default")
    for name, parameter in network.named_parameters():
        if "lora_" in name and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # small steps on small weights
    for name, module in network.named_modules():
        if not any(True for _ in module.children()) and "lora_" not in name:
            freeze(module)


def _add_adapter(network: nn.Module, config: LoRAConfig, name: str) -> None:
    if hasattr(network, "add_adapter"):
        network.add_adapter(_peft_config(config), adapter_name=name)
    else:  # some of diffusers' networks do not know adapters (PixArt, DiT, UNet2DModel)
        from peft import inject_adapter_in_model

        inject_adapter_in_model(_peft_config(config), network, name)


def _peft_config(config: LoRAConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=config.targets, init_lora_weights="gaussian"
    )


class SharedDenoiser(Denoiser):
    """One view of a network with adapters: `adapter` names the one it uses, None the network without any.

    The switch is set before each forward, so that the views may be called in any order.
    """

    def __init__(self, denoiser: Denoiser, *, adapter: str | None):
        super().__init__(denoiser.network, denoiser.process, denoiser.prediction_type)
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.adapter = adapter
        self._layers = tuple(m for m in self.network.modules() if isinstance(m, BaseTunerLayer))

    def output(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        # peft's own switches also change requires_grad, which belongs to whoever's turn it is.
        for layer in self._layers:
            layer._disable_adapters = self.adapter is None
            if self.adapter is not None:
                layer._active_adapter = [self.adapter]
        return super().output(x_t, t, condition)


def shared_views(denoiser: Denoiser, config: LoRAConfig, *, field: str = "lora") -> tuple[Denoiser, Denoiser]:
    """(teacher, fake) on one network: without and with the adapter that this adds."""
    add_lora(denoiser.network, config, field=field)
    return SharedDenoiser(denoiser, adapter=None), SharedDenoiser(denoiser, adapter="default")


def add_frozen_adapter(network: nn.Module, config: LoRAConfig, name: str) -> None:
    """Another adapter that never trains, for weights that are loaded into it."""
    before = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is what is meant
        _add_adapter(network, config, name)
    for parameter_name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter_name in before)
    for layer_name, module in network.named_modules():
        if layer_name.endswith(f".{name}") and "lora_" in layer_name:
            freeze(module.float())


def adapter_state(network: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's weights, or {} for a network without adapters."""
    if not getattr(network, "peft_config", None):
        return {}
    from peft.utils import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(network, adapter_name=adapter))


def load_adapter(network: nn.Module, state: dict[str, Tensor], adapter: str) -> None:
    """Loads what `adapter_state` gave into an adapter. Raises ValueError where a name does not fit."""
    from peft.utils import set_peft_model_state_dict

    if set(state) != set(adapter_state(network, adapter)):
        raise ValueError(f"its names are not those of the adapter '{adapter}'")
    set_peft_model_state_dict(network, state, adapter_name=adapter)
