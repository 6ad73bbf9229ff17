"""Random numbers of a training as a function of (seed, step, turn): the same on one process and on many.

Every draw is made for the batch of all processes together and a process keeps its part, so that two processes see the
noise one would have seen, scalars (a stop step, a guidance scale) agree on all ranks, and a resumed run needs no
generator state.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kdcore.data import mix


class Draws:
    """Gives the random numbers of each turn. `seed` is the run's."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._step, self._turns = -1, {}

    def turn(self, name: str, step: int, device: torch.device | str = "cpu") -> Turn:
        """The numbers of one micro-batch of `name` in iteration `step`; a further call is the next micro-batch."""
        if step != self._step:
            self._step, self._turns = step, {}
        micro = self._turns.get(name, 0)
        self._turns[name] = micro + 1
        return self.at(name, step, micro, device)

    def at(self, name: str, step: int, micro: int = 0, device: torch.device | str = "cpu") -> Turn:
        """The numbers of a given turn, without counting it."""
        return Turn(mix(self.seed, zlib.crc32(name.encode()), step, micro), torch.device(device))


class Turn:
    """A stream of draws; `count` is always this process's share of the batch."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if group else 0
        self.world = torch.distributed.get_world_size() if group else 1

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal, (B, ...)."""
        whole = (shape[0] * self.world, *shape[1:])
        return self._share(torch.randn(whole, generator=self.generator, device=self.device, dtype=dtype), shape[0])

    def uniform(self, count: int) -> Tensor:
        """U(0, 1) per sample, float64 (B,)."""
        values = torch.rand(count * self.world, generator=self.generator, device=self.device, dtype=torch.float64)
        return self._share(values, count)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        """Uniform integers in {low, .., high} (both included) per sample, int64 (B,)."""
        whole = (count * self.world,)
        return self._share(torch.randint(low, high + 1, whole, generator=self.generator, device=self.device), count)

    def one_uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number for the whole batch, the same on every process."""
        return low + (high - low) * float(
            torch.rand((), generator=self.generator, device=self.device, dtype=torch.float64)
        )

    def one_integer(self, count: int) -> int:
        """One integer in {0, .., count - 1} for the whole batch, the same on every process."""
        return int(torch.randint(count, (), generator=self.generator, device=self.device))

    def fork(self) -> Turn:
        """A stream that starts where this one stands: what one draws, the other will draw too."""
        other = Turn(0, self.device)
        other.generator.set_state(self.generator.get_state())
        return other

    def _share(self, values: Tensor, count: int) -> Tensor:
        return values[self.rank * count : (self.rank + 1) * count] if self.world > 1 else values
