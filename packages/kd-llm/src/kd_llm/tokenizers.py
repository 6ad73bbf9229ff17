"""Tokenizers: stock ones by name or folder, or trained in the run on the run's own text.

What is trained is a `PreTrainedTokenizerFast`, saved as a folder that `AutoTokenizer.from_pretrained` opens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kdcore.config import Config
from kdcore.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Kind = Literal["bpe", "wordpiece"]


class TokenizerConfig(Config):
    """A stock tokenizer, or the settings of one that is trained. With neither, the teacher's own is used."""

    pretrained: str | None = Field(None, description="hub name or folder; None: the teacher's, or one that is trained")
    revision: str | None = Field(None, description="commit, tag or branch of `pretrained`")
    kind: Kind = Field("bpe", description="trained: byte-level BPE (decoders), or WordPiece (encoders)")
    vocab_size: int = Field(2048, ge=300, description="trained: entries with the special ones, at most")
    lowercase: bool = Field(False, description="trained, wordpiece: letters without case and accents")
    split_digits: bool = Field(True, description="trained, bpe: every digit is a token of its own")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    kind: Kind = "bpe",
    model_max_length: int = 1024,
    *,
    lowercase: bool = False,
    split_digits: bool = True,
) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` entries, deterministic in `texts`.

    bpe: byte-level, so that every string has tokens and decoding gives the string back; special tokens <s>, </s>,
    <pad>; a text starts with <s>. wordpiece: BERT's, special tokens [PAD], [UNK], [CLS], [SEP], [MASK]; a text is
    [CLS] a [SEP], a pair [CLS] a [SEP] b [SEP].
    """
    return (
        _byte_level(texts, vocab_size, model_max_length, split_digits)
        if kind == "bpe"
        else _wordpiece(texts, vocab_size, model_max_length, lowercase)
    )


def _byte_level(texts: Iterable[str], vocab_size: int, length: int, split_digits: bool) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


def _wordpiece(texts: Iterable[str], vocab_size: int, length: int, lowercase: bool) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "mask_token": "[MASK]"}  # fmt: skip
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(special.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        padding_side="right",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    )


def open_tokenizer(
    source: str | Path, *, revision: str | None = None, field: str = "tokenizer.pretrained"
) -> PreTrainedTokenizerBase:
    """A tokenizer by hub name or folder. A decoder's without a padding token pads with its end token.

    Raises InputError that names `field` where it cannot be opened or has neither an end nor a separator token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(source), revision=revision, use_fast=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{field} = '{source}': no tokenizer can be opened there ({reason})") from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"{field} = '{source}': it has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
