"""Models from configs and folders, and students cut out of a teacher."""

from __future__ import annotations

import pytest
import torch

from kd_llm.cuts import cut_student, kept_layers
from kd_llm.models import CutConfig, ModelConfig, StudentConfig, load_model, open_model
from kd_llm.tokenizers import train_tokenizer
from kdcore.config import parse
from kdcore.errors import InputError

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
GPT = {
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
DISTIL = {"model_type": "distilbert", "vocab_size": 40, "dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4}
T5 = {"model_type": "t5", "vocab_size": 40, "d_model": 32, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 3,
      "num_heads": 4, "d_kv": 16, "decoder_start_token_id": 0}  # fmt: skip
FAMILIES = {
    "llama": ("causal", {"model_type": "llama", "num_key_value_heads": 2, **SMALL}),
    "llama tied": ("causal", {"model_type": "llama", "tie_word_embeddings": True, **SMALL}),
    "qwen2": ("causal", {"model_type": "qwen2", "num_key_value_heads": 2, **SMALL}),
    "qwen3": ("causal", {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, **SMALL}),
    "gemma2": ("causal", {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 16, **SMALL}),
    "gpt2": ("causal", GPT),
    "bert": ("masked", {"model_type": "bert", **SMALL}),
    "bert classes": ("classification", {"model_type": "bert", **SMALL}),
    "roberta": ("masked", {"model_type": "roberta", **SMALL}),
    "roberta classes": ("classification", {"model_type": "roberta", **SMALL}),
    "distilbert": ("masked", DISTIL),
    "t5": ("seq2seq", T5),
}


def teacher(name: str):
    task, fields = FAMILIES[name]
    torch.manual_seed(0)
    model = open_model(parse(ModelConfig, {"config": fields}), task, num_labels=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def logits(model):
    ids = torch.arange(3, 13).view(2, 5)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_with_every_layer_is_the_teacher(name):
    model = teacher(name)
    student = cut_student(model, CutConfig())
    assert torch.equal(logits(student), logits(model))
    owned = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in owned for parameter in student.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_widths_are_cut_to_the_first_channels(name, tmp_path):
    model = teacher(name)
    cut = CutConfig(layers=2, hidden_size=16, intermediate_size=20, heads=2)
    student = cut_student(model, cut)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 16)
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(student.get_input_embeddings().weight, embeddings[:, :16])
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path, FAMILIES[name][0], 3)), logits(student))


def test_left_out_layers_are_those_that_were_not_kept():
    model = teacher("llama")
    student = cut_student(model, CutConfig(layers=[0, 3]))
    for ours, theirs in ((0, 0), (1, 3)):
        left, right = student.model.layers[ours].state_dict(), model.model.layers[theirs].state_dict()
        assert all(torch.equal(left[key], right[key]) for key in right)
    # Without layers 1 and 2 the teacher itself computes the same.
    model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[3]])
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad():
        left_out = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits(student), left_out)


def test_kept_queries_stay_with_their_keys():
    model = teacher("llama")  # 4 queries, 2 of keys and values, heads of width 8
    student = cut_student(model, CutConfig(heads=2, kv_heads=2))
    ours, theirs = student.model.layers[0].self_attn, model.model.layers[0].self_attn
    assert torch.equal(ours.q_proj.weight, torch.cat([theirs.q_proj.weight[:8], theirs.q_proj.weight[16:24]]))
    assert torch.equal(ours.k_proj.weight, theirs.k_proj.weight)


def test_dead_channels_can_be_cut_without_a_trace():
    """With the removed feed-forward units at zero the narrower student computes what the teacher does."""
    model = teacher("llama").double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 20:] = 0
    student = cut_student(model, CutConfig(intermediate_size=20))
    torch.testing.assert_close(logits(student), logits(model))


def test_layer_types_are_cut_too():
    student = cut_student(teacher("gemma2"), CutConfig(layers=[1, 2]))
    assert student.config.layer_types == teacher("gemma2").config.layer_types[1:3]
    assert student.dtype == torch.float32


