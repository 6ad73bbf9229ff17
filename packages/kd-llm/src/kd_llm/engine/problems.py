"""Problems with a checkable answer, as tokens: prompts, answers, and rows with a given response or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd_llm.collate import tokenise_split
from kd_llm.engine.reference import PROMPT, with_reference
from kd_llm.engine.rollouts import Rollout
from kdcore.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


@dataclass
class Problems:
    """N problems. prompts: (P,) int64 each; answers: text; domains: int; shown: prompts with the answer, or None."""

    prompts: list[Tensor]
    answers: list[str]
    domains: list[int]
    shown: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, kept: Sequence[int]) -> Problems:
        """The problems of these numbers, in their order."""
        shown = None if self.shown is None else [self.shown[i] for i in kept]
        return Problems(*([part[i] for i in kept] for part in (self.prompts, self.answers, self.domains)), shown)

    def rows(self, responses: Sequence[Rollout] | None = None) -> list[dict[str, Any]]:
        """Rows for `kd_llm.collate.Collator`: with the given responses as labels, or prompts alone."""
        rows = []
        for index, prompt in enumerate(self.prompts):
            response = [] if responses is None else responses[index].completion.tolist()
            row = {
                "input_ids": prompt.tolist() + response,
                "labels": [IGNORE] * len(prompt) + response,
                "example": index,
                "domain": self.domains[index],
                "prompt_length": len(prompt),
            }
            if self.shown is not None:
                row[PROMPT] = self.shown[index].tolist()
            rows.append(row)
        return rows


def problems_of(
    split: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    limit: int | None = None,
    seed: int = 0,
    template: str | None = None,
) -> Problems:
    """The problems of a split of `load_data`: its columns `prompt` and `completion`, which is the answer.

    limit: so many, drawn by `seed`. template: also make prompts that show the answer, see `with_reference`.
    Raises InputError for plain text.
    """
    if "prompt" not in split.column_names:
        raise InputError("data: plain text; allowed here: problems with prompts and answers (prompt, completion)")
    if limit is not None and limit < len(split):
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
        split = split.select(sorted(order[:limit].tolist()))
    prompts = _prompts(split, tokenizer, length)
    shown = None
    if template is not None:
        pairs = zip(split["prompt"], split["completion"], strict=True)
        changed = [with_reference(prompt, answer, template) for prompt, answer in pairs]
        shown = _prompts(split.remove_columns("prompt").add_column("prompt", changed), tokenizer, length)
    domains = list(split["domain"]) if "domain" in split.column_names else [0] * len(split)
    return Problems(prompts, list(split["completion"]), domains, shown)


def _prompts(split: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Tensor]:
    rows, cut = tokenise_split(split, tokenizer, length)
    if cut["prompts"]:
        raise InputError(f"data.length = {length}: {cut['prompts']} prompts are longer; allowed: whole prompts")
    pairs = zip(rows["input_ids"], rows["prompt_length"], strict=True)
    return [torch.tensor(ids[:prompt_length]) for ids, prompt_length in pairs]
