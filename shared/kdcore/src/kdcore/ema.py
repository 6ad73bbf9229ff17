"""Exponential moving averages of weights: constant decay with warm-up, the power law of EDM2, half-life in samples.

    constant:  w_ema <- d w_ema + (1 - d) w,  d = min(decay, (1 + t) / (10 + t)) under warm-up
    power:     d_t = (1 - 1/t)^(gamma + 1)    (arXiv 2312.02696, eq. 127)
    halflife:  d_t = 0.5^(B / min(halflife, ramp * seen)),  seen = (t - 1) B    (arXiv 2206.00364, its training loop)
with t = 1 for the first update and B samples in an update. All start from the weights the average was made with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdcore.config import EMAConfig
from kdcore.errors import InputError


def decay_at(config: EMAConfig, update: int, batch: int = 1) -> float:
    """The decay of the `update`-th update (counted from 1); `batch` samples make an update.

    >>> decay_at(EMAConfig(decay=0.999), 1)
    0.18181818181818182
    >>> decay_at(EMAConfig(kind="power", gamma=1.0), 2)
    0.25
    >>> decay_at(EMAConfig(kind="halflife", halflife=64), 1000, batch=32)
    0.7071067811865476
    """
    if config.kind == "power":
        return (1 - 1 / update) ** (config.gamma + 1)
    if config.kind == "halflife":
        halflife = config.halflife if config.ramp is None else min(config.halflife, config.ramp * (update - 1) * batch)
        return 0.5 ** (batch / halflife) if halflife > 0 else 0.0
    return min(config.decay, (1 + update) / (10 + update)) if config.warmup else config.decay


class EMA:
    """The average of a module's floating-point parameters; buffers are copied as they are.

    `batch` samples make one update, over all processes together; only kind=halflife counts in samples.
    """

    def __init__(self, module: nn.Module, config: EMAConfig, batch: int = 1):
        self.module, self.config, self.batch, self.updates = module, config, batch, 0
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.shadow = {name: parameter.detach().clone() for name, parameter in trained}

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The averaged parameters: those that were trainable when the average was made."""
        return {name: p for name, p in self.module.named_parameters() if name in self.shadow}

    @torch.no_grad()
    def update(self) -> None:
        """One update, after the optimiser's step."""
        self.updates += 1
        decay = decay_at(self.config, self.updates, self.batch)
        parameters = self._parameters()
        shadow = [self.shadow[name] for name in parameters]
        torch._foreach_lerp_(shadow, list(parameters.values()), 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged weights inside the block."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters().items()}
        self.copy_to_module()
        try:
            yield
        finally:
            self._assign(kept)

    def copy_to_module(self) -> None:
        self._assign(self.shadow)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        parameters = self._parameters()
        for name, value in values.items():
            parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.shadow, "_updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        values = dict(state)
        self.updates = int(values.pop("_updates"))
        if {name: value.shape for name, value in values.items()} != {n: v.shape for n, v in self.shadow.items()}:
            raise InputError("EMA state does not fit the module: names or shapes of parameters differ")
        for name, value in values.items():
            self.shadow[name].copy_(value)
