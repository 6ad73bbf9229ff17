"""Linguistic chunks of a text as token spans.

A chunker is a function from a text to character spans [(start, stop), ...]. Two come with the package:

    words   maximal runs of alphabetic words between punctuation, numbers and line ends; needs nothing
    nltk    noun, verb and prepositional phrases over part-of-speech tags (NLTK's tokenizer, tagger and chunk grammar)

Any other function of the same form can be put in their place. `token_spans` maps characters to tokens through the
tokenizer's offsets and drops what truncation has cut, and chunks of one token, which have no neighbours inside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from kd_llm.engine.rows import IGNORE
from kdcore.errors import InputError

CharSpan = tuple[int, int]
"""Start and stop (exclusive) of a chunk in the text, in characters."""

TokenSpan = tuple[int, int]
"""First and last (inclusive) token of a chunk."""

Chunker = Callable[[str], list[CharSpan]]
ChunkerName = Literal["auto", "words", "nltk"]

WORD = r"[^\W\d_]+(?:['’][^\W\d_]+)*"
RUN = re.compile(rf"{WORD}(?:[ \t]+{WORD})*")
GRAMMAR = r"""
  NP: {<DT|PRP\$|CD>?<JJ.*>*<NN.*>+}
  PP: {<IN|TO><NP>}
  VP: {<MD>?<RB.*>*<VB.*>+<RB.*>*}
"""


def word_runs(text: str) -> list[CharSpan]:
    """Maximal runs of alphabetic words (apostrophes inside count) that only blanks separate.

    >>> text = "To be, or not to be: that's 1 question."
    >>> [text[a:b] for a, b in word_runs(text)]
    ['To be', 'or not to be', "that's", 'question']
    """
    return [match.span() for match in RUN.finditer(text)]


def chunker(name: ChunkerName = "auto") -> Chunker:
    """The chunker of that name. "auto" is NLTK's where the package and its data are there, else `word_runs`.

    Raises InputError where "nltk" is asked for and the package or its data are missing.
    """
    if name == "words":
        return word_runs
    try:
        return _nltk_chunker()
    except (ImportError, LookupError) as error:
        if name == "auto":
            return word_runs
        what = str(error).strip().splitlines()[0] if isinstance(error, ImportError) else "its data are not installed"
        raise InputError(
            f"chunker = 'nltk': {what}; install nltk and its data (punkt_tab, averaged_perceptron_tagger_eng), "
            "or give 'words'"
        ) from None


def _nltk_chunker() -> Chunker:
    import nltk

    parser = nltk.RegexpParser(GRAMMAR)

    def phrases(text: str) -> list[CharSpan]:
        spans: list[CharSpan] = []
        for start, stop in nltk.tokenize.PunktTokenizer().span_tokenize(text):
            places = list(nltk.tokenize.NLTKWordTokenizer().span_tokenize(text[start:stop]))
            words = [text[start + a : start + b] for a, b in places]
            position = 0
            for node in parser.parse(nltk.pos_tag(words)):
                size = len(node.leaves()) if isinstance(node, nltk.Tree) else 1
                if isinstance(node, nltk.Tree):
                    spans.append((start + places[position][0], start + places[position + size - 1][1]))
                position += size
        return spans

    phrases("The data are there.")  # LookupError where the tagger's or the tokenizer's data are missing
    return phrases


# ---------------------------------------------------------------- characters to tokens


def token_spans(chunks: Sequence[CharSpan], offsets: Sequence[CharSpan], end: int | None = None) -> list[TokenSpan]:
    """First and last token of each chunk; chunks of one token, and those that reach beyond `end`, are dropped.

    offsets: (start, stop) of every token in the same text; tokens of no characters (special ones) belong to no chunk.
    end: where the tokens' text stops, the last offset by default: a chunk that goes further was cut by truncation.

    >>> token_spans([(0, 9), (11, 16)], [(0, 3), (3, 9), (9, 11), (11, 16)])
    [(0, 1)]
    """
    if end is None:
        end = max((stop for _, stop in offsets), default=0)
    spans = []
    for start, stop in chunks:
        # A token belongs to the chunk when it shares a character with it: byte-level tokens start with the blank.
        inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and a < b]
        if stop <= end and len(inside) > 1:
            spans.append((inside[0], inside[-1]))
    return spans


def token_offsets(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[CharSpan]]:
    """The text of `ids` (special tokens left out) and where each token lies in it.

    Encoding the decoded text again usually gives the same ids, with exact offsets; sampled ids need not be what the
    tokenizer would have chosen, so the rest is decoded prefix by prefix.
    """
    ids = list(ids)
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if getattr(tokenizer, "is_fast", False):
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(again["input_ids"]) == ids:
            return text, [(int(a), int(b)) for a, b in again["offset_mapping"]]
    ends = [0]
    for count in range(1, len(ids) + 1):
        part = tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends.append(max(ends[-1], _agreeing(part, text)))
    return text, list(pairwise(ends))


def _agreeing(part: str, text: str) -> int:
    """Length of the common prefix: the end of `part` may be half a character, which decodes to a replacement sign."""
    length = min(len(part), len(text))
    while length and part[:length] != text[:length]:
        length -= 1
    return length


def response_spans(
    tokenizer: Any, ids: Sequence[int], start: int, stop: int | None = None, *, chunk: Chunker, cut: bool = False
) -> list[TokenSpan]:
    """Token spans of the chunks of a response ids[start:stop], counted in the whole sequence.

    cut: the response was cut off at `stop` (by a length limit), so that a chunk which touches its end is dropped.
    """
    text, offsets = token_offsets(tokenizer, ids[start:stop])
    end = len(text) - 1 if cut else len(text)
    return [(first + start, last + start) for first, last in token_spans(chunk(text), offsets, end)]


def data_responses(batch: Mapping[str, Tensor], eos: int) -> list[tuple[list[int], int, int, bool]]:
    """Of each row its ids, the first and past-the-last learned position, and whether the text was cut there."""
    found = []
    for ids, labels in zip(batch["input_ids"].tolist(), (batch["labels"] != IGNORE).tolist(), strict=True):
        places = [i for i, learned in enumerate(labels) if learned] or [0]
        start, stop = places[0], places[-1] + 1
        found.append((ids[:stop], start, stop, ids[stop - 1] != eos))
    return found


# ---------------------------------------------------------------- neighbours inside a chunk


def neighbours(spans: Sequence[Sequence[TokenSpan]]) -> Tensor:
    """Pairs (sample, position), position and position + 1 inside one chunk: (P, 2) int64.

    >>> neighbours([[(3, 5)], [(1, 1)], [(0, 1)]])
    tensor([[0, 3],
            [0, 4],
            [2, 0]])
    """
    pairs = [(row, i) for row, some in enumerate(spans) for first, last in some for i in range(first, last)]
    return torch.tensor(sorted(set(pairs)), dtype=torch.int64).reshape(-1, 2)


def rows_of(pairs: Tensor, index: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows `index` (N, 2) that predict the tokens at (sample, position) and one further, (P,) each."""
    width = int(max(index[:, 1].max() if len(index) else 0, pairs[:, 1].max() if len(pairs) else 0)) + 3
    known = index[:, 0] * width + index[:, 1] + shift
    found = []
    for step in (0, 1):
        wanted = pairs[:, 0] * width + pairs[:, 1] + step
        place = torch.searchsorted(known, wanted).clamp(max=max(0, len(known) - 1))
        found.append((place, known[place] == wanted if len(known) else torch.zeros_like(wanted, dtype=torch.bool)))
    (first, has_first), (second, has_second) = found
    both = has_first & has_second
    return first[both], second[both]
