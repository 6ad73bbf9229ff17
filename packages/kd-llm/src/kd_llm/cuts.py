"""Students cut out of a teacher: layers left out, widths reduced to their first channels, weights copied.

Every parameter of the student is an index selection of the teacher's: the layer by the list of kept layers, and each
of its dimensions by what that dimension counts,

    hidden        the residual stream                  queries  heads x head width of the queries
    intermediate  inside the feed-forward layers       keys     heads x head width of keys and values
    whole         vocabulary, positions, head width, classes: never cut

The width of a head stays, as rotary positions and the softmax's scale depend on it. With grouped queries the kept
heads of keys and values are the first ones, each with the first of its own queries. Nothing is rescaled: a student with
all layers and widths is the teacher, a narrower one needs training.

Families: Llama and what shares its names (Mistral, Qwen 2 and 3, Gemma, Phi 3 without fused layers, OLMo), GPT-2, BERT
and RoBERTa, DistilBERT, T5. A parameter whose name is not known is copied whole if its shape did not change.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_llm.models import CutConfig
from kdcore.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LAYER = re.compile(r"(?<![^.])(layers|h|block|layer)\.(\d+)\.")
"""The first of these in a name is the transformer block; T5's `layer.1` inside of `block.0` is a part of it."""

# End of a parameter's name -> what its dimensions count. H hidden, I intermediate, Q queries, K keys, 3Q the three
# projections of GPT-2 in one matrix, R heads (T5's relative positions), "." whole.
AXES: list[tuple[str, str]] = [
    # embeddings and heads
    (
        r"(embed_tokens|wte|wpe|shared|lm_head|cls\.predictions\.decoder|vocab_projector|out_proj|score|lm_head\.decoder)\.weight",
        ". H",
    ),
    (r"(word|position|token_type)_embeddings\.weight", ". H"),
    (r"(?<!pre_)classifier\.weight", ". H"),
    # Llama and its relatives
    (r"q_proj\.weight", "Q H"),
    (r"q_proj\.bias", "Q"),
    (r"[kv]_proj\.weight", "K H"),
    (r"[kv]_proj\.bias", "K"),
    (r"self_attn\.o_proj\.weight", "H Q"),
    (r"[qk]_norm\.weight", "."),
    (r"(gate|up)_proj\.weight", "I H"),
    (r"(gate|up)_proj\.bias", "I"),
    (r"down_proj\.weight", "H I"),
    # GPT-2, whose matrices are transposed
    (r"attn\.c_attn\.weight", "H 3Q"),
    (r"attn\.c_attn\.bias", "3Q"),
    (r"attn\.c_proj\.weight", "Q H"),
    (r"mlp\.c_fc\.weight", "H I"),
    (r"mlp\.c_fc\.bias", "I"),
    (r"mlp\.c_proj\.weight", "I H"),
    # BERT, RoBERTa, DistilBERT
    (r"(self\.(query|key|value)|attention\.[qkv]_lin)\.weight", "Q H"),
    (r"(self\.(query|key|value)|attention\.[qkv]_lin)\.bias", "Q"),
    (r"(attention\.output\.dense|attention\.out_lin)\.weight", "H Q"),
    (r"(intermediate\.dense|ffn\.lin1)\.weight", "I H"),
    (r"(intermediate\.dense|ffn\.lin1)\.bias", "I"),
    (r"(output\.dense|ffn\.lin2)\.weight", "H I"),
    (
        r"(pooler\.dense|transform\.dense|lm_head\.dense|classifier\.dense|pre_classifier|vocab_transform)\.weight",
        "H H",
    ),
    # T5
    (r"(SelfAttention|EncDecAttention)\.q\.weight", "Q H"),
    (r"(SelfAttention|EncDecAttention)\.[kv]\.weight", "Q H"),
    (r"(SelfAttention|EncDecAttention)\.o\.weight", "H Q"),
    (r"relative_attention_bias\.weight", ". R"),
    (r"DenseReluDense\.wi(_0|_1)?\.weight", "I H"),
    (r"DenseReluDense\.wo\.weight", "H I"),
    # outputs over the vocabulary or the classes
    (
        r"(lm_head|lm_head\.decoder|predictions|predictions\.decoder|vocab_projector|(?<!pre_)classifier|out_proj)\.bias",
        ".",
    ),
    # norms and all other biases live in the residual stream
    (r"(norm|layernorm|ln_\w+|LayerNorm|layer_norm)\.(weight|bias)", "H"),
    (r"\.bias", "H"),
]
RULES = [(re.compile(pattern + "$"), axes.split()) for pattern, axes in AXES]
NAMES = {
    "gpt2": {"intermediate_size": "n_inner"},
    "t5": {"intermediate_size": "d_ff"},
    "mt5": {"intermediate_size": "d_ff"},
    "distilbert": {"intermediate_size": "hidden_dim"},
}
TIED_WIDTH = {"gpt2", "bert", "roberta", "distilbert"}
"""Families whose heads share the hidden width: hidden_size = heads x head width."""


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> _Sizes:
        kind, hidden, heads = config.model_type, config.hidden_size, config.num_attention_heads
        inner = getattr(config, NAMES.get(kind, {}).get("intermediate_size", "intermediate_size"), None)
        head_dim = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or hidden // heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        return cls(hidden, inner or 4 * hidden, heads, kv, head_dim)


