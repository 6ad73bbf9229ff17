"""DDK: Distilling Domain Knowledge for Efficient Large Language Models (arXiv 2407.16154, 2024).

A small language model goes on with pretraining beside a large one on a corpus of N domains. The share of each domain is
set anew every K optimiser steps from how far the student lags behind the teacher there, with a memory, so that it does
not jump, and a floor, so that no domain starves. With CE_i(M) the mean token cross-entropy of model M on the fixed
validation text of domain i:

    l_S[i] = exp CE_i(student),  l_T[i] = exp CE_i(teacher),  rho[i] = l_S[i] / l_T[i]                              (1)
    r_0[i] = exp rho_0[i] / sum_j exp rho_0[j]                                                                      (2)
    psi[i] = r_t[i] exp rho_{t+1}[i],   r_{t+1}[i] = alpha psi[i] / sum_j psi[j] + (1 - alpha) / N                  (3)
    L      = CE(z_S, y) + gamma T^2 KL(softmax(z_T / T) || softmax(z_S / T))                                        (4)

(1) uses perplexities, not losses: a student far behind gets nearly everything but the floor. r_0 only starts the memory
of (3): the first K steps see the corpus as it is. The teacher never changes, so its perplexities are measured once.
The paper does not say which way round its KL is: `divergence` chooses, and forward is the usual one. The numbers of the
equations are this file's.

Teacher frozen, in eval mode; all of the student trains and ships. `mixture.json` of the run has the trajectory of r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from kd_llm.engine.mixture import DomainMixture
from kd_llm.engine.objective import DivergenceArgs, TokenObjective
from kd_llm.engine.perplexity import perplexities
from kd_llm.engine.teachers import TeacherSource
from kdcore.config import Config, MethodConfig, TrainConfig
from kdcore.errors import InputError

Batch = Mapping[str, Any]
Sampling = Literal["ddk", "fresh", "equal", "natural"]


class PretrainConfig(Config):
    """Pretraining of a student from scratch, where there is no pretrained one: the labels alone, fixed shares."""

    train: TrainConfig
    shares: dict[str, float] | None = Field(
        None, description="share of each domain, for those not named the rest in equal parts; None: the corpus as it is"
    )

    @field_validator("shares")
    @classmethod
    def _are_shares(cls, shares: dict[str, float] | None) -> dict[str, float] | None:
        if shares is not None and (min(shares.values(), default=0) < 0 or sum(shares.values()) > 1 + 1e-9):
            raise ValueError("must be >= 0 and sum to 1 at most")
        return shares


class DDKConfig(MethodConfig):
    interval: int = Field(1000, ge=1, description="K, optimiser steps between two updates of the shares; one epoch")
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the discrepancy in the shares; the rest is uniform")
    gamma: float = Field(0.2, ge=0, description="weight of the divergence beside the cross-entropy")
    temperature: float = Field(1.0, gt=0, description="T of the divergence")
    divergence: Literal["forward", "reverse"] = Field("forward", description="KL(teacher || student), or the other way")
    sampling: Sampling = Field(
        "ddk", description="ddk: (3); fresh: (2) at every interval; equal: 1/N from the first update on; natural"
    )
    counts: Literal["categorical", "rounded"] = Field(
        "categorical", description="each sample's domain is drawn, or every domain gets its share, rounded"
    )
    validation_size: int = Field(500, ge=1, description="validation examples of each domain that perplexity is of")
    pretrain: PretrainConfig | None = Field(None, description="trains the student before; None: it comes pretrained")


# ---------------------------------------------------------------- shares


def initial_shares(ratios: list[float]) -> list[float]:
    """Eq. (2): softmax of the ratios rho_0, N numbers.

    >>> [round(share, 6) for share in initial_shares([1.0, 1.5, 2.0])]
    [0.186324, 0.307196, 0.50648]
    """
    return torch.tensor(ratios, dtype=torch.float64).softmax(0).tolist()


def next_shares(shares: list[float], ratios: list[float], alpha: float = 0.5) -> list[float]:
    """Eq. (3): the shares r_{t+1} from r_t and rho_{t+1}, N numbers each, alpha in [0, 1].

    >>> [round(share, 6) for share in next_shares([0.5, 0.5], [1.0, 1.0])]
    [0.5, 0.5]
    """
    r, rho = torch.tensor(shares, dtype=torch.float64), torch.tensor(ratios, dtype=torch.float64)
    return (alpha * (r.log() + rho).softmax(0) + (1 - alpha) / len(shares)).tolist()


# ---------------------------------------------------------------- the objective


class DDK(TokenObjective):
    """Eq. (4), and at the start of each interval eqs. (1) to (3); the state of the mixture is in its checkpoints.

    Args:
        mixture: what the student trains on; its size is K optimiser steps.
        validation: domain -> batches, in the order of the mixture's domains.
        teacher_perplexity: domain -> l_T, measured beforehand.
        log: gets a record of each interval.
    """

    name = "ddk"

    def __init__(
        self,
        teacher: TeacherSource | None,
        args: DDKConfig,
        mixture: DomainMixture,
        validation: Mapping[str, Sequence[Batch]],
        teacher_perplexity: Mapping[str, float],
        *,
        log: Callable[..., None] = lambda **record: None,
    ):
        divergence = DivergenceArgs(
            divergence=args.divergence, temperature=args.temperature, soft_weight=args.gamma, hard_weight=1.0
        )
        super().__init__(teacher, divergence)
        if list(validation) != mixture.names or set(teacher_perplexity) != set(mixture.names):
            raise InputError(
                f"validation, teacher_perplexity: domains {list(validation)}, {list(teacher_perplexity)}; "
                f"allowed: those of the mixture, {mixture.names}"
            )
        self.ddk, self.mixture, self.log = args, mixture, log
        self.validation, self.teacher_perplexity = validation, teacher_perplexity
        self.shares: list[float] | None = None
        self.history: list[dict[str, Any]] = []

    def start(self, student: nn.Module, interval: int, step: int) -> None:
        """Measures the student and sets the shares of `interval`; `step` optimiser steps are done."""
        found = _on_all_processes(student, self.validation)
        ratios = [found[name] / self.teacher_perplexity[name] for name in self.mixture.names]
        self.shares = self.updated(ratios)
        natural = interval == 0 or self.ddk.sampling == "natural"
        self.mixture.set_weights(self.mixture.natural if natural else self.shares)
        record = {
            "interval": interval,
            "step": step + 1,  # the first one with these shares
            "sampled": dict(zip(self.mixture.names, self.mixture.weights, strict=True)),
            "shares": dict(zip(self.mixture.names, self.shares, strict=True)),
            "ratio": dict(zip(self.mixture.names, ratios, strict=True)),
        }
        self.history.append(record)
        self.log(kind="mixture", **record)

    def updated(self, ratios: list[float]) -> list[float]:
        """The shares after a measurement, by `sampling`."""
        if self.ddk.sampling in ("equal", "natural"):
            return [1 / len(ratios)] * len(ratios) if self.ddk.sampling == "equal" else self.mixture.natural
        if self.shares is None or self.ddk.sampling == "fresh":
            return initial_shares(ratios)
        return next_shares(self.shares, ratios, self.ddk.alpha)

    def extra_state(self) -> dict[str, Any]:
        return {"mixture": self.mixture.state_dict(), "shares": self.shares, "history": self.history}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.mixture.load_state_dict(state["mixture"])
        self.shares, self.history = state["shares"], list(state["history"])


def _on_all_processes(student: nn.Module, validation: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
    """Perplexities, measured by all processes together; the main one's numbers count, to the last bit."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, reduce

    state = PartialState()
    sums: Callable[[Tensor], Tensor] = lambda values: reduce(values, "sum")  # noqa: E731
    found = perplexities(student, validation, rank=state.process_index, processes=state.num_processes, reduce=sums)
    return broadcast_object_list([found])[0]
