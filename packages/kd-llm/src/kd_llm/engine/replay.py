"""Where the responses of a batch come from: data, fresh samples of the student, or a replay buffer of older ones.

With phi the probability of student-generated responses, s the share of the budget that is done and u uniform in [0, 1)
a micro-batch takes (Ko et al. 2024, DistiLLM, arXiv 2402.03898, section 3.2, and its release)

    fresh samples   if u < phi (1 - s), or u < phi while the buffer is not full
    the buffer      if u < phi otherwise
    the data        if u >= phi

and phi grows by an increment whenever the validation loss is above the last reference by a tolerance; that loss is
then the reference. phi never falls: a student that has left the data's distribution needs its own more and more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_llm.engine.onpolicy import Batch, prompts_of, with_responses
from kd_llm.engine.rollouts import Rollout, Rollouts, Sampling
from kdcore.config import Config
from kdcore.data import mix
from kdcore.errors import InputError

Source = Literal["fresh", "replay", "data"]


class OffPolicyConfig(Config):
    """How often the student's own responses are used, and when they are new."""

    initial: float = Field(0.0, ge=0, le=1, description="probability of student-generated responses at the start")
    increment: float = Field(0.1, ge=0, le=1, description="what it grows by when the validation loss has risen")
    tolerance: float = Field(0.1, ge=0, description="rise of the validation loss that counts, in nats per token")
    every: int = Field(100, ge=1, description="optimiser steps between two validations")
    validation: int = Field(256, ge=1, description="validation examples of each")
    capacity: int = Field(1000, ge=1, description="sequences in the replay buffer")
    ratio: Literal["decreasing", "increasing", "constant"] = Field(
        "decreasing", description="share of new samples among the student's, once the buffer is full: 1 - s, s or 1/2"
    )


class AdaptiveProbability:
    """phi and its reference loss."""

    def __init__(self, config: OffPolicyConfig):
        self.config, self.value, self.reference = config, config.initial, None

    def observe(self, loss: float) -> None:
        """A validation loss, in nats per token. The first one is the reference."""
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + self.config.tolerance:
            self.value, self.reference = min(1.0, self.value + self.config.increment), loss

    def source(self, uniform: float, done: float, *, full: bool) -> Source:
        """Where a micro-batch with this draw takes its responses; `done` in [0, 1] is the share of the budget."""
        share = {"decreasing": 1 - done, "increasing": done, "constant": 0.5}[self.config.ratio]
        if uniform >= self.value:
            return "data"
        return "fresh" if not full or uniform < self.value * share else "replay"


