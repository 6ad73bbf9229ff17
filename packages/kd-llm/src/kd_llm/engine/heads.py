"""The output head of a language model: the rows it reads, its weight, and what the model does to its logits.

A model's logits are  y = scale (h W^T + b), then softcap tanh(y / softcap)  for almost every architecture; where it is
so, a loss over the vocabulary needs the rows h and the head (W, b) alone, and never the (tokens, vocabulary) logits.
`head_of` finds W, b, the scale and the softcap; it believes no field of a config before one tiny forward pass has
given the same logits. A head that is not of this form still works, by the logits of the predicting rows.

The scale is `logit_scale` (Cohere), 1 / `logits_scaling` (Granite), `logits_scaling` (HyperCLOVA X) or
`lm_head_multiplier` (Falcon-H1); the softcap is `final_logit_softcapping` (Gemma 2, arXiv 2408.00118, section 2).
LoRA (arXiv 2106.09685) on the head is again of this form: with x = s A dropout(h), h W^T + x B^T = [h, x] [W, B]^T.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdcore.errors import InputError
from kdcore.gpu import HeadSpec

Adapter = tuple[nn.Module, nn.Module, nn.Module, float]
"""LoRA's A, B, dropout and scaling of one active adapter."""


@dataclass(frozen=True)
class Head:
    """`module` is what the model calls. `linear`: its logits are those of `weight` (V, d), `bias` (V,) and `spec`."""

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    spec: HeadSpec
    linear: bool
    adapters: tuple[Adapter, ...] = ()

    def rows(self, hidden: Tensor) -> Tensor:
        """What `weight` multiplies: the rows (..., d) that the head got, with those of active LoRA adapters beside."""
        if not self.adapters:
            return hidden
        low = [scaling * a(dropout(hidden.to(a.weight.dtype))) for a, _, dropout, scaling in self.adapters]
        return torch.cat([hidden, *(x.to(hidden.dtype) for x in low)], -1)

    def logits(self, rows: Tensor) -> Tensor:
        """(..., d) -> (..., V), as the model gives them; for few rows."""
        y = nn.functional.linear(rows.to(self.weight.dtype), self.weight, self.bias)
        return finish_logits(y, self.spec)


def finish_logits(y: Tensor, spec: HeadSpec) -> Tensor:
    """What `spec` does to h W^T + b."""
    y = y if spec.scale == 1 else y * spec.scale
    return y if spec.softcap is None else spec.softcap * torch.tanh(y / spec.softcap)


# ---------------------------------------------------------------- finding it

_forms: WeakKeyDictionary[nn.Module, HeadSpec | None] = WeakKeyDictionary()


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft one; the model itself otherwise."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def head_of(model: nn.Module) -> Head:
    """The output head of a (peft-wrapped) language model as it is now; with adapters off inside `disable_adapter()`.

    Whether it is linear is measured once a model, by a forward pass over a few tokens without dropout; where it is
    not, one warning says so.
    Raises: InputError for a model without output embeddings.
    """
    base = base_model(model)
    module = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(module, nn.Module):
        raise InputError(
            f"model: {type(base).__name__} has no output embeddings, allowed: causal, masked or sequence-to-sequence "
            "language models"
        )
    weight, bias, adapters = _parts(base, module)
    if weight is None:
        _warn_once(base, f"{type(module).__name__} is no linear layer")
        return Head(module, torch.empty(0), None, HeadSpec(), False)
    if base not in _forms:
        _forms[base] = _measure(base, module)
        if _forms[base] is None:
            _warn_once(base, "its logits are not scale, softcap and bias of a linear layer")
    spec = _forms[base]
    return Head(module, weight, bias, spec or HeadSpec(), spec is not None, adapters)


def whole_head(head: Head) -> Head:
    """The head with whole tensors: without gradient shards are gathered, with gradient they cannot be."""
    from torch.distributed.tensor import DTensor

    if not isinstance(head.weight, DTensor):
        return head
    if torch.is_grad_enabled():
        raise InputError(
            "FSDP: the student's head is a unit of its own, allowed: a head in the root unit (wrap transformer layers)"
        )
    bias = head.bias.full_tensor() if isinstance(head.bias, DTensor) else head.bias
    return replace(head, weight=head.weight.full_tensor(), bias=bias)


_warned: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _warn_once(base: nn.Module, why: str) -> None:
    if base not in _warned:
        _warned[base] = True
        warnings.warn(f"{type(base).__name__}: {why}; the logits of the predicting rows are made in full", stacklevel=3)


def _parts(base: nn.Module, module: nn.Module) -> tuple[Tensor | None, Tensor | None, tuple[Adapter, ...]]:
    """Weight, bias and LoRA adapters of a head; weight None where it is no plain linear layer."""
    adapters: list[Adapter] = []
    inner: Any = module
    while True:
        if hasattr(inner, "modules_to_save") and hasattr(inner, "original_module"):
            active = [name for name in inner.active_adapters if name in inner.modules_to_save]
            off = inner.disable_adapters or not active
            inner = inner.original_module if off else inner.modules_to_save[active[0]]
        elif hasattr(inner, "base_layer") and hasattr(inner, "lora_A"):
            if not (inner.disable_adapters or inner.merged):
                active = [name for name in inner.active_adapters if name in inner.lora_A]
                if any(name in inner.lora_variant or inner.lora_bias.get(name) for name in active):
                    return None, None, ()
                adapters += [
                    (inner.lora_A[n], inner.lora_B[n], inner.lora_dropout[n], inner.scaling[n]) for n in active
                ]
            inner = inner.base_layer
        else:
            break
    weight = getattr(inner, "weight", None)
    if not isinstance(inner, nn.Linear) or weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return None, None, ()
    bias = inner.bias
    outer = getattr(base, "final_logits_bias", None)  # BART's, outside of the head
    if isinstance(outer, Tensor) and outer.numel() == len(weight):
        bias = outer.reshape(-1) if bias is None else bias + outer.reshape(-1)
    if adapters:
        weight = torch.cat([weight, *(b.weight.to(weight.dtype) for _, b, _, _ in adapters)], 1)
    return weight, bias, tuple(adapters)


