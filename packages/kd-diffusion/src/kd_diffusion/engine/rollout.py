"""rollout: the inputs and outputs of a generator of one or several steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.process import EDM, Process, add_noise, coefficients

Generator = Callable[[Tensor, Tensor, Condition], Tensor]
Start = Literal["unit", "noised"]
Renoise = Literal["noise", "euler"]


def start_noise(process: Process, z: Tensor, t: Tensor, start: Start = "unit") -> Tensor:
    """The first input from z ~ N(0, I): z itself, or s_t z, the noised zero image; sigma z on EDM either way."""
    if start == "unit" and not isinstance(process, EDM):
        return z
    return coefficients(process, t, z)[1].to(z.dtype) * z


def rollout(
    generator: Generator,
    process: Process,
    indices: Sequence[float],
    condition: Condition,
    normal: Callable[[], Tensor],
    *,
    stop: int | None = None,
    grad: bool = False,
    start: Start = "unit",
    renoise: Renoise = "noise",
) -> Tensor:
    """The generator's x after step `stop` (0-based; None: the last), with a graph through that step only.

    `indices` are levels of the process's table, the noisiest first. `normal()` gives fresh noise (B, ...): the first
    is the start. Between steps the sample is noised anew at the next level (`noise`: x = a x0 + s e) or moved along
    the line through x0 and the present input (`euler`). Steps before `stop` run under no_grad.
    """
    last = len(indices) - 1 if stop is None else stop
    noise = normal()
    times = [process.at(_filled(len(noise), index, noise.device)) for index in indices[: last + 1]]
    x_t = start_noise(process, noise, times[0], start)
    x = x_t
    for step, t in enumerate(times):
        if step > 0:
            x_t = _next(process, x_t, x, times[step - 1], t, normal, renoise)
        with nullcontext() if grad and step == last else torch.no_grad():
            x = generator(x_t, t, condition)
    return x


def _filled(count: int, index: float, device: torch.device) -> Tensor:
    return torch.full((count,), index, device=device, dtype=torch.int64 if isinstance(index, int) else torch.float64)


def euler_move(process: Process, x_t: Tensor, x: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """From x_t at time t to the time `to` along the line through the prediction x: a' x + s' (x_t - a x) / s."""
    (a, s), (a_to, s_to) = coefficients(process, t, x), coefficients(process, to, x)
    ratio = s_to / s.clamp_min(1e-6)
    return (a_to - ratio * a).to(x.dtype) * x + ratio.to(x.dtype) * x_t


def _next(
    process: Process, x_t: Tensor, x: Tensor, t: Tensor, to: Tensor, normal: Callable[[], Tensor], renoise: str
) -> Tensor:
    return add_noise(process, x, normal(), to) if renoise == "noise" else euler_move(process, x_t, x, t, to)
