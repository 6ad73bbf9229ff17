"""LoRA through peft: adapters on a diffusers network, and a fake score that shares the teacher's weights."""

from __future__ import annotations

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
    from peft import LoraConfig

    names = [name for name, _ in network.named_modules()]
    if not any(name == end or name.endswith(f".{end}") for name in names for end in config.targets):
        raise InputError(f"{field}.targets = {config.targets}: no layer of {type(network).__name__} ends like this")
    network.requires_grad_(False)
    network.add_adapter(
        LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=config.targets, init_lora_weights="gaussian")
    )
    for name, parameter in network.named_parameters():
        if "lora_" in name and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # small steps on small weights
    for name, module in network.named_modules():
        if not any(True for _ in module.children()) and "lora_" not in name:
            freeze(module)


class SharedDenoiser(Denoiser):
    """One of two views of a network with adapters: `adapted` is the fake score, not adapted the teacher.

    The switch is set before each forward, so the views may be called in any order.
    """

    def __init__(self, denoiser: Denoiser, *, adapted: bool):
        super().__init__(denoiser.network, denoiser.process, denoiser.prediction_type)
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.adapted = adapted
        self._layers = tuple(m for m in self.network.modules() if isinstance(m, BaseTunerLayer))

    def output(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        # peft's own switch also changes requires_grad, which belongs to whoever's turn it is.
        for layer in self._layers:
            layer._disable_adapters = not self.adapted
        return super().output(x_t, t, condition)


def shared_views(denoiser: Denoiser, config: LoRAConfig, *, field: str = "lora") -> tuple[Denoiser, Denoiser]:
    """(teacher, fake) on one network: without and with the adapters that this adds."""
    add_lora(denoiser.network, config, field=field)
    return SharedDenoiser(denoiser, adapted=False), SharedDenoiser(denoiser, adapted=True)