def _candidates(config: Any) -> Iterator[HeadSpec]:
    """The forms that a config's fields may mean, the likely one first."""
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    scales = [1.0]
    for field in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        value = getattr(config, field, None)
        if isinstance(value, int | float) and value not in (0, 1):
            scales += [1 / value, value] if field == "logits_scaling" else [float(value)]
    softcap = getattr(config, "final_logit_softcapping", None)
    softcaps = [float(softcap), None] if softcap else [None]
    for scale in reversed(scales):
        for cap in softcaps:
            yield HeadSpec(float(scale), cap)


def _measure(base: nn.Module, module: nn.Module) -> HeadSpec | None:
    """The form whose logits are the model's, on a few tokens; None where there is none."""
    parameter = next(module.parameters())
    if parameter.is_meta or parameter.numel() == 0:  # sharded before it was loaded: nothing to measure on
        return next(_candidates(base.config))
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = torch.arange(min(6, vocabulary), device=parameter.device).unsqueeze(0)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if base.config.is_encoder_decoder else {})}
    training = {name: part.training for name, part in base.named_modules()}
    base.eval()
    try:
        with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            with replaced_head(base, module) as recorder:
                base(**inputs)
            logits = base(**inputs).logits.float()
            weight, bias, adapters = _parts(base, module)
            assert weight is not None
            rows = Head(module, weight, bias, HeadSpec(), True, adapters).rows(recorder.hidden)
            y = nn.functional.linear(rows.to(weight.dtype), weight, bias).float()
    finally:
        for name, part in base.named_modules():
            part.training = training[name]
    exact = parameter.dtype in (torch.float32, torch.float64)
    tolerance = (1e-4 if exact else 2e-2) * max(1e-6, logits.abs().max().item())
    fits = [s for s in _candidates(base.config) if (finish_logits(y, s) - logits).abs().max().item() <= tolerance]
    return fits[0] if fits else None


# ---------------------------------------------------------------- running a body without its head


class Recorder:
    """Stands in for a head: keeps the rows it is given and returns a tensor that whatever follows broadcasts over."""

    def __init__(self) -> None:
        self.hidden: Tensor = torch.empty(0)
        self.calls = 0

    def __call__(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.hidden, self.calls = hidden, self.calls + 1
        return hidden.new_zeros((1,) * hidden.ndim)


@contextmanager
def replaced_head(model: nn.Module, module: nn.Module | None = None) -> Iterator[Recorder]:
    """Inside, the model's head records its input instead of multiplying it; the logits of an output are a scalar 0."""
    recorder = Recorder()
    module = head_of(model).module if module is None else module
    with instance_forward(module, recorder):
        yield recorder
    if recorder.calls != 1:
        raise InputError(f"{type(module).__name__}: the model called its head {recorder.calls} times, allowed: once")


@contextmanager
def kept_rows(module: nn.Module, index: Tensor) -> Iterator[None]:
    """Inside, a head works on the rows `index` (N, 2) of its input alone: the output's logits are (1, N, V)."""
    forward = module.forward

    def on_rows(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forward(select(hidden, index).unsqueeze(0), *args, **kwargs)

    with instance_forward(module, on_rows):
        yield


def select(hidden: Tensor, index: Tensor) -> Tensor:
    """Rows (N, d) of hidden (B, L, d) at (sample, position)."""
    return hidden[index[:, 0], index[:, 1]]


@contextmanager
def instance_forward(module: nn.Module, function: Any) -> Iterator[None]:
    """The module's `forward` is `function` inside; hooks on the module fire as ever."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = function
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


# ---------------------------------------------------------------- vocabularies


def common_vocabulary(student: Head | int, teacher: Head | int, tokenizers: tuple[Any, Any] | None = None) -> int:
    """Number of first outputs that two models share: all, or the common prefix of padded vocabularies.

    Args:
        student, teacher: the heads, or their sizes.
        tokenizers: (student's, teacher's). They are needed where the sizes differ, and checked wherever they are given.
    Raises: InputError for tokenizers that differ, or sizes that differ without tokenizers.
    """
    size_s, size_t = (x if isinstance(x, int) else len(x.weight) for x in (student, teacher))
    n = min(size_s, size_t)
    if tokenizers is None:
        if size_s != size_t:
            raise InputError(
                f"vocabulary: the student has {size_s} outputs, the teacher {size_t}; give both tokenizers, so that it "
                "can be checked that they are one tokenizer with padded outputs"
            )
        return n
    ours, theirs = (_tokens(tokenizer, n) for tokenizer in tokenizers)
    if ours != theirs:
        differ = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        i = differ[0]
        raise InputError(
            f"tokenizers: {len(differ)} of the first {n} ids differ, first {i}: {ours.get(i)!r} for the student, "
            f"{theirs.get(i)!r} for the teacher; a divergence between tokens needs one tokenizer. Use sequence-level "
            "distillation (train on the teacher's texts) instead"
        )
    return n


def _tokens(tokenizer: Any, n: int) -> Mapping[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items() if index < n}
