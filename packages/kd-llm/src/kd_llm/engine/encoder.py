"""What distillation of BERT-type encoders shares: layer maps, attention scores before softmax, latent losses.

A student of N layers and hidden size d' learns from a teacher of M layers and size d. With g the layer map, A^m in
R^{BxHxSxS} the attention scores q k^T / sqrt(d_head) of layer m, H^m its output, E the embeddings and W linear maps
that are trained beside the student (Jiao et al., TinyBERT, arXiv 1909.10351, eqs. 7 to 9):

    L_attn = sum_{m=1..N} MSE(A_S^m, A_T^{g(m)})         mean over batch, heads and pairs of real positions
    L_hid  = sum_{m=1..N} MSE(H_S^m W_h, H_T^{g(m)})     mean over real positions and the d features
    L_emb  = MSE(E_S W_e, E_T)

Stock models return no scores, and none of their attention kernels but the eager one returns probabilities. So the
outputs of the query and key projections are tapped and multiplied here, one layer at a time, and no additive mask is
ever part of what is compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kdcore.errors import InputError, did_you_mean
from kdcore.taps import FeatureTap

MapRule = Literal["uniform", "nearest", "top"]
Attention = Literal["scores", "probabilities", "none"]

QUERIES = {  # suffix of the query projection's name -> that of the key projection
    "attention.self.query": "attention.self.key",  # BERT, RoBERTa, ERNIE, ELECTRA
    "attention.q_lin": "attention.k_lin",  # DistilBERT
    "attention.attn.q": "attention.attn.k",  # MPNet
}
BIASED_SCORES = {"deberta", "deberta-v2", "mpnet", "modernbert", "roformer", "nezha", "t5"}
"""Model types whose scores hold more than q k^T (relative positions, rotations): not rebuilt from the projections."""


def layer_map(student: int, teacher: int, rule: MapRule = "uniform") -> tuple[int, ...]:
    """g(0), ..., g(N): the teacher's layer for each layer of the student, 0 being the embeddings.

    uniform: g(m) = m M / N, M divisible by N. nearest: g(m) = round(m M / N), half up, for any N <= M.
    top: the last N layers, g(m) = M - N + m. Raises InputError where the rule does not apply.

    >>> layer_map(4, 12)
    (0, 3, 6, 9, 12)
    """
    if not 1 <= student <= teacher:
        raise InputError(f"layers: a student of {student} and a teacher of {teacher}, allowed: 1 to the teacher's")
    if rule == "uniform":
        if teacher % student:
            raise InputError(
                f"layer_map = 'uniform': {teacher} teacher layers are not a multiple of the student's {student}; "
                "allowed here: 'nearest', 'top'"
            )
        return tuple(m * teacher // student for m in range(student + 1))
    if rule == "nearest":
        return tuple((2 * m * teacher + student) // (2 * student) for m in range(student + 1))
    if rule == "top":
        return (0, *range(teacher - student + 1, teacher + 1))
    raise InputError(f"layer_map = {rule!r}{did_you_mean(str(rule), ('uniform', 'nearest', 'top'))}")


# ---------------------------------------------------------------- losses on tensors


def attention_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """q k^T / sqrt(d_head) before mask and softmax: (B, S, D), (B, S, D) -> (B, H, S, S), at least float32."""
    q, k = (at_least_float(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


def attention_probabilities(scores: Tensor, mask: Tensor) -> Tensor:
    """softmax over the real keys: scores (B, H, S, S), mask (B, S) -> (B, H, S, S), 0 at padded keys."""
    return scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min).softmax(-1)


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean of squares over batch, heads and pairs of real positions (TinyBERT eq. 7). (B, H, S, S) twice -> scalar.

    mask (B, S) is True at real positions. What stands in padded rows and columns, infinite or not, does not matter.
    Raises InputError where the two differ in heads or positions.

    >>> a, b = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [2.0, -1.0]])
    >>> attention_mse(a[None, None], b[None, None], torch.ones(1, 2, dtype=torch.bool)).item()
    1.5
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"attention: student has {student.shape[1]} heads over {student.shape[-1]} positions, teacher "
            f"{teacher.shape[1]} over {teacher.shape[-1]}; allowed: equal ones (or latent.attention: none)"
        )
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    difference = (student - teacher).masked_fill(~pairs, 0.0)
    return difference.square().sum() / (student.shape[1] * pairs.sum())


def position_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean of squares over real positions and features (TinyBERT eqs. 8, 9). (B, S, d) twice, mask (B, S) -> scalar."""
    if student.shape != teacher.shape:
        raise InputError(f"features: shapes {tuple(student.shape)} and {tuple(teacher.shape)}, allowed: equal ones")
    difference = (at_least_float(student) - at_least_float(teacher)).masked_fill(~mask[..., None], 0.0)
    return difference.square().sum() / (mask.sum() * student.shape[-1])


