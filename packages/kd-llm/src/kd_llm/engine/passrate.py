"""How often a model solves problems with a checkable answer: p(x) = (1/K) sum_k 1[verifier(y^(k), answer)].

A response that was cut before its end token counts as wrong, whatever its text says; the share of these is reported,
for else a model of long answers looks incompetent. A table is measured once per (weights, problems, K, sampling, seed).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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

    def summary(self) -> dict[str, float]:
        """mean, and the shares of problems never and always solved and of responses that were cut."""
        p = self.rates
        edges = {"never": float((p == 0).double().mean()), "always": float((p == 1).double().mean())}
        return {"mean": float(p.mean()), "truncated": self.truncation, **edges}

    def accuracies(self, of: Sequence[int], names: Sequence[str]) -> dict[str, float]:
        """accuracy (mean over domains), accuracy/<domain> of several, truncated; `of`: the domain of each problem."""
        where = torch.tensor(of)
        parts = {names[i]: float(self.rates[where == i].mean()) for i in sorted(set(of))}
        several = {f"accuracy/{name}": value for name, value in parts.items()} if len(parts) > 1 else {}
        return {"accuracy": sum(parts.values()) / len(parts), **several, "truncated": self.truncation}

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


@dataclass(frozen=True)
class Sampler:
    """What answers prompts, as which of how many processes. `cache`: keep results in kd's cache, by their inputs."""

    rollouts: Rollouts
    tokenizer: Any
    rank: int = 0
    processes: int = 1
    cache: bool = True

    def pass_rates(
        self,
        model: nn.Module,
        prompts: Sequence[Tensor],
        answers: Sequence[str],
        verify: Verifier,
        *,
        k: int = 8,
        sampling: Sampling,
        seed: int = 0,
    ) -> PassRates:
        """The table of a model; not measured again where this very table is in the cache."""
        about = {"answers": digest(list(answers)), "verifier": f"{verify.__module__}:{verify.__qualname__}", "k": k}

        def make() -> dict[str, Any]:
            made = self._answers(model, prompts, k, sampling, seed)
            return asdict(measure(made, answers, verify, self.tokenizer))

        values = self._cached("passrate", {**self._key(model, prompts, sampling, seed), **about}, make)
        return PassRates(values["correct"], values["truncated"], values["k"], values["tokens"])

    def responses(
        self, model: nn.Module, prompts: Sequence[Tensor], sampling: Sampling, seed: int = 0
    ) -> list[Rollout]:
        """One response to each prompt, without log-probabilities (zeros); from the cache where they are in it."""

        def make() -> dict[str, Any]:
            made = [some[0] for some in self._answers(model, prompts, 1, sampling, seed)]
            return {"tokens": [r.completion.tolist() for r in made], "finished": [r.finished for r in made]}

        values = self._cached("responses", self._key(model, prompts, sampling, seed), make)
        return [
            with_completion(prompt, tokens, finished)
            for prompt, tokens, finished in zip(prompts, values["tokens"], values["finished"], strict=True)
        ]

    def _answers(self, model: nn.Module, prompts: Sequence[Tensor], n: int, sampling: Sampling, seed: int) -> Any:
        return answer_all(self.rollouts, model, prompts, n, sampling, seed, rank=self.rank, processes=self.processes)

    def _key(self, model: nn.Module, prompts: Sequence[Tensor], sampling: Sampling, seed: int) -> dict[str, Any]:
        from kdcore.gpu import module_fingerprint

        return {
            "model": module_fingerprint(model),
            "prompts": digest([prompt.tolist() for prompt in prompts]),
            "sampling": sampling.model_dump(),
            "source": type(self.rollouts).__name__,
            "seed": seed,
            "torch": torch.__version__,
        }

    def _cached(self, kind: str, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = cache_folder() / kind / f"{digest(key)}.json"
        known = [_read(path) if self.cache else None]
        if self.processes > 1:  # they need not share a disk: the first one decides
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(known)
        if known[0] is not None:
            return known[0]
        values = make()
        if self.cache and self.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({**key, **values}))
        return values


def with_completion(prompt: Tensor, tokens: Sequence[int], finished: bool) -> Rollout:
    """A rollout from its tokens, with zeros for log-probabilities that are not known."""
    completion = torch.tensor(tokens, dtype=torch.int64)
    return Rollout(torch.cat([prompt.cpu(), completion]), len(prompt), torch.zeros(len(completion)), finished)


def _read(path: Path) -> dict[str, Any] | None:
    """A cache entry, None where there is none; one that cannot be read is made again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
