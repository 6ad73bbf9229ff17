"""Tiny language models with random weights and toy batches, for tests and for trying a training offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 61
TINY_RUN = {
    "tokenizer.vocab_size": 320,
    "data.size": 20,
    "data.eval_size": 4,
    "data.length": 32,
    "teacher.config.hidden_size": 32,
    "teacher.config.intermediate_size": 48,
    "teacher.config.num_hidden_layers": 2,
    "teacher.train.steps": 4,
    "train.steps": 4,
    "evaluation.max_new_tokens": 6,
}
"""Overrides that make a run of a `small` config one of seconds."""
TINY_STUDENT = {
    "student.config.hidden_size": 16,
    "student.config.intermediate_size": 24,
    "student.config.num_hidden_layers": 1,
}


def tiny_model(kind: str = "llama", *, width: int = 16, seed: int = 0, **fields: Any) -> Any:
    """A model of two layers: llama, gemma2, qwen2, gpt2 (tied, dropout), granite, cohere, gptj (bias), t5, bart, bert.

    `fields` go to its config. Weights are large enough that the distributions are far from uniform.
    """
    import transformers as t

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "intermediate_size": 2 * width}
    wide = {"vocab_size": VOCABULARY, "hidden_size": width, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    gpt = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
    marks = {"bos_token_id": 1, "eos_token_id": 2}
    classes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM, {**wide, **heads}),
        "gemma2": (t.Gemma2Config, t.Gemma2ForCausalLM, {**wide, **heads, "head_dim": width // 2}),
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM, {**wide, **heads}),
        "granite": (t.GraniteConfig, t.GraniteForCausalLM, {**wide, **heads, "logits_scaling": 4.0}),
        "cohere": (t.CohereConfig, t.CohereForCausalLM, {**wide, **heads, "logit_scale": 0.25}),
        "gpt2": (t.GPT2Config, t.GPT2LMHeadModel, {**gpt, **marks}),
        "gptj": (t.GPTJConfig, t.GPTJForCausalLM, {**gpt, **marks, "rotary_dim": 4}),
        "t5": (
            t.T5Config,
            t.T5ForConditionalGeneration,
            {
                "vocab_size": VOCABULARY,
                "d_model": width,
                "d_ff": 2 * width,
                "num_layers": 2,
                "num_heads": 2,
                "d_kv": width // 2,
                "pad_token_id": 0,
                "eos_token_id": 1,
                "decoder_start_token_id": 0,
            },
        ),
        "bart": (
            t.BartConfig,
            t.BartForConditionalGeneration,
            {
                "vocab_size": VOCABULARY,
                "d_model": width,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_ffn_dim": 2 * width,
                "decoder_ffn_dim": 2 * width,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "max_position_embeddings": 64,
                "pad_token_id": 0,
                **marks,
            },
        ),
        "bert": (
            t.BertConfig,
            t.BertForMaskedLM,
            {**wide, **heads, "max_position_embeddings": 64, "hidden_dropout_prob": 0.1},
        ),
    }
    make_config, make_model, values = classes[kind]
    if kind == "bert":
        values = {key: value for key, value in values.items() if key != "num_key_value_heads"}
    generator = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = make_model(make_config(**{**values, **fields}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            outer = getattr(model, "final_logits_bias", None)
            if outer is not None:
                outer.normal_()
    finally:
        torch.random.set_rng_state(generator)
    return model


def examples(count: int = 32, *, seed: int = 0, longest: int = 12, prompt: int = 2) -> list[dict[str, Any]]:
    """Texts of uneven length: input_ids, labels (the prompt's are -100) and their row as `example`."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(count):
        length = int(torch.randint(prompt + 2, longest + 1, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "example": row})
    return rows


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pads on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (longest - len(values))]

    batch = {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], -100) for row in rows]),
        "example": torch.tensor([row["example"] for row in rows]),
    }
    if "kd_weight" in rows[0]:
        batch["kd_weight"] = torch.tensor([row["kd_weight"] for row in rows])
    return batch


def packed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """All texts in one row, with position_ids that start anew; every token is a label, as packing often leaves it."""
    return {
        "input_ids": torch.tensor([[i for row in rows for i in row["input_ids"]]]),
        "labels": torch.tensor([[i for row in rows for i in row["labels"]]]),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row["input_ids"]))]]),
        "example": torch.tensor([rows[0]["example"]]),
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by name."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
