"""Tokens, masks, windows, packing and padding; trained tokenizers as stock folders."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from kd_llm.collate import Collator, pack, tokenise, tokenise_split
from kd_llm.data import DataConfig, TextData
from kd_llm.metrics import evaluation_batches
from kd_llm.testing import tiny_model
from kd_llm.tokenizers import open_tokenizer, train_tokenizer
from kdcore.config import parse
from kdcore.data import seeded_loader, set_epoch
from kdcore.errors import InputError

WORDS = ["alpha beta gamma delta", "def f(x): return x + 12", "über naïve 日本 emoji 🙂", "one two three four five six"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS * 20, 320)


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer(WORDS * 20, 300, "wordpiece", 32, lowercase=True)


def rows(**columns):
    size = len(next(iter(columns.values())))
    return Dataset.from_dict({**columns, "domain": [index % 2 for index in range(size)]})


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("text", [*WORDS, "\t  mixed \n\n lines  ", "", "never seen: ЖЖ ∑ \x00"])
def test_every_string_survives_the_byte_level_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_trained_tokenizers_are_deterministic_and_open_as_stock_folders(tokenizer, tmp_path):
    again = train_tokenizer(WORDS * 20, 320)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    opened = open_tokenizer(tmp_path)
    assert opened(WORDS).input_ids == tokenizer(WORDS).input_ids
    assert (opened.pad_token, opened.eos_token, opened.bos_token) == ("<pad>", "</s>", "<s>")


def test_digits_are_single_tokens_where_asked(tokenizer):
    assert len(tokenizer("31415", add_special_tokens=False).input_ids) == 5
    joined = train_tokenizer(["2024 2024 2024"] * 50, 300, split_digits=False)
    assert len(joined("2024", add_special_tokens=False).input_ids) == 1


def test_wordpiece_has_the_special_tokens_of_bert(wordpiece):
    made = wordpiece("Alpha beta", "gamma")
    assert wordpiece.convert_ids_to_tokens(made.input_ids)[0] == "[CLS]"
    assert made.token_type_ids[-1] == 1
    assert wordpiece("ALPHA").input_ids == wordpiece("alpha").input_ids


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.pretrained = .*no tokenizer can be opened"):
        open_tokenizer(tmp_path)


# ---------------------------------------------------------------- rows


def test_completions_alone_are_learned_with_their_end(tokenizer):
    made, counts = tokenise_split(rows(prompt=["alpha beta"], completion=[" gamma"]), tokenizer, 64)
    row = made[0]
    start = row["prompt_length"]
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    assert row["labels"][:start] == [-100] * start
    assert row["labels"][start:] == row["input_ids"][start:]
    assert tokenizer.decode(row["input_ids"][start:-1]) == " gamma"
    assert not counts
    whole, _ = tokenise_split(rows(prompt=["alpha"], completion=["b"]), tokenizer, 64, completion_only=False)
    assert whole[0]["labels"] == whole[0]["input_ids"]


def test_long_texts_become_windows_that_hold_every_token(tokenizer):
    text = " ".join(WORDS * 5)
    made, counts = tokenise_split(rows(text=[text, "alpha"]), tokenizer, 16)
    ids = [i for row in made if row["domain"] == 0 for i in row["input_ids"] if i != tokenizer.bos_token_id]
    assert ids == [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert max(map(len, made["input_ids"])) == 16
    assert counts == {"windows": 1}
    assert made["example"] == list(range(len(made)))
    assert all(row["labels"] == row["input_ids"] for row in made)


def test_a_completion_is_never_lost_and_cuts_are_counted(tokenizer):
    long = " ".join(WORDS * 6)
    data = rows(prompt=[long, "alpha", long], completion=["beta", long, long])
    made, counts = tokenise_split(data, tokenizer, 24)
    assert counts == {"prompts": 2, "completions": 2}
    for row in made:
        assert len(row["input_ids"]) <= 24
        assert row["input_ids"][0] == tokenizer.bos_token_id
        assert sum(label != -100 for label in row["labels"]) >= min(24 // 4, len(tokenizer("beta").input_ids))
    assert made[0]["input_ids"][-1] == tokenizer.eos_token_id
    assert made[1]["input_ids"][-1] != tokenizer.eos_token_id
    assert made[0]["prompt_length"] == 24 - len(tokenizer("beta", add_special_tokens=False).input_ids) - 1


def test_what_is_cut_is_said(tokenizer):
    parts = [rows(text=[" ".join(WORDS * 9)] * 2) for _ in range(3)]
    data = TextData(*parts, ["a", "b"], [], parse(DataConfig, {"length": 16, "prompt_tokens": 4}))
    notes = tokenise(data, tokenizer).notes
    assert notes[0] == "data, train: 2 texts longer than 16 tokens are several rows"
    assert len(notes) == 3


def test_weights_of_examples_pass_through(tokenizer):
    data = rows(text=["alpha", "beta gamma"]).add_column("kd_weight", [0.5, 2.0])
    made, _ = tokenise_split(data, tokenizer, 16)
    batch = Collator(tokenizer)([made[0], made[1]])
    assert batch["kd_weight"].tolist() == [0.5, 2.0]
    with pytest.raises(InputError, match=r"data\.packing: examples have weights"):
        pack(made, 16)


def test_encoder_decoders_have_their_completion_as_labels(tokenizer):
    made, _ = tokenise_split(rows(prompt=["alpha"], completion=["beta"]), tokenizer, 16, task="seq2seq")
    batch = Collator(tokenizer, task="seq2seq")([made[0]])
    assert batch["labels"][0, -1] == tokenizer.eos_token_id
    with pytest.raises(InputError, match="needs prompts and completions"):
        tokenise_split(rows(text=["alpha"]), tokenizer, 16, task="seq2seq")


def test_classes_pairs_and_cut_texts_of_encoders(wordpiece):
    data = Dataset.from_dict({"text": ["alpha", WORDS[3] * 9], "text_pair": ["beta", "x"], "label": [1, 0]})
    made, counts = tokenise_split(data, wordpiece, 16, task="classification")
    batch = Collator(wordpiece, task="classification")([made[0], made[1]])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert counts == {"texts": 1}
    with pytest.raises(InputError, match="has no labels"):
        tokenise_split(rows(text=["a"]), wordpiece, 16, task="classification")


def test_chats_need_a_template_and_use_it(tokenizer):
    chat = [[{"role": "user", "content": "alpha"}]]
    data = rows(prompt=chat, completion=["beta"])
    with pytest.raises(InputError, match="no chat template"):
        tokenise_split(data, tokenizer, 32)
    templated = train_tokenizer(WORDS * 20, 320)
    templated.chat_template = "<s>{% for m in messages %}{{ m.content }}?{% endfor %}"
    row = tokenise_split(data, templated, 32)[0][0]
    assert templated.decode(row["input_ids"]) == "<s>alpha?beta</s>"
    assert row["prompt_length"] == len(templated("alpha?").input_ids)


# ---------------------------------------------------------------- batches


def test_padding_is_at_the_right_and_counts_for_nothing(tokenizer):
    made, _ = tokenise_split(rows(text=["alpha", WORDS[3]]), tokenizer, 64)
    batch = Collator(tokenizer, multiple=8)([made[0], made[1]])
    assert batch["input_ids"].shape[1] % 8 == 0
    size = len(made[0]["input_ids"])
    assert batch["attention_mask"][0].tolist() == [1] * size + [0] * (batch["input_ids"].shape[1] - size)
    assert (batch["labels"][0, size:] == -100).all()
    assert (batch["input_ids"][0, size:] == tokenizer.pad_token_id).all()
    assert {name: tuple(batch[name].shape) for name in ("example", "domain", "prompt_length")} == {
        "example": (2,), "domain": (2,), "prompt_length": (2,)
    }  # fmt: skip


def test_masked_tokens_are_drawn_as_in_bert(wordpiece):
    made, _ = tokenise_split(rows(text=[" ".join(WORDS)] * 200), wordpiece, 32, task="masked")
    collate = Collator(wordpiece, task="masked")
    torch.manual_seed(0)
    batch = collate([made[index] for index in range(200)])
    chosen = batch["labels"] != -100
    original = torch.tensor([row["input_ids"] for row in made])
    assert (batch["labels"][chosen] == original[chosen]).all()
    special = torch.isin(original, torch.tensor(wordpiece.all_special_ids))
    assert not (chosen & special).any()
    assert abs(float(chosen[~special].double().mean()) - 0.15) < 0.02
    assert abs(float((batch["input_ids"][chosen] == wordpiece.mask_token_id).double().mean()) - 0.8) < 0.06
    assert (batch["input_ids"][~chosen] == original[~chosen]).all()
    torch.manual_seed(0)
    assert torch.equal(collate([made[index] for index in range(200)])["input_ids"], batch["input_ids"])


def test_a_mask_is_a_function_of_seed_epoch_and_rows(wordpiece):
    made, _ = tokenise_split(rows(text=[" ".join(WORDS), "alpha beta"] * 8), wordpiece, 32, task="masked")
    collate = Collator(wordpiece, task="masked")

    def epoch(number, workers=0):
        loader = seeded_loader(made, 4, seed=3, collate=collate, num_workers=workers)
        set_epoch(loader, number)
        return [batch["input_ids"] for batch in loader]

    first = epoch(0)
    torch.rand(17)  # the global generator is somewhere else
    assert all(map(torch.equal, first, epoch(0)))
    assert all(map(torch.equal, first, epoch(0, workers=1)))
    assert not all(map(torch.equal, first, epoch(1)))
    measured = [next(evaluation_batches(made, collate, 16)) for _ in range(2)]
    assert torch.equal(measured[0]["labels"], measured[1]["labels"])
    assert ((measured[0]["labels"] != -100).sum(1) > 0).all()
    short, long = made[1], made[0]
    alone, beside = collate([short]), collate([short, long])
    width = alone["input_ids"].shape[1]
    assert torch.equal(beside["input_ids"][0, :width], alone["input_ids"][0])


# ---------------------------------------------------------------- packing


@pytest.fixture(scope="module")
def documents(tokenizer):
    data = Dataset.from_dict({"text": WORDS * 3 + ["alpha"] * 5, "domain": [0] * 7 + [1] * 10})
    return tokenise_split(data, tokenizer, 64)[0]


def test_packing_keeps_every_token_and_mixes_no_domains(documents, tokenizer):
    packed = pack(documents, 64)
    assert len(packed) < len(documents)
    assert sum(map(len, packed["input_ids"])) == sum(map(len, documents["input_ids"]))
    assert max(map(len, packed["input_ids"])) <= 64
    for row in packed:
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        assert all(row["labels"][place] == -100 for place in starts)
        assert all(row["input_ids"][place] == tokenizer.bos_token_id for place in starts)
    for domain in (0, 1):
        own = sorted(i for row in packed if row["domain"] == domain for i in row["input_ids"])
        assert own == sorted(i for row in documents if row["domain"] == domain for i in row["input_ids"])


@pytest.mark.parametrize(("attention", "tolerance"), [("eager", 1e-6), ("sdpa", 1e-9)])
def test_packed_and_unpacked_losses_agree(documents, tokenizer, attention, tolerance):
    """The attention of transformers keeps the documents apart by their positions alone; eager's softmax is float32."""
    model = tiny_model("llama").double().eval()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.set_attn_implementation(attention)
    model.double()

    def losses(batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, :-1]
        rows = cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        return rows[batch["labels"][:, 1:] != -100].sort().values

    collate = Collator(tokenizer)
    single = losses(collate([documents[index] for index in range(len(documents))]))
    rows_ = pack(documents, 64)
    batch = collate([rows_[index] for index in range(len(rows_))])
    assert "attention_mask" not in batch
    torch.testing.assert_close(losses(batch), single, rtol=tolerance, atol=tolerance)
    batch.pop("position_ids")
    mixed = losses(batch)
    assert (mixed - single).abs().max() > 1e-3  # without the positions the documents see each other
