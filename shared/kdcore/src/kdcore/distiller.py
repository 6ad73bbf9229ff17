"""LossTerms, Player, Distiller: which networks exist, what each of them minimises, what the user takes away.

A `Distiller` needs nothing else of ours:

    distiller = DHKD(teacher, student, num_classes=10)
    distiller.loss(batch).total().backward()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.config import EMAConfig, OptimizerConfig, ScheduleConfig
from kdcore.errors import InputError


class LossTerms(dict[str, tuple[float, Tensor]]):
    """Ordered name -> (weight, scalar tensor). `.total()` is the weighted sum that is minimised.

    >>> terms = LossTerms(ce=(1.0, torch.tensor(2.0)), kd=(0.5, torch.tensor(4.0)))
    >>> terms.total()
    tensor(4.)
    """

    def __init__(self, terms: Mapping[str, tuple[float, Tensor]] | None = None, /, **named: tuple[float, Tensor]):
        super().__init__(terms or {}, **named)

    def total(self) -> Tensor:
        """Weighted sum, a scalar with the graph of every term whose weight is not zero."""
        kept = [term if weight == 1 else weight * term for weight, term in self.values() if weight != 0]
        if not kept:
            raise ValueError("LossTerms.total: every term has weight 0; nothing to minimise")
        total = kept[0]
        for term in kept[1:]:
            total = total + term
        return total


GradientRule = Callable[[dict[str, list[Tensor]]], list[Tensor]]
"""Term name -> that weighted term's gradients (one tensor per parameter, zeros where there is none) -> gradients."""


@dataclass
class Player:
    """One optimiser and what it trains.

    `module` holds the trained parameters (those with requires_grad). `optimizer` and `schedule` of None mean the
    run's own `train.optimizer` and `train.schedule`. `param_groups` replaces the single group of `module`'s
    parameters; a group may give `lr_scale`, its factor on the learning rate. The player acts on every `every`-th
    iteration from iteration `start` on, and its schedule counts iterations of the run. `clip` bounds the norm of the
    gradient, `clip_value` the size of each of its entries.
    """

    name: str
    module: nn.Module
    optimizer: OptimizerConfig | Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None
    schedule: ScheduleConfig | None = None
    param_groups: Sequence[dict[str, Any]] | None = None
    every: int = 1
    start: int = 0
    clip: float | None = None
    clip_value: float | None = None
    ema: EMAConfig | None = None


@dataclass
class Progress:
    """Where training stands. The loop keeps it up to date; in a loop of your own set the fields a method reads."""

    epoch: int = 0
    step: int = 0
    epochs: int = 1
    steps: int = 1

    @property
    def fraction(self) -> float:
        """Share of the budget that is done, in [0, 1]."""
        return min(1.0, self.step / max(1, self.steps))


def freeze(module: nn.Module) -> nn.Module:
    """Marks `module` as frozen, in place: no gradients, eval mode that `Distiller.train()` does not undo.

    A frozen module's state is not part of checkpoints: it is rebuilt from its own source on resume.
    """
    module.requires_grad_(False).eval()
    module._kd_frozen = True  # type: ignore[assignment]
    return module


def is_frozen(module: nn.Module) -> bool:
    return getattr(module, "_kd_frozen", False) is True


class Distiller(nn.Module):
    """Owns the frozen teacher(s), the student and the auxiliaries of one method. Subclasses implement `loss`."""

    student: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress()

    def players(self) -> list[Player]:
        """Who trains. By default one player with every trainable parameter of the distiller."""
        return [Player("student", self)]

    def loss(self, batch: Any, player: str = "student") -> LossTerms:
        """What `player` minimises on this batch."""
        raise NotImplementedError(f"{type(self).__name__} does not implement loss(batch, player)")

    def gradient_rule(self, player: str) -> GradientRule | None:
        """How per-term gradients become the update; None is their sum, in one backward pass."""
        return None

    def deployed(self) -> nn.Module:
        """What the user takes away: nothing auxiliary, nothing of the teacher."""
        return self.student

    def epoch_start(self) -> None:
        """Called before each epoch, and again when a run resumes inside it: must not depend on how often."""

    def epoch_end(self) -> None:
        """Called once after each epoch: weight averaging, statistics. What it keeps belongs in the state dict."""

    def forward(self, batch: Any, player: str = "student") -> dict[str, tuple[float, Tensor]]:
        # DDP and FSDP wrap forward, so the loss goes through it. They look for the graph in plain containers, and
        # expect a gradient for whatever an output depends on: a term of weight 0 must not look used.
        terms = self.loss(batch, player)
        return {name: (weight, term if weight != 0 else term.detach()) for name, (weight, term) in terms.items()}

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            if is_frozen(module):
                module.eval()
        return self

    def frozen_prefixes(self) -> tuple[str, ...]:
        """Name prefixes of the state that checkpoints leave out."""
        return tuple(f"{name}." for name, module in self.named_modules() if is_frozen(module))

    def checkpoint_state(self) -> dict[str, Tensor]:
        """The state dict without the frozen modules."""
        skip = self.frozen_prefixes()
        return {name: value for name, value in self.state_dict().items() if not name.startswith(skip or ("\0",))}

    def load_checkpoint_state(self, state: Mapping[str, Tensor]) -> None:
        """The counterpart of `checkpoint_state`. Raises InputError for names that do not fit."""
        skip = self.frozen_prefixes()
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.startswith(skip or ("\0",))]
        if missing or unexpected:
            raise InputError(f"checkpoint does not fit {type(self).__name__}: missing {missing}, extra {unexpected}")
