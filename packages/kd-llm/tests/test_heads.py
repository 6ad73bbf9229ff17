"""The head of a model, measured against the logits that the model itself gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_llm.engine import heads
from kd_llm.engine.heads import common_vocabulary, finish_logits, head_of, replaced_head
from kd_llm.engine.objective import run_body
from kd_llm.engine.rows import predicted, shifts_labels
from kd_llm.testing import VOCABULARY, collate, examples, packed, tiny_model
from kdcore.errors import InputError
from kdcore.gpu import HeadSpec

CAUSAL = ("llama", "gemma2", "qwen2", "granite", "cohere", "gpt2", "gptj")


def true_logits(model, batch, shift):
    """(N, V) of the predicting rows, by the model's ordinary forward pass."""
    from kd_llm.engine.rows import model_inputs

    index = predicted(batch, shift).nonzero()
    return model(**model_inputs(model, batch)).logits[index[:, 0], index[:, 1]], index


@pytest.mark.parametrize("kind", [*CAUSAL, "t5", "bart", "bert"])
def test_rows_and_head_give_the_models_logits(kind):
    model = tiny_model(kind).eval()
    shift, batch = shifts_labels(model), collate(examples(4))
    assert shift == (kind in CAUSAL)
    logits, index = true_logits(model, batch, shift)
    found = run_body(model, batch, index, shift)
    assert found.head.linear
    torch.testing.assert_close(found.logits(), logits, rtol=1e-4, atol=1e-4)
    moved = batch["labels"][:, 1:] if shift else batch["labels"]
    assert torch.equal(found.labels, moved[moved != -100])
    assert model.forward.__func__ is type(model).forward  # nothing is left on the model


@pytest.mark.parametrize(
    ("kind", "fields", "spec"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0}, HeadSpec(1.0, 5.0)),
        ("gemma2", {"final_logit_softcapping": None}, HeadSpec()),
        ("granite", {"logits_scaling": 8.0}, HeadSpec(1 / 8)),
        ("cohere", {"logit_scale": 0.5}, HeadSpec(0.5)),
        ("llama", {"logit_scale": 0.5}, HeadSpec()),  # a field that this model does not read
    ],
)
def test_spec_is_what_the_model_does_and_not_what_a_field_says(kind, fields, spec):
    assert head_of(tiny_model(kind, **fields)).spec == spec


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", False), ("t5", True)])
def test_tied_heads(kind, tied):
    model = tiny_model(kind, tie_word_embeddings=tied)
    assert (head_of(model).weight is model.get_input_embeddings().weight) == tied
    batch, shift = collate(examples(4)), shifts_labels(model)
    model.eval()
    logits, index = true_logits(model, batch, shift)
    torch.testing.assert_close(run_body(model, batch, index, shift).logits(), logits, rtol=1e-4, atol=1e-4)


def lora(model, **fields):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=3, **fields))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.3)
    return wrapped


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 6},
        {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
)
def test_peft_heads(fields):
    model = lora(tiny_model("llama"), **fields).eval()
    batch = collate(examples(4))
    logits, index = true_logits(model, batch, True)
    found = run_body(model, batch, index, True)
    assert found.head.linear
    torch.testing.assert_close(found.logits(), logits, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        logits, index = true_logits(model, batch, True)
        torch.testing.assert_close(run_body(model, batch, index, True).logits(), logits, rtol=1e-4, atol=1e-4)


def test_lora_dropout_on_the_head_reaches_the_adapter_alone():
    model = lora(tiny_model("llama"), target_modules=["lm_head"], lora_dropout=0.9).train()
    head = head_of(model)
    torch.manual_seed(0)
    rows = head.rows(torch.ones(200, 16))
    assert torch.equal(rows[:, :16], torch.ones(200, 16))
    assert rows[:, 16:].std(0).min() > 0


@pytest.mark.filterwarnings("ignore:.*the logits of the predicting rows")
def test_dora_and_unknown_heads_fall_back_to_logits():
    dora = lora(tiny_model("llama"), target_modules=["lm_head"], use_dora=True).eval()

    class Squared(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    odd = tiny_model("qwen2").eval()
    odd.lm_head.__class__ = Squared
    for model in (dora, odd):
        batch = collate(examples(4))
        logits, index = true_logits(model, batch, True)
        found = run_body(model, batch, index, True)
        assert not found.head.linear
        torch.testing.assert_close(found.logits(), logits, rtol=1e-4, atol=1e-4)


def test_one_warning_for_a_head_that_is_not_linear(recwarn):
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, VOCABULARY))
    for _ in range(3):
        head_of(model)
    assert len([w for w in recwarn if "is no linear layer" in str(w.message)]) == 1


def test_the_measurement_leaves_no_trace():
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    before = torch.get_rng_state()
    head_of(model)
    assert model.training
    assert not model.transformer.h[0].training
    assert model.transformer.h[1].training
    assert torch.equal(before, torch.get_rng_state())


def test_the_head_sees_nothing_while_it_is_replaced():
    model = tiny_model("llama")
    head_of(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with replaced_head(model) as recorder:
        output = model(**{k: v for k, v in collate(examples(4)).items() if k != "example" and k != "labels"})
    assert recorder.hidden.shape[-1] == 16
    assert output.logits.numel() == 1
    assert seen == [(1, 1, 1)]
    with pytest.raises(InputError, match="called its head 0 times"), replaced_head(model):
        pass


def test_a_model_without_a_head_is_refused():
    from transformers import LlamaConfig, LlamaModel

    body = LlamaModel(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=1))  # fmt: skip
    with pytest.raises(InputError, match="no output embeddings"):
        head_of(body)


def test_softcap_and_scale_formula():
    y = torch.tensor([1.0, -30.0])
    torch.testing.assert_close(finish_logits(y, HeadSpec(0.5, 10.0)), 10 * torch.tanh(torch.tensor([0.05, -1.5])))


class Vocabulary:
    def __init__(self, tokens):
        self.tokens = tokens

    def get_vocab(self):
        return dict(self.tokens)


def test_common_vocabulary():
    same = {"a": 0, "b": 1, "c": 2}
    assert common_vocabulary(8, 8) == 8
    assert common_vocabulary(8, 4, (Vocabulary(same), Vocabulary(same))) == 4
    assert common_vocabulary(3, 8, (Vocabulary(same), Vocabulary({**same, "extra": 5}))) == 3
    with pytest.raises(InputError, match="8 outputs, the teacher 4; give both tokenizers"):
        common_vocabulary(8, 4)
    with pytest.raises(InputError, match=r"first 1: 'b' for the student, 'x' .*sequence-level"):
        common_vocabulary(8, 8, (Vocabulary(same), Vocabulary({"a": 0, "x": 1, "c": 2})))


def test_packed_rows_do_not_cross_sequences():
    rows = examples(3, prompt=0)
    batch = packed(rows)
    mask = predicted(batch, True)
    lengths = [len(row["input_ids"]) for row in rows]
    assert int(mask.sum()) == sum(lengths) - 3
    ends = torch.tensor(lengths).cumsum(0) - 1
    assert not mask[0, ends].any()
    assert heads.select(torch.arange(mask.numel()).view(1, -1, 1), mask.nonzero()).numel() == int(mask.sum())
