"""Chunks of a text and where they lie among the tokens."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_llm.engine.spans import chunker, response_spans, token_offsets, token_spans, word_runs
from kdcore.errors import InputError

TEXT = "Now is the winter of our discontent, made glorious summer by this sun of York; 3 o'clock!"


def tokenizer():
    """Byte-level pairs learned from one sentence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def test_runs_of_words_end_at_punctuation_numbers_and_lines():
    found = [TEXT[a:b] for a, b in word_runs(TEXT)]
    assert found == ["Now is the winter of our discontent", "made glorious summer by this sun of York", "o'clock"]
    assert word_runs("one\ntwo  three") == [(0, 3), (4, 14)]
    assert word_runs("42; --") == []


@given(st.text(max_size=60))
def test_runs_are_ordered_disjoint_and_without_outer_blanks(text):
    spans = word_runs(text)
    assert all(a < b for a, b in spans)
    assert all(b <= c for (_, b), (c, _) in pairwise(spans))
    assert all(text[a:b].strip() == text[a:b] for a, b in spans)


def test_chunks_of_one_token_and_cut_ones_are_dropped():
    offsets = [(0, 3), (3, 6), (6, 7), (7, 12), (12, 16), (16, 16)]
    assert token_spans([(0, 6), (7, 12), (7, 16), (12, 20)], offsets) == [(0, 1), (3, 4)]
    assert token_spans([(0, 6), (7, 16)], offsets, end=15) == [(0, 1)]
    assert token_spans([], offsets) == []
    assert token_spans([(0, 4)], []) == []


def test_offsets_of_what_the_tokenizer_would_have_chosen_and_of_other_ids():
    t = tokenizer()
    ids = t(TEXT)["input_ids"]
    text, offsets = token_offsets(t, ids)
    assert text == TEXT
    assert "".join(text[a:b] for a, b in offsets) == TEXT
    letters = [t.convert_tokens_to_ids(c) for c in "made"]  # no merge, unlike the tokenizer's own choice
    assert t("made")["input_ids"] != letters
    assert token_offsets(t, [*letters, t.eos_token_id]) == ("made", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4)])


def test_halves_of_a_character_belong_to_one_place():
    t = tokenizer()
    ids = t("aé b")["input_ids"]
    assert len(ids) == 5  # the accented letter is two bytes
    text, offsets = token_offsets(t, [*ids[:3], t.eos_token_id, *ids[3:]])
    assert text == "aé b"
    assert offsets[0] == (0, 1)
    assert offsets[1:3] in ([(1, 1), (1, 2)], [(1, 2), (2, 2)])
    assert offsets[3] == (2, 2)


def test_spans_of_a_response_count_in_the_whole_sequence():
    t = tokenizer()
    prompt, response = t("Now is")["input_ids"], t(" the winter, of our")["input_ids"]
    ids = [*prompt, *response, t.eos_token_id]
    spans = response_spans(t, ids, len(prompt), chunk=word_runs)
    texts = [t.decode(ids[a : b + 1]).strip() for a, b in spans]
    assert texts == ["the winter", "of our"]
    cut = response_spans(t, ids[:-1], len(prompt), chunk=word_runs, cut=True)
    assert cut == spans[:1]


def test_the_chunker_is_named():
    assert chunker("words") is word_runs
    if importlib.util.find_spec("nltk") is None:
        assert chunker("auto") is word_runs
        with pytest.raises(InputError, match="chunker = 'nltk': No module named 'nltk'"):
            chunker("nltk")
    else:
        assert callable(chunker("auto"))
