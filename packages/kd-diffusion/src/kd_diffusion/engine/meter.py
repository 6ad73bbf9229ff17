"""NoiseLevelMeter: the size of the generator's gradient by noise level, gathered between two log lines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_diffusion.engine.process import Process
from kd_diffusion.engine.timesteps import bucket_of

BUCKETS = 10


class NoiseLevelMeter(nn.Module):
    """Sums of the root mean square of g per bucket of the table of times; on the device, read out rarely."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(BUCKETS, dtype=torch.float64), persistent=False)
        self.register_buffer("counts", torch.zeros(BUCKETS, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def add(self, process: Process, t: Tensor, g: Tensor) -> None:
        """g (B, ...) at times t (B,)."""
        bucket = bucket_of(process, t, BUCKETS)
        self.sums.index_add_(0, bucket, g.detach().double().square().flatten(1).mean(1).sqrt())
        self.counts.index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float64))

    def take(self) -> list[float | None]:
        """The mean per bucket since the last call, None for a bucket without samples; starts anew."""
        means = [s / n if n else None for s, n in zip(self.sums.tolist(), self.counts.tolist(), strict=True)]
        self.sums.zero_()
        self.counts.zero_()
        return means
