"""How often a model solves problems with a checkable answer: p(x) = (1/K) sum_k 1[verifier(y^(k), answer)].

A response that was cut before its end token counts as wrong, whatever its text says; the share of these is reported,
for else a model of long answers looks incompetent. A table is measured once per (weights, problems, K, sampling, seed).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_llm.engine.rollouts import Rollout, Rollouts, Sampling
from kd_llm.engine.verifiers import Verifier
from kdcore.data import mix
from kdcore.errors import InputError
from kdcore.stages import cache_folder, digest, write_atomically

BLOCK = 64  # prompts that share a seed; processes take whole blocks, so that their number changes no response


@dataclass(frozen=True)
class PassRates:
    """Of N problems, how many of `k` responses are right and how many were cut; tokens is their mean length."""

    correct: list[int]
    truncated: list[int]
    k: int
    tokens: float

    @property
    def rates(self) -> Tensor:
        """p (N,) float64."""
        return torch.tensor(self.correct, dtype=torch.float64) / self.k

    @property
    def truncation(self) -> float:
        """Share of responses that were cut."""
        return sum(self.truncated) / max(1, self.k * len(self.truncated))

    def save(self, path: Path, **about: Any) -> None:
        """As JSON; `about` says what was measured."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({**about, **asdict(self)}))

    @classmethod
    def load(cls, path: Path) -> PassRates:
        """InputError where the file is no such table."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            table = cls(values["correct"], values["truncated"], values["k"], values["tokens"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"pass rates {path}: cannot be read ({error})") from None
        if len(table.correct) != len(table.truncated) or table.k < 1:
            raise InputError(f"pass rates {path}: damaged, its columns have different lengths")
        return table


def answer_all(
    rollouts: Rollouts,
    model: nn.Module,
    prompts: Sequence[Tensor],
    n: int,
    sampling: Sampling,
    seed: int,
    *,
    rank: int = 0,
    processes: int = 1,
) -> list[list[Rollout]]:
    """`n` responses to each prompt, on every process: each makes some blocks of 64 prompts, and all get all."""
    rollouts.sync(model)
    starts = list(range(0, len(prompts), BLOCK))
    made: dict[int, list[Rollout]] = {}
    for start in starts[rank::processes]:
        made[start] = rollouts.generate(model, prompts[start : start + BLOCK], n, sampling, mix(seed, start))
    if processes > 1:
        from accelerate.utils import gather_object

        made = dict(gather_object(list(made.items())))
    flat = [rollout for start in starts for rollout in made[start]]
    return [flat[index * n : (index + 1) * n] for index in range(len(prompts))]


def measure(
    responses: Sequence[Sequence[Rollout]], answers: Sequence[str], verify: Verifier, tokenizer: Any
) -> PassRates:
    """The table of equally many responses to each problem. InputError where the counts differ."""
    sizes = {len(some) for some in responses}
    if len(responses) != len(answers) or len(sizes) != 1 or 0 in sizes:
        raise InputError(
            f"pass rates: {len(responses)} problems, {len(answers)} answers, {sorted(sizes)} responses each"
        )
    correct, truncated, tokens = [], [], 0
    for some, answer in zip(responses, answers, strict=True):
        texts = tokenizer.batch_decode([r.completion.tolist() for r in some], skip_special_tokens=True)
        correct.append(sum(r.finished and verify(text, answer) for r, text in zip(some, texts, strict=True)))
        truncated.append(sum(not r.finished for r in some))
        tokens += sum(len(r.logp) for r in some)
    k = sizes.pop()
    return PassRates(correct, truncated, k, tokens / (k * len(responses)))


def pass_rates(
    rollouts: Rollouts,
    model: nn.Module,
    prompts: Sequence[Tensor],
    answers: Sequence[str],
    verify: Verifier,
    tokenizer: Any,
    *,
    k: int = 8,
    sampling: Sampling,
    seed: int = 0,
    rank: int = 0,
    processes: int = 1,
    cache: bool = True,
) -> PassRates:
    """The table of a model; taken from kd's cache where this very table has been measured before."""
    from kdcore.gpu import module_fingerprint

    key = {
        "model": module_fingerprint(model),
        "problems": digest([[p.tolist() for p in prompts], list(answers)]),
        "verifier": f"{verify.__module__}:{verify.__qualname__}",
        "k": k,
        "sampling": sampling.model_dump(),
        "seed": seed,
        "torch": torch.__version__,
    }
    path = cache_folder() / "passrate" / f"{digest(key)}.json"
    known = [PassRates.load(path) if cache and path.is_file() else None]
    if processes > 1:  # they need not share a disk: the first one decides
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(known)
    if known[0] is not None:
        return known[0]
    made = answer_all(rollouts, model, prompts, k, sampling, seed, rank=rank, processes=processes)
    table = measure(made, answers, verify, tokenizer)
    if cache and rank == 0:
        table.save(path, **key)
    return table