def cut_student(teacher: nn.Module, cut: CutConfig, *, field: str = "student.cut") -> PreTrainedModel:
    """A new model of the teacher's class with the kept layers and widths. The teacher is left as it is.

    Raises InputError for a cut that its architecture cannot have, and names the field.
    """
    from kd_llm.engine.heads import base_model

    teacher = base_model(teacher)
    config: Any = teacher.config
    before = _Sizes.of(config)
    after = _wanted(cut, before, config.model_type, field)
    layers = kept_layers(cut.layers, _depth(config), f"{field}.layers")
    decoder = layers
    if config.is_encoder_decoder:
        same = cut.decoder_layers if cut.decoder_layers is not None else cut.layers
        decoder = kept_layers(same, _decoder_depth(config), f"{field}.decoder_layers")
    elif cut.decoder_layers is not None:
        raise InputError(f"{field}.decoder_layers: only for encoder-decoders; the teacher is a {config.model_type}")
    made = _student_config(config, after, before, layers, decoder)
    with torch.random.fork_rng(devices=[]):  # the initial weights are all overwritten
        student = type(teacher)._from_config(made, dtype=next(teacher.parameters()).dtype)  # type: ignore[attr-defined]
    _copy(teacher, student, _selections(before, after), layers, decoder, field)
    student.generation_config = copy.deepcopy(getattr(teacher, "generation_config", None))
    return student


def kept_layers(wanted: int | Sequence[int] | None, depth: int, field: str) -> list[int]:
    """Indices of the kept layers. A number is spread evenly with the first and the last; 1 keeps the first.

    >>> kept_layers(3, 12, "layers"), kept_layers(None, 2, "layers")
    ([0, 6, 11], [0, 1])
    """
    if wanted is None:
        return list(range(depth))
    if isinstance(wanted, int):
        if not 1 <= wanted <= depth:
            raise InputError(f"{field} = {wanted}: allowed: 1 to {depth}, the teacher's depth")
        return [0] if wanted == 1 else [int(i * (depth - 1) / (wanted - 1) + 0.5) for i in range(wanted)]
    if not wanted or sorted(set(wanted)) != list(wanted) or wanted[0] < 0 or wanted[-1] >= depth:
        raise InputError(f"{field} = {list(wanted)}: allowed: different indices in rising order, 0 to {depth - 1}")
    return list(wanted)


def _depth(config: Any) -> int:
    return int(config.num_hidden_layers)


def _decoder_depth(config: Any) -> int:
    return int(getattr(config, "num_decoder_layers", None) or config.num_hidden_layers)


def _wanted(cut: CutConfig, before: _Sizes, kind: str, field: str) -> _Sizes:
    """The student's sizes, checked against the teacher's and each other."""
    values = {}
    given = {"hidden": cut.hidden_size, "intermediate": cut.intermediate_size, "heads": cut.heads}
    names = {"hidden": "hidden_size", "intermediate": "intermediate_size", "heads": "heads"}
    for name, value in given.items():
        values[name] = getattr(before, name) if value is None else value
        if values[name] > getattr(before, name):
            most = getattr(before, name)
            raise InputError(f"{field}.{names[name]} = {value}: the teacher has {most}; a cut cannot widen")
    grouped = before.kv_heads != before.heads
    if not grouped and cut.kv_heads not in (None, values["heads"]):
        raise InputError(f"{field}.kv_heads = {cut.kv_heads}: the teacher has one for each query; leave it out")
    kv = (cut.kv_heads or min(before.kv_heads, values["heads"])) if grouped else values["heads"]
    if kv > before.kv_heads:
        raise InputError(f"{field}.kv_heads = {kv}: the teacher has {before.kv_heads}; a cut cannot widen")
    queries, rest = divmod(values["heads"], kv)
    if rest or queries > before.heads // before.kv_heads:
        raise InputError(
            f"{field}: {values['heads']} heads cannot share {kv} of keys and values; allowed: a multiple, with at most "
            f"the teacher's {before.heads // before.kv_heads} queries for each"
        )
    if kind in TIED_WIDTH and values["hidden"] != values["heads"] * before.head_dim:
        raise InputError(
            f"{field}: hidden_size = {values['hidden']} with {values['heads']} heads; a {kind} model needs "
            f"hidden_size = heads x {before.head_dim}, the width of the teacher's heads"
        )
    if values["hidden"] % 2:
        raise InputError(f"{field}.hidden_size = {values['hidden']}: must be even")
    return _Sizes(values["hidden"], values["intermediate"], values["heads"], kv, before.head_dim)