class ReplayBuffer:
    """The newest `capacity` rollouts, oldest first."""

    def __init__(self, capacity: int):
        self.items: deque[Rollout] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def full(self) -> bool:
        return len(self.items) == self.items.maxlen

    def add(self, rollouts: Iterable[Rollout]) -> None:
        self.items.extend(rollouts)

    def sample(self, count: int, seed: int) -> list[Rollout]:
        """`count` different rollouts, a function of the contents and the seed. InputError where there are fewer."""
        if count > len(self.items):
            raise InputError(f"replay: {count} rollouts wanted of {len(self.items)}; give a larger capacity")
        order = torch.randperm(len(self.items), generator=torch.Generator().manual_seed(seed))
        return [self.items[i] for i in order[:count].tolist()]

    def state(self) -> dict[str, Tensor]:
        """The contents as four flat tensors."""
        items = list(self.items)
        empty = [torch.zeros(0, dtype=torch.int64)]
        return {
            "ids": torch.cat([item.ids for item in items] or empty),
            "logp": torch.cat([item.logp for item in items] or [torch.zeros(0)]),
            "lengths": torch.tensor([[len(item.ids), item.completion_start] for item in items]).reshape(-1, 2),
            "finished": torch.tensor([item.finished for item in items], dtype=torch.bool),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The counterpart of `state`."""
        self.items.clear()
        lengths = state["lengths"].tolist()
        ids = state["ids"].split([length for length, _ in lengths])
        logp = state["logp"].split([length - start for length, start in lengths])
        for one, (_, start), values, finished in zip(ids, lengths, logp, state["finished"].tolist(), strict=True):
            self.items.append(Rollout(one.clone(), start, values.clone(), finished))


def continued(
    rollouts: Rollouts, model: nn.Module, prefixes: Sequence[Tensor], room: Sequence[int], sampling: Sampling, seed: int
) -> list[Rollout]:
    """A continuation of each prefix ((P,) int64) by at most room[i] >= 1 tokens; completion_start is P.

    One `generate` call answers all prefixes if the model's positions allow it: a call has one length limit, so that
    prefixes with much room are grouped apart from long ones otherwise. What goes beyond a prefix's own room is cut.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    found: dict[int, Rollout] = {}
    order = sorted(range(len(prefixes)), key=lambda i: room[i])
    for part, group in enumerate(_groups(order, [len(p) for p in prefixes], room, limit)):
        longest = sampling.model_copy(update={"max_new_tokens": max(room[i] for i in group)})
        made = rollouts.generate(model, [prefixes[i] for i in group], 1, longest, mix(seed, part))
        found.update({i: _cut(rollout, room[i]) for i, rollout in zip(group, made, strict=True)})
    return [found[i] for i in range(len(prefixes))]


def _groups(order: list[int], lengths: Sequence[int], room: Sequence[int], limit: int | None) -> list[list[int]]:
    if not order:
        return []
    fits = limit is None or max(lengths[i] for i in order) + max(room[i] for i in order) <= limit
    if fits or len(order) == 1:
        return [order]
    half = len(order) // 2
    return [*_groups(order[:half], lengths, room, limit), *_groups(order[half:], lengths, room, limit)]


def _cut(rollout: Rollout, room: int) -> Rollout:
    if len(rollout.logp) <= room:
        return rollout
    return Rollout(
        rollout.ids[: rollout.completion_start + room], rollout.completion_start, rollout.logp[:room].clone(), False
    )


# ---------------------------------------------------------------- the responses of an optimiser step

Revise = Callable[[nn.Module, Sequence[Rollout], int], list[Rollout]]
"""(student, its new responses, seed) -> what enters the buffer."""


class StudentResponses:
    """Chooses the responses of every micro-batch of an optimiser step, samples the new ones and keeps the buffer.

    Draws depend on (seed, step, micro-batch, process) alone; phi and the buffer are the same on all processes, and are
    the state that a checkpoint needs. `steps` is the budget: the caller sets it when it is known.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        config: OffPolicyConfig,
        sampling: Sampling,
        revise: Revise | None = None,
        *,
        seed: int,
        rank: int = 0,
        prompt_tokens: int | None = None,
    ):
        self.rollouts, self.sampling, self.revise = rollouts, sampling, revise
        self.seed, self.rank, self.prompt_tokens = seed, rank, prompt_tokens
        self.probability, self.buffer, self.steps = AdaptiveProbability(config), ReplayBuffer(config.capacity), 0

    def choose(self, student: nn.Module, batches: Sequence[Batch], step: int) -> list[list[Rollout] | None]:
        """The rollouts of each micro-batch, None where its responses are the data's."""
        done, full = step / max(1, self.steps), self.buffer.full
        sources: list[str] = []
        for j, batch in enumerate(batches):
            draw = torch.rand((), generator=torch.Generator().manual_seed(mix(self.seed, step, j)), dtype=torch.float64)
            source = self.probability.source(float(draw), done, full=full)
            small = source == "replay" and len(self.buffer) < len(batch["input_ids"])
            sources.append("fresh" if small else source)
        prompts = [
            prompts_of(batch, self.prompt_tokens) if source == "fresh" else []
            for batch, source in zip(batches, sources)
        ]
        fresh = iter(self._sampled(student, [p for some in prompts for p in some], step))
        older = [
            self.buffer.sample(len(batch["input_ids"]), mix(self.seed, step, j, self.rank + 1))
            if source == "replay"
            else []
            for j, (batch, source) in enumerate(zip(batches, sources))
        ]
        result: list[list[Rollout] | None] = []
        new: list[Rollout] = []
        for source, some, kept in zip(sources, prompts, older):
            own = [next(fresh) for _ in some]
            new += own
            result.append({"fresh": own, "replay": kept, "data": None}[source])
        if set(sources) != {"data"}:  # all processes agree on that, so that all of them meet here
            self.buffer.add(_from_all(new))
        return result

    def _sampled(self, student: nn.Module, prompts: Sequence[Tensor], step: int) -> list[Rollout]:
        """New responses of the student, revised."""
        if not prompts:
            return []
        seed = mix(self.seed, step, self.rank)
        self.rollouts.sync(student)
        made = self.rollouts.generate(student, prompts, 1, self.sampling, seed)
        return made if self.revise is None else self.revise(student, made, seed)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        phi = self.probability
        return {"replay": self.buffer.state(), "phi": phi.value, "reference": phi.reference, "steps": self.steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state`."""
        self.buffer.load_state(state["replay"])
        self.probability.value, self.probability.reference = state["phi"], state["reference"]
        self.steps = state["steps"]


# ---------------------------------------------------------------- responses beside the data's own

RESPONSE = {"input_ids": "response_ids", "attention_mask": "response_mask", "labels": "response_labels"}


def beside(batch: Batch, rollouts: Sequence[Rollout], pad: int) -> dict[str, Tensor]:
    """The keys that a batch gains for responses that losses of their own are on, while it keeps the data's."""
    rebuilt = with_responses({"input_ids": batch["input_ids"]}, rollouts, pad)
    return {new: rebuilt[key] for key, new in RESPONSE.items()}


def response(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch of the responses `beside`, or the batch itself where there are none."""
    return {key: batch[new] for key, new in RESPONSE.items()} if RESPONSE["labels"] in batch else batch


def _from_all(rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts of all processes in the order of their ranks, so that every process has the same buffer."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rollouts
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, rollouts)
    return [rollout for some in gathered for rollout in some]
