"""NASA for joint attention: SD3 and Flux (arXiv 2412.02687, 2024). The form is ours: not confirmed by the paper.

In these networks image and text tokens share one softmax, and the text changes from block to block. The paper says
that the subtraction then concerns the image queries on the text keys alone, and no more. Here the negative text is a
second text that runs through the blocks beside the positive one: it attends to itself and the image, nothing attends
to it, and every image token loses what it would have read from it. With Q_i of the image, [.,.] along the tokens:

    image:     Z_i = softmax(Q_i [K+, K_i]^T / sqrt d) [V+, V_i] - alpha softmax(Q_i K-^T / sqrt d) V-
    positive:  Z_p = softmax(Q_p [K+, K_i]^T / sqrt d) [V+, V_i]
    negative:  Z_n = softmax(Q_n [K-, K_i]^T / sqrt d) [V-, V_i]

The negative embeddings are appended to `encoder_hidden_states` by a hook on the network, whose layers (embedder,
norms, feed-forward) work on each text token by itself; so the text costs twice, the image once.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_diffusion.integrations.nasa import Alpha, Nasa, check_width, checked_negative, is_off, match_batch, steer
from kdcore.errors import InputError


@dataclass
class TextTokens:
    """How many of a forward's text tokens are positive and negative, in this order; negative 0: not steered."""

    positive: int = 0
    negative: int = 0


class JointNasaProcessor:
    """Attention processor of one joint layer: `processor`, or the equations above while a negative text is there."""

    def __init__(self, processor: Any, alpha: Alpha, tokens: TextTokens):
        self.processor, self.alpha, self.tokens = processor, alpha, tokens

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not self.tokens.negative:
            given = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
            kwargs = {name: value for name, value in given.items() if value is not None}
            return self.processor(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
        if attention_mask is not None:
            raise InputError("attention_mask: allowed with a negative text in joint attention: None")
        q, k, v = _joint_heads(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=2) for x in (q, k))
        text, image = self._attend(q, k, v)
        if encoder_hidden_states is None:  # one stream, whose block projects
            return torch.cat([text, image], dim=1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Heads (B, H, positive + negative + image tokens, d) -> the text's and the image's output, heads merged."""
        p, n = self.tokens.positive, self.tokens.negative
        sizes = [p, n, q.shape[2] - p - n]
        (q_p, q_n, q_i), (k_p, k_n, k_i), (v_p, v_n, v_i) = (x.split(sizes, dim=2) for x in (q, k, v))
        z = _attention(torch.cat([q_p, q_i], 2), torch.cat([k_p, k_i], 2), torch.cat([v_p, v_i], 2))
        z_n = _attention(q_n, torch.cat([k_n, k_i], 2), torch.cat([v_n, v_i], 2))
        image = steer(z[:, p:], _attention(q_i, k_n, v_n), self.alpha)
        return torch.cat([z[:, :p], z_n], dim=1), image


def _joint_heads(attn: nn.Module, image: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, L, d) of the text's tokens, then the image's; one stream when text is None."""

    def heads(x: Tensor, norm: nn.Module | None) -> Tensor:
        x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return x if norm is None else norm(x)

    streams = [(image, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
    if text is not None:
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        streams.insert(0, (text, *added))
    q = torch.cat([heads(to_q(x), norm) for x, to_q, _, _, norm, _ in streams], dim=2)
    k = torch.cat([heads(to_k(x), norm) for x, _, to_k, _, _, norm in streams], dim=2)
    v = torch.cat([heads(to_v(x), None) for x, _, _, to_v, _, _ in streams], dim=2)
    return q, k, v


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class JointNasa(Nasa):
    """`Nasa` on the joint attention layers of an SD3 or Flux transformer; made by `nasa`."""

    def __init__(self, network: nn.Module, negative: Tensor, alpha: Alpha, mask: Tensor | None = None):
        self.tokens = TextTokens()
        self.transformer = next(m for m in network.modules() if getattr(m, "context_embedder", None) is not None)
        super().__init__(network, negative, alpha, mask)
        if any(layer.fused_projections for layer in self.layers):
            raise InputError("network: its projections are fused; allowed: unfuse_qkv_projections() first")

    @staticmethod
    def find_layers(network: nn.Module) -> list[nn.Module]:
        """Layers where image and text meet: with projections of the text's own, or one stream without an output's."""
        if not any(getattr(m, "context_embedder", None) is not None for m in network.modules()):
            return []
        layers = [m for m in network.modules() if hasattr(m, "to_q") and hasattr(m, "processor")]
        return [m for m in layers if getattr(m, "add_q_proj", None) is not None or m.pre_only]

    def install(self) -> None:
        if self._originals is not None:
            raise InputError("nasa: already installed; allowed: one install per remove")
        originals = [layer.processor for layer in self.layers]
        for processor in originals:  # one negative text, and no image adapter: their tokens would be taken for others
            if isinstance(processor, (JointNasaProcessor, nn.Module)):
                raise InputError(f"processor = {type(processor).__name__}: allowed with joint attention: stock ones")
        self._originals = originals
        for layer, processor in zip(self.layers, originals):
            layer.processor = JointNasaProcessor(processor, self.alpha, self.tokens)
        self._hook = self.transformer.register_forward_pre_hook(self._append, with_kwargs=True)

    def remove(self) -> None:
        super().remove()
        hook = self.__dict__.pop("_hook", None)
        if hook is not None:
            hook.remove()

    def _append(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if is_off(self.alpha):
            self.tokens.negative = 0
            return args, kwargs
        kwargs = dict(inspect.signature(transformer.forward).bind(*args, **kwargs).arguments)
        text = kwargs["encoder_hidden_states"]
        negative = match_batch("negative", self.negative.to(text), len(text))
        self.tokens.positive, self.tokens.negative = text.shape[1], negative.shape[1]
        kwargs["encoder_hidden_states"] = torch.cat([text, negative], dim=1)
        if kwargs.get("txt_ids") is not None:  # Flux: text has no position, all its ids are zero
            ids = kwargs["txt_ids"]
            kwargs["txt_ids"] = torch.cat([ids, ids.new_zeros(*ids.shape[:-2], negative.shape[1], ids.shape[-1])], -2)
        return (), kwargs

    def set_negative(self, negative: Tensor, mask: Tensor | None = None) -> None:
        if mask is not None:
            raise InputError("mask: allowed with joint attention: None")
        check_width(checked_negative(negative, None)[0], self.transformer.context_embedder.in_features)
        self.negative, self.mask = negative, None
