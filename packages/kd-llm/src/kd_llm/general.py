"""General text beside a task's: unlabelled sources for the stages of a training that know no task yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kd_llm.collate import tokenise_split
from kd_llm.data import TextData

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class TaskAndGeneral(TextData):
    """The task's data; tokenizer and caches depend on the general text beside it."""

    general: list[TextData] = field(default_factory=list)

    def texts(self, split: str = "train") -> Iterable[str]:
        for source in self.general:
            yield from source.texts(split)
        yield from super().texts(split)

    def digest(self) -> str:
        return "-".join([super().digest(), self.general_digest()])

    def general_digest(self) -> str:
        return "-".join(source.digest() for source in self.general)

    def sources(self) -> dict[str, Any]:
        """The configs of the general text, as a part of an identity."""
        return {"general": [source.config.model_dump(mode="json") for source in self.general]}

    def names(self) -> dict[str, str]:
        """What tells the two texts apart."""
        return {"general": self.general_digest(), "task": TextData.digest(self)}


def windows(text: str, tokenizer: Any, room: int) -> list[str]:
    """A text cut into pieces of `room` tokens."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    starts = [offsets[i][0] for i in range(0, len(offsets), room)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]


def general_rows(data: TaskAndGeneral, tokenizer: Any, length: int, split: str = "train") -> Dataset:
    """All of the general text as rows of at most `length` tokens, with labels of -100."""
    from datasets import Dataset

    room = length - tokenizer.num_special_tokens_to_add()
    pieces = [
        piece for source in data.general for text in source.texts(split) for piece in windows(text, tokenizer, room)
    ]
    rows, _ = tokenise_split(Dataset.from_dict({"text": pieces}), tokenizer, length, task="masked")
    return rows.add_column("labels", [-100] * len(rows))
