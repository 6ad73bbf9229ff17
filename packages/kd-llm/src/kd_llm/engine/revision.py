"""Sequence correction and re-generation of a student's samples (SCRG; Liu et al. 2024, arXiv 2407.10068).

With p_i and q_i the next-token distributions of teacher and student on the student's own prefix at response position i:

    y^t_i = argmax_v p_i(v),   D_i = KL(p_i || q_i),   j = argmax_{i : y_i != y^t_i} D_i
    y <- [y_<j, y^t_j, a fresh continuation by the student]

A response that the teacher agrees with everywhere stays. The total length keeps the sampling's limit. Tokens after the
end token do not exist in a rollout, so they are never candidates; the end token itself is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_llm.engine.chunked import HeadRows, chunked_rows
from kd_llm.engine.objective import HiddenRows, run_body
from kd_llm.engine.onpolicy import with_responses
from kd_llm.engine.replay import continued
from kd_llm.engine.rollouts import Rollout, Rollouts, Sampling, evaluating
from kd_llm.engine.rows import predicted, shifts_labels
from kd_llm.engine.teachers import TeacherSource
from kd_llm.engine.token_loss import DenseSignal, cut
from kdcore.errors import InputError


def error_position(tokens: Tensor, teacher: Tensor, divergence: Tensor) -> int | None:
    """j of one response: tokens and teacher's tokens (L,), D (L,). None where they agree everywhere.

    >>> error_position(torch.tensor([1, 0]), torch.tensor([1, 2]), torch.tensor([9.0, 0.1]))
    1
    """
    wrong = tokens != teacher
    if not bool(wrong.any()):
        return None
    return int(divergence.masked_fill(~wrong, -torch.inf).argmax())


class Reviser:
    """SCRG: correction and re-generation on the student's samples."""

    def __init__(self, rollouts: Rollouts, teacher: TeacherSource, sampling: Sampling, *, pad: int, eos: Sequence[int]):
        self.rollouts, self.teacher, self.sampling, self.pad, self.eos = rollouts, teacher, sampling, pad, set(eos)

    def __call__(self, student: nn.Module, made: Sequence[Rollout], seed: int) -> list[Rollout]:
        """Each rollout revised once: y_<j as it was, the teacher's token, a new rest; unchanged where both agree."""
        result, prefixes, places = list(made), [], []
        for i, (tokens, divergence) in enumerate(self.views(student, made)):
            own = made[i].completion
            j = error_position(own, tokens, divergence)
            if j is None:
                continue
            start = made[i].completion_start
            prefix = torch.cat([made[i].ids[: start + j], tokens[j : j + 1]])
            ended = int(tokens[j]) in self.eos
            # ln q of the teacher's token is not known as a sample's: it was not drawn.
            logp = torch.cat([made[i].logp[:j], torch.zeros(1)])
            result[i] = Rollout(prefix, start, logp, ended)
            if not ended and self.sampling.max_new_tokens > j + 1:
                prefixes.append(prefix)
                places.append(i)
        room = [self.sampling.max_new_tokens - len(result[i].logp) for i in places]
        rest = continued(self.rollouts, student, prefixes, room, self.sampling, seed) if places else []
        for i, more in zip(places, rest, strict=True):
            logp = torch.cat([result[i].logp, more.logp])
            result[i] = Rollout(more.ids, result[i].completion_start, logp, more.finished)
        return result

    def views(self, student: nn.Module, made: Sequence[Rollout]) -> list[tuple[Tensor, Tensor]]:
        """For each rollout y^t (L,) and D (L,) on its own prefixes, on the CPU."""
        device, shift = next(student.parameters()).device, shifts_labels(student)
        batch = with_responses({"input_ids": torch.zeros(0, device=device)}, made, self.pad)
        with evaluating(student), torch.no_grad():
            rows = run_body(student, batch, predicted(batch, shift).nonzero(), shift)
            mine, theirs = sides(rows, self.teacher.signal(batch, rows))
        divergence, tokens = chunked_rows(mine, theirs, _disagreement)
        lengths = [len(rollout.logp) for rollout in made]
        return list(zip(tokens.cpu().split(lengths), divergence.cpu().split(lengths), strict=True))


def _disagreement(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    lp = t.log_softmax(1)
    return (lp.exp() * (lp - z.log_softmax(1))).sum(1), t.argmax(1)


def sides(rows: HiddenRows, signal: Any, vocabulary: int | None = None) -> tuple[HeadRows, HeadRows]:
    """The student's and the teacher's rows and heads, on the outputs that both have. InputError without them."""
    if not isinstance(signal, DenseSignal) or signal.weight_t is None or not rows.head.linear:
        raise InputError(
            "teacher: this needs the teacher's whole distribution, and linear output heads; allowed: a local "
            "teacher (no cache, no server)"
        )
    n = vocabulary or min(len(rows.head.weight), len(signal.weight_t))
    return (
        HeadRows(rows.hidden, cut(rows.head.weight, n), cut(rows.head.bias, n), rows.head.spec),
        HeadRows(signal.hidden_t, cut(signal.weight_t, n), cut(signal.bias_t, n), signal.head_t),
    )
