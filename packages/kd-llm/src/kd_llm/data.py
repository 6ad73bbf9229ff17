"""Text for language models: embedded corpora, plain files, data sets of the Hugging Face hub.

`load_data` gives three splits as `datasets.Dataset` with the columns `text`, or `prompt` and `completion`, besides
`domain` (index into `domains`), and `label` where the source has classes. `kd_llm.collate` makes tokens of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from kdcore.config import Config
from kdcore.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
EMBEDDED = ("stdlib", "arithmetic")


class ColumnsConfig(Config):
    """Names of the columns of jsonl and hub data; `text`, or `prompt` with `completion`, or `messages`."""

    text: str | None = Field(None, description="plain text, or the first sentence of a pair")
    text_pair: str | None = Field(None, description="second sentence, for classification of pairs")
    prompt: str | None = Field(None, description="what is given; no loss on it")
    completion: str | None = Field(None, description="what is learned")
    messages: str | None = Field(None, description="chat: a list of {role, content}; the last one is the completion")
    label: str | None = Field(None, description="class, an integer or a name")
    domain: str | None = Field(None, description="domain, a name")

    @model_validator(mode="after")
    def _one_form(self) -> ColumnsConfig:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together: give both or neither")
        if sum(name is not None for name in (self.text, self.prompt, self.messages)) > 1:
            raise ValueError("give text, or prompt and completion, or messages; not several of them")
        return self


class DataConfig(Config):
    """Where text comes from, how much of it is kept, and how long its pieces are."""

    name: Literal["stdlib", "trec", "sst2", "shakespeare", "arithmetic", "jsonl", "text", "hub"] = Field(
        "stdlib", description="source; stdlib and arithmetic are embedded, the others read `root`"
    )
    root: str | None = Field(
        None, description="file or folder, environment variables are expanded; hub: a data set's name or a folder"
    )
    subset: str | None = Field(None, description="hub: the configuration of the data set")
    revision: str | None = Field(None, description="hub: commit, tag or branch of the data set")
    splits: dict[Literal["train", "validation", "test"], str] = Field(
        default_factory=dict, description="hub: the source's names of the splits; a missing one is taken from train"
    )
    columns: ColumnsConfig = Field(
        default_factory=lambda: ColumnsConfig.model_validate({}), description="jsonl and hub: names of the columns"
    )
    domains: list[str] | None = Field(None, description="domains that are kept; None: all of the source's")
    size: int | None = Field(None, ge=1, description="training documents kept of each domain; None keeps all")
    eval_size: int | None = Field(None, ge=1, description="the same for validation and for test")
    held_out: float = Field(
        0.1, gt=0, lt=0.5, description="share of documents (stdlib: files) for validation, and for test, where missing"
    )
    length: int = Field(128, ge=8, description="most tokens of an example")
    prompt_tokens: int = Field(
        16,
        ge=1,
        description="plain text: its first tokens are the prompt where text is continued; they are learned too",
    )
    packing: bool = Field(
        False, description="several documents in one row, each with positions and attention of its own"
    )
    completion_only: bool = Field(True, description="no loss on the prompt")

    @model_validator(mode="after")
    def _prompt_fits(self) -> DataConfig:
        if self.prompt_tokens >= self.length:
            raise ValueError(f"prompt_tokens = {self.prompt_tokens}: must be less than length = {self.length}")
        return self

    @property
    def path(self) -> Path:
        """`root` as an existing path. Raises InputError that names data.root."""
        if self.root is None:
            raise InputError(f"data.root: required for data.name = '{self.name}'")
        return existing(expanded(self.root), "data.root", self.root)


@dataclass
class TextData:
    """The splits of a source. `notes` are sentences for the person who starts the run."""

    train: Dataset
    validation: Dataset
    test: Dataset
    domains: list[str]
    label_names: list[str]
    config: DataConfig
    notes: list[str] = field(default_factory=list)

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    @property
    def has_prompts(self) -> bool:
        return "prompt" in self.train.column_names

    def split(self, name: str) -> Dataset:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def texts(self, split: str = "train") -> Iterable[str]:
        """Every document of a split as one string, for the training of a tokenizer."""
        for batch in self.split(split).iter(batch_size=1000):
            if "prompt" in batch:
                for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True):
                    yield plain_prompt(prompt) + completion
            else:
                yield from batch["text"]
                yield from batch.get("text_pair", ())

    def digest(self) -> str:
        """Short hash of the contents: what a trained tokenizer or teacher depends on."""
        found = hashlib.sha256()
        for name in SPLITS:
            for batch in self.split(name).iter(batch_size=1000):
                found.update(repr(sorted(batch.items())).encode())
        return found.hexdigest()[:16]


def plain_prompt(prompt: str | Sequence[dict[str, str]]) -> str:
    """A prompt as text; the messages of a chat one after the other."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def load_data(config: DataConfig, seed: int = 0) -> TextData:
    """Reads and splits a source. Raises InputError that names the file or the field.

    Splits and kept documents depend on the contents and the config alone; `seed` draws the problems of `arithmetic`.
    """
    from datasets import Dataset

    from kd_llm.sources import SOURCES

    source = SOURCES[config.name](config, seed)
    domains = _kept_domains(config, source.domains)
    parts = {}
    for name in SPLITS:
        part = source.parts[name]
        rows = part if isinstance(part, Dataset) else Dataset.from_list(part)
        parts[name] = _limited(rows, source.domains, domains, config.size if name == "train" else config.eval_size)
        if len(parts[name]) == 0:
            raise InputError(f"data.name = '{config.name}': no document is left for the {name} split")
    return TextData(
        parts["train"], parts["validation"], parts["test"], domains, source.label_names, config, source.notes
    )


