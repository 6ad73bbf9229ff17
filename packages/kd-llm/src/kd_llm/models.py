"""Teachers and students: by hub name or folder, from a config of transformers, or cut out of the teacher.

What is saved is a `save_pretrained` folder that stock `AutoModel...from_pretrained` opens; weights are read from
safetensors alone, and no code of a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from kd_llm.collate import Task
from kdcore.config import Config
from kdcore.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
}


class AdapterConfig(Config):
    """LoRA (arXiv 2106.09685), through peft."""

    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32.0, gt=0, description="scale of the update times rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout in front of the update")
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="names of adapted layers; all-linear: every one but the head"
    )
    trained: list[str] = Field(default_factory=list, description="names of layers that train in full beside them")


class ModelConfig(Config):
    """A transformers model: `pretrained`, or `config`: `model_type` and the fields that differ from its defaults."""

    pretrained: str | None = Field(None, description="hub name or folder (of a model, or of peft adapters)")
    revision: str | None = Field(None, description="commit, tag or branch of `pretrained`")
    config: dict[str, Any] | None = Field(None, description="a model from scratch: model_type and fields of its config")
    adapters: AdapterConfig | None = Field(None, description="train LoRA adapters alone; None: all weights")
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="type of the weights")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        None, description="attention kernel; None: transformers' choice"
    )

    def sources(self) -> list[str]:
        """Names of the given fields that say where the weights come from."""
        return [name for name in ("pretrained", "config") if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if len(self.sources()) > 1:
            raise ValueError(f"has several sources: give one of {', '.join(self.sources())}")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example llama")
        return self


class CutConfig(Config):
    """A student cut out of the teacher: some of its layers, the first channels of the rest; weights are copied."""

    layers: int | list[int] | None = Field(
        None, description="number of layers, evenly spaced with the first and the last, or their indices from 0"
    )
    decoder_layers: int | list[int] | None = Field(
        None, description="encoder-decoders: the same for the decoder; None: as `layers`"
    )
    hidden_size: int | None = Field(None, ge=1, description="width of the residual stream; None: the teacher's")
    intermediate_size: int | None = Field(None, ge=1, description="width inside the feed-forward layers")
    heads: int | None = Field(None, ge=1, description="attention heads (queries); their width stays")
    kv_heads: int | None = Field(None, ge=1, description="heads of keys and values where they are fewer than queries")


class StudentConfig(ModelConfig):
    cut: CutConfig | None = Field(None, description="cut out of the teacher, weights copied")

    def sources(self) -> list[str]:
        return super().sources() + (["cut"] if self.cut is not None else [])

    @model_validator(mode="after")
    def _has_a_source(self) -> StudentConfig:
        if not self.sources():
            raise ValueError("has no source: give pretrained, config or cut")
        return self


def reason(error: Exception) -> str:
    """What a library says is wrong, in one line."""
    text = " ".join(str(error).split())
    return text if 0 < len(text) <= 300 else f"{text[:300]}..." if text else type(error).__name__


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside, transformers shows no progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ---------------------------------------------------------------- opening


def open_model(
    config: ModelConfig,
    task: Task = "causal",
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_labels: int | None = None,
    *,
    teacher: nn.Module | None = None,
    field: str = "model",
) -> nn.Module:
    """The model of a config; a PeftModel where it has adapters. A model from scratch is drawn from torch's generator.

    tokenizer: gives a model from scratch its vocabulary and special tokens; a pretrained one must have an output for
        each of its tokens. teacher: what `cut` is cut out of.
    Raises InputError that names `field` and what is wrong.
    """
    if config.pretrained is not None:
        model = load_model(
            config.pretrained, task, num_labels, revision=config.revision, dtype=config.dtype,
            attention=config.attn_implementation, field=f"{field}.pretrained",
        )  # fmt: skip
    elif config.config is not None:
        model = from_config(config, task, tokenizer, num_labels, field=field)
    elif isinstance(config, StudentConfig) and config.cut is not None:
        from kd_llm.cuts import cut_student

        if teacher is None:
            raise InputError(f"{field}.cut: there is no teacher to cut it out of")
        model = cut_student(teacher, config.cut, field=f"{field}.cut").to(DTYPES[config.dtype])
    else:
        raise InputError(f"{field}: has no source; give pretrained or config")
    if tokenizer is not None:
        check_vocabulary(model, tokenizer, field)
    return model if config.adapters is None else add_adapters(model, config.adapters, task, field=f"{field}.adapters")


def load_model(
    source: str | Path,
    task: Task = "causal",
    num_labels: int | None = None,
    *,
    revision: str | None = None,
    dtype: str = "fp32",
    attention: str | None = None,
    field: str = "model.pretrained",
) -> PreTrainedModel:
    """A model by hub name or folder, by stock transformers, from safetensors. InputError that names `field`."""
    import transformers

    labels = {} if task != "classification" or num_labels is None else {"num_labels": num_labels}
    kernel = {} if attention is None else {"attn_implementation": attention}
    try:
        with no_bars():
            return getattr(transformers, AUTO[task]).from_pretrained(
                str(source), revision=revision, dtype=DTYPES[dtype], use_safetensors=True, **labels, **kernel
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(
            f"{field} = '{source}': no model for the task {task} can be opened there ({reason(error)})"
        ) from None


def from_config(
    config: ModelConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase | None,
    num_labels: int | None,
    *,
    field: str = "model",
) -> PreTrainedModel:
    """A model from scratch. Fields that its config class does not know are refused, with a suggestion."""
    import transformers

    made = make_config(config.config or {}, tokenizer, num_labels if task == "classification" else None, field=field)
    kernel = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    try:
        return getattr(transformers, AUTO[task]).from_config(made, dtype=DTYPES[config.dtype], **kernel)
    except (ValueError, KeyError, TypeError, RuntimeError, ImportError, ZeroDivisionError, AssertionError) as error:
        raise InputError(f"{field}.config = {config.config}: transformers refuses it ({reason(error)})") from None


def make_config(
    fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, num_labels: int | None, *, field: str
) -> PretrainedConfig:
    """The transformers config, with the tokenizer's vocabulary size and special tokens where `fields` has none."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = dict(fields)
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, list(CONFIG_MAPPING))
        raise InputError(f"{field}.config.model_type = '{model_type}': not known to transformers{hint}"[:400])
    default = AutoConfig.for_model(model_type)
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    known = {*default.to_dict(), *default.attribute_map, *special, "decoder_start_token_id", "tie_word_embeddings"}
    for name in values:
        if name not in known:
            hint = did_you_mean(name, known)
            hint = hint if len(hint) < 100 else f"; see transformers' {type(default).__name__}"
            raise InputError(f"{field}.config.{name}: not a field of {type(default).__name__}{hint}")
    if tokenizer is not None:
        values.setdefault("vocab_size", len(tokenizer))
        for name in special:
            values.setdefault(name, getattr(tokenizer, name))
        if default.is_encoder_decoder:
            values.setdefault("decoder_start_token_id", tokenizer.pad_token_id)
    if num_labels is not None:
        values["num_labels"] = num_labels
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # transformers' strict dataclasses raise classes of huggingface_hub
        raise InputError(f"{field}.config = {dict(fields)}: transformers refuses it ({reason(error)})") from None


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, field: str) -> None:
    """Raises InputError where the tokenizer has more tokens than the model has embeddings."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise InputError(f"{field}: has {rows} embeddings, the tokenizer {len(tokenizer)} tokens")


def add_adapters(model: nn.Module, config: AdapterConfig, task: Task, *, field: str) -> nn.Module:
    """The model with LoRA adapters, which alone train. InputError where no layer has one of the names."""
    from peft import LoraConfig, TaskType, get_peft_model

    kinds = {
        "causal": TaskType.CAUSAL_LM,
        "seq2seq": TaskType.SEQ_2_SEQ_LM,
        "classification": TaskType.SEQ_CLS,
        "masked": None,
    }
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=config.targets,
        modules_to_save=config.trained or None,
        task_type=kinds[task],
    )
    try:
        return get_peft_model(model, lora)  # type: ignore[arg-type]
    except ValueError as error:
        raise InputError(f"{field}.targets = {config.targets}: peft finds nothing to adapt ({reason(error)})") from None


def layers_and_heads(config: ModelConfig) -> tuple[int, int] | None:
    """Depth and attention heads of a model from scratch; None where its weights would have to be opened."""
    if config.config is None:
        return None
    made = make_config(config.config, None, None, field="model")
    return made.num_hidden_layers, made.num_attention_heads


def parameters_of(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