def test_decoder_layers_of_encoder_decoders():
    student = cut_student(teacher("t5"), CutConfig(layers=3, decoder_layers=1))
    assert (len(student.encoder.block), len(student.decoder.block)) == (3, 1)


@pytest.mark.parametrize(
    ("wanted", "depth", "kept"), [(1, 6, [0]), (2, 6, [0, 5]), (3, 12, [0, 6, 11]), (6, 6, [*range(6)])]
)
def test_layers_are_spread_evenly(wanted, depth, kept):
    assert kept_layers(wanted, depth, "layers") == kept


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [
        ("llama", {"layers": 5}, r"student\.cut\.layers = 5: allowed: 1 to 4"),
        ("llama", {"layers": [2, 1]}, "indices in rising order, 0 to 3"),
        ("llama", {"layers": [0, 4]}, "indices in rising order, 0 to 3"),
        ("llama", {"hidden_size": 64}, "the teacher has 32; a cut cannot widen"),
        ("llama", {"heads": 3}, "3 heads cannot share 2 of keys and values"),
        ("llama", {"heads": 4, "kv_heads": 1}, "at most the teacher's 2 queries for each"),
        ("llama", {"decoder_layers": 1}, "only for encoder-decoders"),
        ("llama tied", {"kv_heads": 2}, "one for each query; leave it out"),
        ("gpt2", {"heads": 2}, "hidden_size = heads x 8"),
        ("bert", {"hidden_size": 16}, "hidden_size = heads x 8"),
    ],
)
def test_impossible_cuts_are_named(name, cut, message):
    with pytest.raises(InputError, match=message):
        cut_student(teacher(name), parse(CutConfig, cut))


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "llama", "num_hidden_layer": 2}, "num_hidden_layer: not a field of LlamaConfig; did you mean"),
        ({"model_type": "llama", "hidden_size": "x"}, r"student\.config = .*transformers refuses it"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}, "transformers refuses it"),
    ],
)
def test_bad_configs_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        open_model(parse(ModelConfig, {"config": fields}), field="student")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no source: give pretrained, config or cut"),
        ({"pretrained": "x", "cut": {}}, "has several sources"),
        ({"config": {"hidden_size": 3}}, "config needs model_type"),
    ],
)
def test_a_student_has_one_source(config, message):
    with pytest.raises(InputError, match=message):
        parse(StudentConfig, config)


def test_special_tokens_and_vocabulary_are_the_tokenizers():
    tokenizer = train_tokenizer(["some words of text"] * 9, 300)
    model = open_model(parse(ModelConfig, {"config": {**SMALL, "model_type": "llama", "vocab_size": len(tokenizer)}}))
    assert model.config.vocab_size == len(tokenizer)
    made = open_model(
        parse(ModelConfig, {"config": {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"model_type": "llama"}}),
        tokenizer=tokenizer,
    )
    assert made.config.vocab_size == len(tokenizer)
    assert (made.config.pad_token_id, made.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    with pytest.raises(InputError, match=r"student: has 40 embeddings, the tokenizer \d+ tokens"):
        open_model(parse(ModelConfig, {"config": FAMILIES["llama"][1]}), tokenizer=tokenizer, field="student")


def test_weights_are_safetensors_alone(tmp_path):
    model = teacher("llama")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))
    assert load_model(tmp_path, dtype="bf16").dtype == torch.bfloat16
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"teacher\.pretrained = .*no model for the task causal"):
        load_model(tmp_path, field="teacher.pretrained")


def test_adapters_alone_train():
    config = {"config": FAMILIES["llama"][1], "adapters": {"rank": 2}}
    model = open_model(parse(ModelConfig, config))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    with pytest.raises(InputError, match=r"student\.adapters\.targets = \['q_prj'\]: peft finds nothing"):
        open_model(parse(ModelConfig, {**config, "adapters": {"targets": ["q_prj"]}}), field="student")
