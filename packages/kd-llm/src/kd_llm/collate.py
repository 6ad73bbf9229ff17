"""From text to batches: tokens, masks of what is learned, packing, padding.

`tokenise` turns the documents of `TextData` into rows with these columns (lists of int unless said otherwise):

    input_ids       tokens, <bos> first where the tokenizer starts a text with it, <eos> last where the text ends
    labels          input_ids where a token is learned, else -100; unshifted, as in transformers. A class (int) for
                    classification, the target's tokens for seq2seq
    example         int, the row's number in its split: the key of a teacher cache
    domain          int
    prompt_length   int, tokens of `input_ids` that are given where the row is continued
    position_ids    packed rows alone: they start again at 0 in every document
    token_type_ids  where the tokenizer gives them (encoders)

Packing and attention: a packed batch has `position_ids` and no `attention_mask`. From these transformers' masks of
`eager`, `sdpa` and `flex_attention` separate the documents, and `flash_attention_2` runs its kernel of variable
lengths; a model whose `attn_implementation` is another one, or that makes its masks without transformers' shared
functions (state-space models, absolute positions counted inside the model), must not be given packed rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kd_llm import __version__
from kd_llm.data import SPLITS, TextData, plain_prompt
from kdcore.errors import InputError
from kdcore.stages import digest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Task = Literal["causal", "masked", "seq2seq", "classification"]
IGNORED = -100
Ids = list[int]


@dataclass
class Tokenised:
    """The three splits as rows of tokens; `notes` say what was cut."""

    train: Dataset
    validation: Dataset
    test: Dataset
    notes: list[str] = field(default_factory=list)

    def split(self, name: str) -> Dataset:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


def tokenise(
    data: TextData,
    tokenizer: PreTrainedTokenizerBase,
    length: int | None = None,
    completion_only: bool | None = None,
    *,
    task: Task = "causal",
    packing: bool | None = None,
) -> Tokenised:
    """Tokens of every split; `length`, `completion_only` and `packing` of None are those of `data.config`.

    Training rows alone are packed: a row of validation or test is always one text.
    """
    config = data.config
    length = length or config.length
    packed = (config.packing if packing is None else packing) and task == "causal"
    masked = config.completion_only if completion_only is None else completion_only
    if config.packing and task != "causal" and packing is None:
        raise InputError(f"data.packing: only for decoders; the task is {task}")
    splits, notes = {}, []
    for name in SPLITS:
        rows, counts = tokenise_split(
            data.split(name), tokenizer, length, task=task, completion_only=masked, prompt_tokens=config.prompt_tokens
        )
        splits[name] = pack(rows, length) if packed and name == "train" else rows
        notes += [f"data, {name}: {said}" for said in _said(counts, length)]
    return Tokenised(**splits, notes=notes)


def tokenise_split(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    task: Task = "causal",
    completion_only: bool = True,
    prompt_tokens: int = 16,
) -> tuple[Dataset, Counter[str]]:
    """The rows of one split as tokens, and how many were cut: `windows`, `completions`, `prompts`, `texts`."""
    if task == "classification" and "label" not in rows.column_names:
        raise InputError("data: the task is classification, and the data has no labels; give data.columns.label")
    maker = _Maker(tokenizer, length, completion_only, prompt_tokens)
    make = {"causal": maker.causal, "seq2seq": maker.seq2seq, "masked": maker.encoded, "classification": maker.classed}
    kept = [name for name in ("domain", "kd_weight") if name in rows.column_names]

    def batch(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        result: dict[str, list[Any]] = {}
        columns = {**columns, **maker.encoded_columns(columns)}
        for index in range(len(next(iter(columns.values())))):
            row = {name: values[index] for name, values in columns.items()}
            for piece in make[task](row):
                for name, value in {**piece, **{name: row[name] for name in kept}}.items():
                    result.setdefault(name, []).append(value)
        return result

    with quiet(len(rows) < 20_000):
        # Without a fingerprint of its own, `datasets` would pickle the tokenizer to make one.
        settings = [length, task, completion_only, prompt_tokens, kept, tokenizer_digest(tokenizer), __version__]
        fingerprint = digest([rows._fingerprint, settings])
        made = rows.map(batch, batched=True, remove_columns=rows.column_names, new_fingerprint=fingerprint)
    counts = Counter(name for cuts in made["cut"] for name in cuts)
    made = made.remove_columns("cut").add_column("example", list(range(len(made))))
    return (made.with_transform(_with_draws) if task == "masked" else made), counts


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of what decides the tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest([content, str(tokenizer.special_tokens_map), tokenizer.chat_template])


def _with_draws(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Rows as they are read get the seed of their mask from torch's generator, which a loader seeds by the epoch."""
    if "example" not in columns:  # a column is read, not rows
        return columns
    return {**columns, "mask_seed": torch.randint(2**62, (len(columns["example"]),)).tolist()}


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """No progress bars of `datasets` inside, where wanted."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    change = wanted and not are_progress_bars_disabled()
    if change:
        disable_progress_bars()
    try:
        yield
    finally:
        if change:
            enable_progress_bars()


def _said(counts: Counter[str], length: int) -> list[str]:
    sentences = {
        "windows": "{} texts longer than {} tokens are several rows",
        "completions": "{} completions are cut at the end to fit {} tokens, and have no end token",
        "prompts": "{} prompts are cut at their beginning, so that {} tokens hold some of the completion",
        "texts": "{} texts are cut at the end to fit {} tokens",
    }
    return [sentence.format(counts[key], length) for key, sentence in sentences.items() if counts[key]]


class _Maker:
    """Rows of tokens from a row of text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        completion_only: bool,
        prompt_tokens: int,
    ):
        self.tokenizer, self.length = tokenizer, length
        self.completion_only, self.prompt_tokens = completion_only, prompt_tokens
        self.end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        started = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        self.start = [bos] if bos is not None and started[:1] == [bos] else []

    def ids(self, text: str) -> Ids:
        return self.all_ids([text])[0]

    def all_ids(self, texts: Sequence[str]) -> list[Ids]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def encoded_columns(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Ids]]:
        """`text_ids`, `prompt_ids`, `completion_ids` of a batch: many texts in one call are several times as fast."""
        made = {}
        for name in ("text", "prompt", "completion"):
            if name in columns:
                made[f"{name}_ids"] = self.all_ids([self.prompt_text(value) for value in columns[name]])
        return made

    def prompt_text(self, prompt: str | Sequence[dict[str, str]]) -> str:
        """A text as it is; a chat through the tokenizer's template, up to the assistant's turn."""
        if isinstance(prompt, str):
            return prompt
        if not self.tokenizer.chat_template:
            raise InputError("data.columns.messages: the tokenizer has no chat template")
        return self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)

    def causal(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        if "prompt" in row:
            start = self.start if isinstance(row["prompt"], str) else []  # a template has its own first token
            return [self._pair(start + row["prompt_ids"], row["completion_ids"] + self.end)]
        ids = row["text_ids"] + self.end
        room = self.length - len(self.start)
        pieces = [self.start + ids[low : low + room] for low in range(0, len(ids), room)]
        # A last piece without a token to predict would be a row without a loss.
        pieces = [piece for piece in pieces if len(piece) > 1] or pieces[:1]
        return [
            {
                "input_ids": piece,
                "labels": list(piece),
                "prompt_length": min(self.prompt_tokens, len(piece) - 1),
                "cut": ["windows"] if number == 0 and len(pieces) > 1 else [],
            }
            for number, piece in enumerate(pieces)
        ]

    def _pair(self, prompt: Ids, completion: Ids) -> dict[str, Any]:
        """Prompt and completion in `length` tokens. The completion keeps a quarter of them at least, if it is as long:
        its end is cut first, then the prompt's beginning."""
        cut = []
        least = min(len(completion), max(1, self.length // 4))
        if len(prompt) > self.length - least:
            cut.append("prompts")
            prompt = prompt[: len(self.start)] + prompt[len(prompt) - (self.length - least - len(self.start)) :]
        if len(prompt) + len(completion) > self.length:
            cut.append("completions")
            completion = completion[: self.length - len(prompt)]
        ids = prompt + completion
        labels = [IGNORED] * len(prompt) + completion if self.completion_only else list(ids)
        return {"input_ids": ids, "labels": labels, "prompt_length": len(prompt), "cut": cut}

    def seq2seq(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        if "prompt" not in row:
            raise InputError("data: an encoder-decoder needs prompts and completions, the data is plain text")
        prompt = row["prompt_ids"] + self.end
        completion = row["completion_ids"] + self.end
        lengths = {"prompts": len(prompt), "completions": len(completion)}
        cut = [name for name, length in lengths.items() if length > self.length]
        prompt, labels = prompt[-self.length :], completion[: self.length]
        return [{"input_ids": prompt, "labels": labels, "prompt_length": len(prompt), "cut": cut}]

    def encoded(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """An encoder's text with its special tokens; labels are drawn by the collator (masked) or the class."""
        text = row["text"] if "text" in row else plain_prompt(row["prompt"]) + row["completion"]
        pair = row.get("text_pair")
        made = self.tokenizer(text, pair, truncation=True, max_length=self.length)
        whole = len(self.ids(text)) + (len(self.ids(pair)) if pair else 0)
        whole += self.tokenizer.num_special_tokens_to_add(pair is not None)
        kept = {name: made[name] for name in ("input_ids", "token_type_ids") if name in made}
        return [{**kept, "prompt_length": 0, "cut": ["texts"] if whole > self.length else []}]

    def classed(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{**piece, "labels": row["label"]} for piece in self.encoded(row)]


# ---------------------------------------------------------------- packing


def pack(rows: Dataset, length: int) -> Dataset:
    """Rows of at most `length` tokens that hold several documents of one domain, by first fit in their order.

    `position_ids` start again at 0 in each document, and its first label is -100: nothing is predicted from the
    document before. `example` counts the packed rows.
    """
    from datasets import Dataset

    if "kd_weight" in rows.column_names:
        raise InputError("data.packing: examples have weights of their own, which a row of several cannot have")
    bins: list[dict[str, Any]] = []
    open_bins: dict[int, list[int]] = {}
    for row in rows:
        domain, size = row.get("domain", 0), len(row["input_ids"])
        places = open_bins.setdefault(domain, [])
        place = next((p for p in places if len(bins[p]["input_ids"]) + size <= length), None)
        if place is None:
            place = len(bins)
            bins.append({"input_ids": [], "labels": [], "position_ids": [], "domain": domain})
            places.append(place)
            del places[:-64]  # the oldest of many half-full rows is closed: packing stays linear in the documents
        target = bins[place]
        target.setdefault("prompt_length", min(row["prompt_length"], size))
        target["input_ids"] += row["input_ids"]
        target["labels"] += [IGNORED, *row["labels"][1:]]
        target["position_ids"] += range(size)
    return Dataset.from_list([{**row, "example": index} for index, row in enumerate(bins)])


# ---------------------------------------------------------------- batches


class Collator:
    """Rows of `tokenise` -> a batch of int64 tensors, padded at the right.

    input_ids, attention_mask, labels (B, L); example, domain, prompt_length (B,); kd_weight (B,) float32 where the
    rows have it; packed rows have position_ids (B, L) instead of attention_mask. For classification labels is (B,).
    For masked language models 15 % of the tokens are drawn anew in every batch: 80 % of them become [MASK], 10 % a
    random token, 10 % stay (BERT, arXiv 1810.04805, section 3.1). A row's mask is a function of its `mask_seed`, which
    reading the row draws from torch's generator: seeded by the epoch in a stage, whoever shares the batch.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        packing: bool = False,
        *,
        task: Task = "causal",
        multiple: int = 1,
        masked_share: float = 0.15,
    ):
        if tokenizer.pad_token_id is None:
            raise InputError("tokenizer: it has no padding token")
        if task == "masked" and tokenizer.mask_token_id is None:
            raise InputError("tokenizer: it has no mask token, and the task is masked")
        self.tokenizer, self.pad = tokenizer, tokenizer.pad_token_id
        self.packing, self.task, self.multiple, self.masked_share = packing, task, multiple, masked_share

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        packed = "position_ids" in rows[0]
        batch = {"input_ids": self._padded([row["input_ids"] for row in rows], self.pad)}
        if packed:
            # The padding counts from 0 too: it is a document of its own, which nothing else attends to.
            width = batch["input_ids"].shape[1]
            positions = [[*row["position_ids"], *range(width - len(row["position_ids"]))] for row in rows]
            batch["position_ids"] = torch.tensor(positions)
        else:
            batch["attention_mask"] = self._padded([[1] * len(row["input_ids"]) for row in rows], 0)
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._padded([row["token_type_ids"] for row in rows], 0)
        if self.task == "masked":
            seeds = [row["mask_seed"] if "mask_seed" in row else int(torch.randint(2**62, ())) for row in rows]
            masked = [self._mask(ids, seed) for ids, seed in zip(batch["input_ids"], seeds, strict=True)]
            batch["input_ids"], batch["labels"] = (torch.stack(parts) for parts in zip(*masked, strict=True))
        elif self.task == "classification":
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        else:
            batch["labels"] = self._padded([row["labels"] for row in rows], IGNORED)
        for name in ("example", "domain", "prompt_length"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        if "kd_weight" in rows[0]:
            batch["kd_weight"] = torch.tensor([row["kd_weight"] for row in rows], dtype=torch.float32)
        return batch

    def _padded(self, lists: Sequence[Ids], value: int) -> Tensor:
        width = max(map(len, lists))
        width = -(-width // self.multiple) * self.multiple
        return torch.tensor([[*ids, *[value] * (width - len(ids))] for ids in lists])

    def _mask(self, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Ids and labels (L,) of one row; the draws of a position do not depend on the padding behind it."""
        draw = torch.rand(len(ids), 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        chosen = (draw[:, 0] < self.masked_share) & ~special
        if not chosen.any() and not special.all():  # a very short text: one token, so that it has a loss
            chosen[draw[:, 3].masked_fill(special, 2.0).argmin()] = True
        labels = torch.where(chosen, ids, IGNORED)
        replaced = torch.where(chosen & (draw[:, 1] < 0.8), self.tokenizer.mask_token_id, ids)
        other = (draw[:, 2] * len(self.tokenizer)).long()
        return torch.where(chosen & (draw[:, 1] >= 0.9), other, replaced), labels