def _kept_domains(config: DataConfig, found: list[str]) -> list[str]:
    from kdcore.errors import did_you_mean

    for name in config.domains or ():
        if name not in found:
            raise InputError(f"data.domains: '{name}' is not among the domains of the data{did_you_mean(name, found)}")
    return list(config.domains) if config.domains is not None else found


def _limited(rows: Dataset, found: list[str], kept: list[str], limit: int | None) -> Dataset:
    """The rows of the kept domains, at most `limit` of each, domain indices renumbered."""
    if found == kept and limit is None:
        return rows
    number = {found.index(name): index for index, name in enumerate(kept)}
    counts = dict.fromkeys(number, 0)
    places = []
    for place, domain in enumerate(rows["domain"]):
        if domain in number and (limit is None or counts[domain] < limit):
            counts[domain] += 1
            places.append(place)
    chosen = rows.select(places)
    if found != kept:
        renumbered = [number[domain] for domain in chosen["domain"]]
        chosen = chosen.remove_columns("domain").add_column("domain", renumbered)
    return chosen


# ---------------------------------------------------------------- helpers of the sources


def expanded(path: str, field: str = "data.root") -> Path:
    """A path of a config with its environment variables; InputError that names the field when one is not set."""
    text = os.path.expandvars(path)
    if "$" in text:
        raise InputError(f"{field} = '{path}': its environment variable is not set")
    return Path(text).expanduser()


def existing(path: Path, field: str, given: str) -> Path:
    if not path.exists():
        raise InputError(f"{field} = '{given}': no such file or folder ({path})")
    return path


def share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone: SHA-256, the same on every machine.

    >>> round(share("os.py"), 4) == round(share("os.py"), 4) != round(share("re.py"), 4)
    True
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_of(key: str, held_out: float) -> str:
    """train, validation or test for a key; `held_out` is the share of each of the last two."""
    value = share(key)
    return "test" if value < held_out else "validation" if value < 2 * held_out else "train"


def by_hash(rows: Sequence[dict[str, Any]], keys: Sequence[str], held_out: float) -> dict[str, list[dict[str, Any]]]:
    """Rows divided by the hash of their keys, in their order."""
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for row, key in zip(rows, keys, strict=True):
        parts[split_of(key, held_out)].append(row)
    return parts
