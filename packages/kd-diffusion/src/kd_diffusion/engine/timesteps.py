"""Which times the losses are taken at, and the levels of a few-step generator."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kd_diffusion.engine.draws import Turn
from kd_diffusion.engine.process import EDM, Process
from kdcore.config import Config
from kdcore.errors import InputError


class TimesConfig(Config):
    """uniform: an index of the process's table (DDPM timesteps, Karras sigmas, 1000ths of a flow), both ends included.
    lognormal: ln sigma ~ N(mean, std^2). continuous: the table between its indices."""

    kind: Literal["uniform", "continuous", "lognormal"] = Field("uniform", description="law of the time")
    low: int = Field(20, ge=0, description="smallest index")
    high: int = Field(980, ge=0, description="largest index")
    mean: float = Field(-1.2, description="lognormal: mean of ln sigma")
    std: float = Field(1.2, gt=0, description="lognormal: deviation of ln sigma")

    @model_validator(mode="after")
    def _ordered(self) -> TimesConfig:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self


def sample_times(config: TimesConfig, process: Process, draw: Turn, count: int, *, above: int = -1) -> Tensor:
    """Times (count,), independent per sample; `above` is an index that every time must exceed.

    Raises InputError for lognormal on another process than EDM, or a table that ends before `high`.
    """
    low = max(config.low, above + 1)
    high = min(config.high, process.size - 1)
    if low > high:
        raise InputError(f"times: no index above {above} up to {high}")
    if config.kind == "lognormal":
        if not isinstance(process, EDM):
            raise InputError(f"times.kind = 'lognormal': only for EDM, the teacher is {type(process).__name__}")
        # At the boundary c_out is 0, and just above it the target (x - c_skip x_t) / c_out of a network explodes.
        return (config.mean + config.std * draw.normal((count,), torch.float64)).exp().clamp_min(2 * process.boundary)
    if config.kind == "uniform":
        return process.at(draw.integers(low, high, count))
    return process.at(low + draw.uniform(count) * (high - low))


def levels(process: Process, steps: int, start: float | None = None, *, floor: bool = False) -> list[float]:
    """Table indices of a generator of `steps` steps, the noisiest first.

    Default: (start + 1)(1 - k / N) - 1, which is 999, 749, 499, 249 for four steps of a table of 1000.
    `floor`: floor(start (1 - k / N)), which is 625, 468, 312, 156 (arXiv 2505.12674).
    EDM: 999, 749, 499, 249 in thousandths of the table from its smallest sigma to that of `start`, as
    CMStochasticIterativeScheduler steps; numbers between two indices where `start` is not the last.

    >>> from kd_diffusion.engine.process import Flow
    >>> levels(Flow(), 4), levels(Flow(), 4, 625, floor=True)
    ([999, 749, 499, 249], [625, 468, 312, 156])
    """
    last = process.size - 1
    start = last if start is None else start
    if not 0 <= start <= last or steps < 1 or steps > start + 1:
        raise InputError(f"{steps} steps from index {start}: the table has {process.size} entries")
    if isinstance(process, EDM):
        whole = [last - k * (process.size // steps) for k in range(steps)]
        return whole if start == last else [start * index / last for index in whole]
    if not isinstance(start, int):
        raise InputError(f"first step at index {start}: the table of {type(process).__name__} has whole ones alone")
    if floor:
        return [start * (steps - k) // steps for k in range(steps)]
    return [(start + 1) * (steps - k) // steps - 1 for k in range(steps)]


def bucket_of(process: Process, t: Tensor, buckets: int = 10) -> Tensor:
    """Which of equal parts of the table a time falls in, int64 (B,)."""
    return (process.index_of(t) / process.size * buckets).long().clamp(0, buckets - 1)
