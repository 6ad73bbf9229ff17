"""Denoising training: a diffusion model learns from data, or from another denoiser.

    L = mean || output(x_t, t, c) - target ||^2,   x_t = a_t x + s_t e

in the network's own prediction type. For epsilon that is the loss of DDPM (arXiv 2006.11239, eq. 14), for a flow that
of rectified flow (arXiv 2209.03003, eq. 1), and for EDM, whose c_out^2 is the inverse of the weight
s^-2 + sigma_data^-2, exactly its weighted loss on x (arXiv 2206.00364, eq. 8). With a teacher, the target belongs to
the teacher's prediction of x at the same x_t instead of the x that was noised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.draws import Draws, Turn
from kd_diffusion.engine.process import EDM, Process, add_noise, expand, from_x0, target
from kd_diffusion.engine.timesteps import TimesConfig, sample_times
from kdcore.distiller import Distiller, LossTerms, freeze
from kdcore.errors import InputError

Batch = dict[str, Tensor]


def usual_times(process: Process) -> TimesConfig:
    """The law of the time that a process is trained with: EDM's log-normal, else uniform over the whole table."""
    if isinstance(process, EDM):
        return TimesConfig(kind="lognormal")
    return TimesConfig(kind="uniform", low=0, high=process.size - 1)


def labels_condition(batch: Batch) -> Condition:
    """The class labels of a batch, or {}."""
    return {"class_labels": batch["class_labels"]} if "class_labels" in batch else {}


class Joint(nn.Module):
    """A denoising network and the text encoder that trains with it."""

    def __init__(self, network: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.network, self.text_encoder = network, text_encoder


class DenoisingDistiller(Distiller):
    """One player. The batch is a dict with `x`, or `pixels` that `encode` turns into x, and what `condition` reads.

    condition: batch -> Condition; class labels by default.
    null, drop: fields of one sample (`class_labels` (), `input_ids` (L,)) that replace a sample's own with probability
        `drop`, so that the network learns the unconditional prediction too. None: never.
    text_encoder: trains with the network, when `condition` calls it.
    data: (batch, draw) -> x, where x is neither in the batch nor encoded from it, such as a generator's samples.
    teacher: its x at x_t, on the same condition, replaces x as the target.
    times: law of the time; None is `usual_times`.
    carried: frozen modules that `condition`, `encode` and `data` use, so that they go to the network's device.

    `deployed()` is the network alone, or `Joint` with a text encoder. Raises InputError for a batch without data.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        condition: Callable[[Batch], Condition] = labels_condition,
        null: Mapping[str, Tensor] | None = None,
        drop: float = 0.1,
        encode: Callable[[Tensor], Tensor] | None = None,
        data: Callable[[Batch, Turn], Tensor] | None = None,
        text_encoder: nn.Module | None = None,
        teacher: Denoiser | None = None,
        times: TimesConfig | None = None,
        carried: Iterable[Any] = (),
        seed: int = 0,
    ):
        super().__init__()
        self.carried = nn.ModuleList(freeze(module) for module in carried if isinstance(module, nn.Module))
        self.denoiser, self.text_encoder = denoiser, text_encoder
        self.teacher = None if teacher is None else freeze(teacher)
        self.condition, self.encode, self.data = condition, encode, data
        self.null, self.drop = null, drop
        self.times = times or usual_times(denoiser.process)
        self.draws = Draws(seed)

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        denoiser, process = self.denoiser, self.denoiser.process
        device = next(denoiser.parameters()).device
        draw = self.draws.turn("denoising", self.progress.step, device)
        x = self._clean(batch, draw)
        t = sample_times(self.times, process, draw, len(x))
        e = draw.normal(x.shape).to(x.dtype)
        condition = self.condition(self._dropped(batch, draw, len(x)))
        x_t = add_noise(process, x, e, t)
        output = denoiser.output(x_t, t, condition)
        if self.teacher is None:
            aim = target(process, denoiser.prediction_type, x, e, t)
        else:
            with torch.no_grad():
                aim = from_x0(process, denoiser.prediction_type, self.teacher(x_t, t, condition), x_t, t)
        return LossTerms(denoising=(1.0, F.mse_loss(output, aim)))

    def _clean(self, batch: Batch, draw: Turn) -> Tensor:
        with torch.no_grad():
            if self.data is not None:
                return self.data(batch, draw)
            if "x" in batch:
                return batch["x"]
            if "pixels" in batch:
                return batch["pixels"] if self.encode is None else self.encode(batch["pixels"])
        raise InputError(f"data: the batch has {', '.join(batch) or 'nothing'}; denoising needs images")

    def _dropped(self, batch: Batch, draw: Turn, count: int) -> Batch:
        if not self.null or self.drop == 0:
            return batch
        mask = draw.uniform(count) < self.drop
        result = dict(batch)
        for name, value in self.null.items():
            own = batch[name]
            result[name] = torch.where(expand(mask, own), value.to(own), own)
        return result

    def deployed(self) -> nn.Module:
        network = self.denoiser.network
        return network if self.text_encoder is None else Joint(network, self.text_encoder)