def _student_config(config: Any, after: _Sizes, before: _Sizes, layers: list[int], decoder: list[int]) -> Any:
    made = copy.deepcopy(config)
    made.num_hidden_layers = len(layers)
    if config.is_encoder_decoder:
        made.num_decoder_layers = len(decoder)
    made.hidden_size, made.num_attention_heads = after.hidden, after.heads
    if after.intermediate != before.intermediate or after.hidden != before.hidden:
        setattr(
            made, NAMES.get(config.model_type, {}).get("intermediate_size", "intermediate_size"), after.intermediate
        )
    if getattr(config, "num_key_value_heads", None) is not None:
        made.num_key_value_heads = after.kv_heads
    if config.model_type not in TIED_WIDTH and not hasattr(config, "d_kv"):
        made.head_dim = after.head_dim
    if getattr(config, "layer_types", None):
        made.layer_types = [config.layer_types[index] for index in layers]
    return made


# ---------------------------------------------------------------- copying


def _selections(before: _Sizes, after: _Sizes) -> dict[str, tuple[int, Tensor]]:
    """Axis -> its size in the teacher, and the indices that are kept."""
    width = before.head_dim
    per_kv, kept_per_kv = before.heads // before.kv_heads, after.heads // after.kv_heads
    heads = torch.tensor([kv * per_kv + q for kv in range(after.kv_heads) for q in range(kept_per_kv)])
    queries = (heads[:, None] * width + torch.arange(width)).flatten()
    total = before.heads * width
    return {
        "H": (before.hidden, torch.arange(after.hidden)),
        "I": (before.intermediate, torch.arange(after.intermediate)),
        "Q": (total, queries),
        "K": (before.kv_heads * width, torch.arange(after.kv_heads * width)),
        "3Q": (3 * total, torch.cat([queries + part * total for part in range(3)])),
        "R": (before.heads, heads),
    }


@torch.no_grad()
def _copy(
    teacher: nn.Module,
    student: nn.Module,
    selections: Mapping[str, tuple[int, Tensor]],
    layers: list[int],
    decoder: list[int],
    field: str,
) -> None:
    source = teacher.state_dict()
    target = student.state_dict()
    for name, value in target.items():
        origin = _origin(name, decoder if name.startswith("decoder.") else layers)
        if origin not in source:
            raise InputError(f"{field}: the teacher has no weights '{origin}'; its architecture cannot be cut")
        value.copy_(_selected(name, source[origin], value, selections, field))


def _origin(name: str, layers: list[int]) -> str:
    """The teacher's name of a student's parameter."""
    found = LAYER.search(name)
    if found is None or "relative_attention_bias" in name:  # T5 has that one in its first layer alone
        return name
    start, end = found.span(2)
    return f"{name[:start]}{layers[int(found[2])]}{name[end:]}"


def _selected(
    name: str, value: Tensor, like: Tensor, selections: Mapping[str, tuple[int, Tensor]], field: str
) -> Tensor:
    axes = next((axes for pattern, axes in RULES if pattern.search(name)), None)
    if value.shape == like.shape and (axes is None or len(axes) != value.ndim):
        return value
    if axes is None or len(axes) != value.ndim:
        raise InputError(f"{field}: it is not known what '{name}' {tuple(value.shape)} counts; cut layers alone")
    for dimension, axis in enumerate(axes):
        if axis == ".":
            continue
        size, kept = selections[axis]
        if value.shape[dimension] != size:
            raise InputError(
                f"{field}: '{name}' is {tuple(value.shape)}, expected {size} in dimension {dimension}; cut layers alone"
            )
        value = value.index_select(dimension, kept.to(value.device))
    if value.shape != like.shape:
        raise InputError(f"{field}: '{name}' becomes {tuple(value.shape)}, the student has {tuple(like.shape)}")
    return value