def at_least_float(x: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- the layers of a model


@dataclass(frozen=True)
class EncoderLayers:
    """Where a BERT-type model keeps what the latent losses look at, by module name; layers count from 1."""

    embeddings: str
    layers: tuple[str, ...]
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    heads: int
    hidden_size: int

    @classmethod
    def of(cls, model: nn.Module, *, attention: bool = True, field: str = "model") -> EncoderLayers:
        """Finds the layers. `attention` asks for scores that q k^T gives completely. Raises InputError otherwise."""
        config = model.config
        names = [name for name, _ in model.named_modules()]
        found = {}
        for name in names:
            match = re.fullmatch(rf"(.*\blayers?\.(\d+))\.({'|'.join(map(re.escape, QUERIES))})", name)
            if match:
                found[int(match[2])] = (match[1], match[3])
        embeddings = [name for name in names if name.split(".")[-1] == "embeddings"]
        if not found or not embeddings:
            raise InputError(
                f"{field}: {type(model).__name__} has no layers with query and key projections of their own; allowed: "
                "BERT-type encoders (bert, roberta, ernie, electra, distilbert)"
            )
        if attention and config.model_type in BIASED_SCORES:
            raise InputError(
                f"{field}: attention scores of model type '{config.model_type}' are more than query times key; "
                "allowed with it: latent.attention: none"
            )
        prefixes = [found[i] for i in sorted(found)]
        return cls(
            embeddings[0],
            tuple(prefix for prefix, _ in prefixes),
            tuple(f"{prefix}.{query}" for prefix, query in prefixes),
            tuple(f"{prefix}.{QUERIES[query]}" for prefix, query in prefixes),
            config.num_attention_heads,
            config.hidden_size,
        )

    def tap(self, model: nn.Module, layers: Sequence[int], *, attention: bool, detach: bool = False) -> FeatureTap:
        """A closed tap on the embeddings ("hidden.0") and on "hidden.m", "query.m", "key.m" of the given layers."""
        names = {}
        for m in layers:
            names[f"hidden.{m}"] = self.layers[m - 1] if m else self.embeddings
            if m and attention:
                names[f"query.{m}"], names[f"key.{m}"] = self.queries[m - 1], self.keys[m - 1]
        return FeatureTap(model, names, index=0, detach=detach)


# ---------------------------------------------------------------- L_lat


class LatentLoss(nn.Module):
    """L_attn + L_hid + L_emb of the module docstring, with the maps W_h (one for all layers) and W_e as parameters.

    Args:
        student, teacher: their layers. rule: the layer map g.
        attention: compare scores before softmax, probabilities after it, or no attention at all.
        embeddings: with L_emb. last_layer_only: L_attn and L_hid of layer N alone.

    The maps start as orthogonal projections; equal sizes start as the identity.
    Raises InputError: head counts that differ while attention is compared, layer counts that the rule refuses.
    """

    def __init__(
        self,
        student: EncoderLayers,
        teacher: EncoderLayers,
        *,
        rule: MapRule = "uniform",
        attention: Attention = "scores",
        embeddings: bool = True,
        last_layer_only: bool = False,
    ):
        super().__init__()
        if attention != "none" and student.heads != teacher.heads:
            raise InputError(
                f"student.num_attention_heads = {student.heads}: the teacher has {teacher.heads}, and attention is "
                "compared head by head; allowed: the teacher's number, or latent.attention: none"
            )
        self.student, self.teacher, self.attention = student, teacher, attention
        mapped = layer_map(len(student.layers), len(teacher.layers), rule)
        last = len(student.layers)
        chosen = range(last if last_layer_only else 1, last + 1)
        self.pairs = ([(0, 0)] if embeddings else []) + [(m, mapped[m]) for m in chosen]
        self.hidden = _projection(student.hidden_size, teacher.hidden_size)
        self.embedding = _projection(student.hidden_size, teacher.hidden_size) if embeddings else None

    def taps(self, student: nn.Module, teacher: nn.Module) -> tuple[FeatureTap, FeatureTap]:
        """Closed taps on the two models (the ones the layers were found in, or of the same architecture)."""
        with_attention = self.attention != "none"
        of_student, of_teacher = zip(*self.pairs)
        return (
            self.student.tap(student, of_student, attention=with_attention),
            self.teacher.tap(teacher, of_teacher, attention=with_attention, detach=True),
        )

    def forward(self, student: FeatureTap, teacher: FeatureTap, mask: Tensor) -> dict[str, Tensor]:
        """`attention`, `hidden` and `embeddings` as scalars, from taps that hold a forward pass each.

        mask (B, S) is 1 or True at real positions. The terms that are switched off are absent.
        """
        mask = mask.bool()
        terms: dict[str, Tensor] = {}

        def add(name: str, value: Tensor) -> None:
            terms[name] = terms[name] + value if name in terms else value

        for m, g in self.pairs:
            h_s, h_t = student[f"hidden.{m}"], teacher[f"hidden.{g}"]
            project = self.hidden if m else self.embedding
            assert project is not None
            add("hidden" if m else "embeddings", position_mse(project(h_s.to(project.weight.dtype)), h_t, mask))
            if m and self.attention != "none":
                add("attention", attention_mse(self._map(student, m, mask), self._map(teacher, g, mask), mask))
        return terms

    def save(self, path: Path) -> None:
        """Writes the maps, by safetensors; `load` reads them."""
        from safetensors.torch import save_file

        save_file({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, path)

    def load(self, path: Path) -> None:
        """The maps that `save` has written."""
        from safetensors.torch import load_file

        self.load_state_dict(load_file(path))

    def _map(self, tap: Mapping[str, Tensor] | FeatureTap, layer: int, mask: Tensor) -> Tensor:
        scores = attention_scores(tap[f"query.{layer}"], tap[f"key.{layer}"], self.student.heads)
        return attention_probabilities(scores, mask) if self.attention == "probabilities" else scores


def _projection(size: int, target: int) -> nn.Linear:
    linear = nn.Linear(size, target, bias=False)
    if size == target:
        nn.init.eye_(linear.weight)
    else:
        nn.init.orthogonal_(linear.weight)
    return linear
