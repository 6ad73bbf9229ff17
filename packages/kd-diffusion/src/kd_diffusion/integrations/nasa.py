"""NASA, negative-away steer attention: negative prompts for one-step models (arXiv 2412.02687, 2024).

A one-step student has no guidance to put a negative prompt into. NASA subtracts, in every text cross-attention, what
the image would have read from the negative prompt. With image features Z, positive and negative text c_p and c_n:

    Q = Z W_q      K+ = c_p W_k   V+ = c_p W_v      K- = c_n W_k   V- = c_n W_v
    Z+ = softmax(Q K+^T / sqrt d) V+                Z- = softmax(Q K-^T / sqrt d) V-
    Z_nasa = Z+ - alpha Z-                          then the output projection, once

The layer's own projections make K- and V-, so there is no parameter, the batch is not doubled, and only the text side
costs anything. The subtraction is before the output projection: its bias is added once, not (1 - alpha) times.

Any network of diffusers with text cross-attention takes it (Stable Diffusion, SDXL, PixArt), inside any processor;
`nasa_pipeline.nasa_call` does for a whole pipeline what this does for a network:

    with nasa(unet, negative_embeds, alpha=0.2) as steered:       # in a loop of one's own, gradients included
        x = unet(x_t, t, encoder_hidden_states=embeds).sample
        steered.set_alpha(torch.rand(()))                         # for the next forward

Scales of the paper: alpha 0.1 (SD 1.5), 0.2 (SD 2.1), 0.5 (PixArt-alpha). Note that an empty negative prompt is not
"no negative prompt": Z- of the empty text is not zero. `None` or alpha = 0 leaves the model as it is.

For joint attention (SD3, Flux) see `kd_diffusion.integrations.nasa_joint`, which `nasa` uses by itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore.errors import InputError

Alpha = float | Tensor

# ---------------------------------------------------------------- the equation


def steer(z: Tensor, z_negative: Tensor, alpha: Alpha) -> Tensor:
    """Z+ - alpha Z-, both (B, N, D); alpha a float, a scalar tensor, or one value per sample (B,)."""
    if isinstance(alpha, Tensor):
        alpha = alpha.to(z)
        if alpha.ndim == 1:
            alpha = match_batch("alpha", alpha, len(z)).view(-1, 1, 1)
    return z - alpha * z_negative


def cross_attention(attn: nn.Module, query: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the projected queries (B, N, D) read from `text` (1 or B, L, D_text) in this layer, heads merged: (B, N, D).

    `mask` (1 or B, L) is True where a token counts. Keys and values are computed once for a text all samples share.
    """
    text = text.to(query)
    if attn.norm_cross is not None:
        text = attn.norm_encoder_hidden_states(text)
    if attn.fused_projections:
        key, value = attn.to_kv(text).chunk(2, dim=-1)
    else:
        key, value = attn.to_k(text), attn.to_v(text)
    query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    key, value = (match_batch("negative", x, len(query)) for x in (key, value))
    if mask is not None:
        mask = match_batch("mask", mask.to(query.device), len(query))[:, None, None, :]
    z = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scale)
    return z.transpose(1, 2).flatten(2)


def match_batch(field: str, x: Tensor, size: int) -> Tensor:
    """`x` for a network batch of `size`: one for all, one each, or one for each half of a guidance-doubled batch.

    Both halves get the subtraction: u - alpha n + kappa (c - u) keeps its strength whatever the guidance.
    """
    if len(x) == size:
        return x
    if len(x) == 1:
        return x.expand(size, *x.shape[1:])
    if 2 * len(x) == size:
        return torch.cat([x, x])
    raise InputError(f"{field}: a batch of {len(x)} for a network batch of {size}; allowed: 1 or one per sample")


# ---------------------------------------------------------------- the processor


class _Steered:
    """The attention layer as its processor sees it, except that the input of its output projection loses alpha Z-.

    A processor reads the layer's attributes and calls its projections. This view notes the queries as they pass and
    steps in at the output projection, so the processor itself (sdpa, sliced, xformers, IP-Adapter) is not repeated.
    """

    def __init__(self, attn: nn.Module, nasa: NasaAttnProcessor):
        self._attn, self._nasa = attn, nasa
        self._query: Tensor | None = None
        self.applied = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_q(self, hidden_states: Tensor) -> Tensor:
        self._query = self._attn.to_q(hidden_states)
        return self._query

    @property
    def to_out(self) -> list:
        return [self._project, *list(self._attn.to_out)[1:]]

    def _project(self, z: Tensor) -> Tensor:
        z_negative = cross_attention(self._attn, self._query, self._nasa.negative, self._nasa.mask)
        self.applied = True
        return self._attn.to_out[0](steer(z, z_negative, self._nasa.alpha))


class NasaAttnProcessor:
    """Attention processor of one text cross-attention layer: `processor`, with alpha Z- subtracted.

    negative: (1 or B, L, D) negative text as the layer gets it, i.e. after a projection the network applies to its
    text (PixArt's `caption_projection`); `nasa` does that. mask: (1 or B, L), nonzero for tokens that count. alpha: a
    float, a scalar tensor, or (B,). A float 0 is the untouched layer; a tensor is not looked at (no synchronisation,
    no recompilation, gradients). processor: what it wraps, the stock one by default. Without `encoder_hidden_states`
    (self-attention) it does nothing. `alpha`, `negative` and `mask` may be set between forwards, but with gradient
    checkpointing not between a forward and its backward. InputError on bad shapes.
    """

    def __init__(self, alpha: Alpha, negative: Tensor, mask: Tensor | None = None, processor: Any = None):
        if processor is None:
            from diffusers.models.attention_processor import AttnProcessor2_0

            processor = AttnProcessor2_0()
        self.processor = processor
        self.alpha = checked_alpha(alpha)
        self.negative, self.mask = checked_negative(negative, mask)

    @classmethod
    def around(cls, processor: Any, alpha: Alpha, negative: Tensor, mask: Tensor | None) -> NasaAttnProcessor:
        """The wrapper of `processor`; a module where that is one, since a layer's child must stay a module."""
        kind = _NasaModuleProcessor if isinstance(processor, nn.Module) else cls
        return kind(alpha, negative, mask, processor)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Tensor | None = None,
    ) -> Tensor:
        # diffusers drops what is not in this signature; processors do not all know the last two
        optional = {"temb": temb, "ip_adapter_masks": ip_adapter_masks}
        kwargs = {name: value for name, value in optional.items() if value is not None}
        kwargs |= {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        if encoder_hidden_states is None or is_off(self.alpha):
            return self.processor(attn, hidden_states, **kwargs)
        view = _Steered(attn, self)
        output = self.processor(view, hidden_states, **kwargs)
        if not view.applied:
            raise InputError(
                f"processor = {type(self.processor).__name__}: allowed: one that calls the layer's to_q and to_out"
            )
        return output


class _NasaModuleProcessor(NasaAttnProcessor, nn.Module):
    """The same around a processor with weights (IP-Adapter), which stay in the state dict under their own names."""

    def __init__(self, alpha: Alpha, negative: Tensor, mask: Tensor | None, processor: nn.Module):
        nn.Module.__init__(self)
        for kind in ("_parameters", "_buffers", "_modules"):
            object.__setattr__(self, kind, getattr(processor, kind))
        object.__setattr__(self, "processor", processor)  # nn.Module would make it a child with a prefix of its own
        self.alpha = checked_alpha(alpha)
        self.negative, self.mask = checked_negative(negative, mask)


def is_off(alpha: Alpha) -> bool:
    return not isinstance(alpha, Tensor) and alpha == 0


def checked_alpha(alpha: Alpha) -> Alpha:
    if isinstance(alpha, Tensor):
        if alpha.ndim > 1 or not alpha.is_floating_point():
            raise InputError(f"alpha: {alpha.dtype} of shape {tuple(alpha.shape)}; allowed: floating point, () or (B,)")
    elif isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (0 <= alpha < math.inf):
        raise InputError(f"alpha = {alpha!r}: allowed: a finite number of at least 0, or a tensor")
    return alpha


def checked_negative(negative: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The negative text and its mask as bool; a mask must leave at least one token in each row."""
    if not isinstance(negative, Tensor) or negative.ndim != 3 or 0 in negative.shape:
        given = tuple(negative.shape) if isinstance(negative, Tensor) else type(negative).__name__
        raise InputError(f"negative: {given}; allowed: a tensor (1 or B, L, D), not empty")
    if mask is None:
        return negative, None
    if mask.ndim != 2 or mask.shape[1] != negative.shape[1] or len(mask) not in (1, len(negative)):
        raise InputError(f"mask: shape {tuple(mask.shape)}; allowed: {tuple(negative.shape[:2])}")
    mask = mask.bool()
    if not mask.any(dim=1).all():
        raise InputError("mask: a row without a token that counts; allowed: at least one per row")
    return negative, mask


# ---------------------------------------------------------------- a whole network


class Nasa:
    """NASA on every text cross-attention of a network; made by `nasa`. Its `with` block installs and restores.

    `install` and `remove` do the same without a block. Nested blocks subtract several negatives, the innermost of
    which must be removed first.
    """

    def __init__(self, network: nn.Module, negative: Tensor, alpha: Alpha, mask: Tensor | None = None):
        self.network, self.alpha = network, checked_alpha(alpha)
        self.layers = self.find_layers(network)
        self._originals: list[Any] | None = None
        self.set_negative(negative, mask)

    @staticmethod
    def find_layers(network: nn.Module) -> list[nn.Module]:
        layers = [m for m in network.modules() if getattr(m, "is_cross_attention", False) and m.to_k is not None]
        return [layer for layer in layers if layer.added_kv_proj_dim is None]

    @property
    def processors(self) -> list[Any]:
        """The installed processors, in the order of the layers; empty when not installed."""
        return [] if self._originals is None else [layer.processor for layer in self.layers]

    def set_alpha(self, alpha: Alpha) -> None:
        """The scale of the next forward. A tensor changes value without recompiling a compiled network."""
        self.alpha = checked_alpha(alpha)
        for processor in self.processors:
            processor.alpha = self.alpha

    def set_negative(self, negative: Tensor, mask: Tensor | None = None) -> None:
        """The negative text (1 or B, L, D) of the next forward, as the network's `encoder_hidden_states`.

        A network's own projection of the text is applied here, once and with the weights of now: in training, set the
        negative at each step.
        """
        negative, self.mask = checked_negative(negative, mask)
        self.negative = self._projected(negative)
        for processor in self.processors:
            processor.negative, processor.mask = self.negative, self.mask

    def install(self) -> None:
        if self._originals is not None:
            raise InputError("nasa: already installed; allowed: one install per remove")
        self._originals = [layer.processor for layer in self.layers]
        for layer, processor in zip(self.layers, self._originals):
            layer.processor = NasaAttnProcessor.around(processor, self.alpha, self.negative, self.mask)

    def remove(self) -> None:
        for layer, processor in zip(self.layers, self._originals or []):
            layer.processor = processor
        self._originals = None

    def __enter__(self) -> Nasa:
        self.install()
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def _projected(self, negative: Tensor) -> Tensor:
        projection = _text_projection(self.network)
        if projection is not None:
            weight = next(projection.parameters())
            check_width(negative, _width(projection))
            # offloaded weights are on the meta device until the projection runs
            negative = projection(negative.to(dtype=weight.dtype, device=None if weight.is_meta else weight.device))
        for layer in self.layers:
            check_width(negative, layer.cross_attention_dim)
        return negative


def check_width(negative: Tensor, width: int) -> None:
    if negative.shape[-1] != width:
        raise InputError(f"negative: width {negative.shape[-1]}; allowed: {width}, the text width of this network")


def _width(projection: nn.Module) -> int:
    return next(m.in_features for m in projection.modules() if hasattr(m, "in_features"))


def _text_projection(network: nn.Module) -> nn.Module | None:
    """What the network applies to `encoder_hidden_states` before its blocks, or None. InputError where unknown."""
    for module in network.modules():
        if getattr(module, "caption_norm", None) is not None:
            raise InputError(f"network = {type(module).__name__}: allowed: UNets, PixArt, SD3 and Flux transformers")
        if getattr(module, "caption_projection", None) is not None:
            return module.caption_projection
        if getattr(module, "encoder_hid_proj", None) is not None:
            kind = module.config.encoder_hid_dim_type
            if kind == "text_proj":
                return module.encoder_hid_proj
            if kind == "ip_image_proj":  # the images' projection; the text's own has moved
                return getattr(module, "text_encoder_hid_proj", None)
            raise InputError(f"network: its text has the projection {kind!r}; allowed: 'text_proj', 'ip_image_proj'")
    return None


def nasa(pipe_or_network: Any, negative_embeds: Tensor, alpha: Alpha, mask: Tensor | None = None) -> Nasa:
    """Context manager: inside, the network subtracts alpha times what it reads from the negative text.

    pipe_or_network: a diffusers pipeline, its UNet or transformer, or a module around one (compiled, DDP, LoRA).
    negative_embeds (1 or B, L, D): as the network's `encoder_hidden_states`; B is the number of images, so repeat it
    for several images per prompt. mask (1 or B, L): where the text encoder has one (PixArt). alpha: see `steer`.
    The network's state dict keeps its keys. InputError: no text cross-attention, shapes, alpha.
    """
    network = network_of(pipe_or_network)
    layers = Nasa.find_layers(network)
    if layers:
        return Nasa(network, negative_embeds, alpha, mask)
    from kd_diffusion.integrations.nasa_joint import JointNasa

    if JointNasa.find_layers(network):
        return JointNasa(network, negative_embeds, alpha, mask)
    raise InputError(f"network = {type(network).__name__}: has no text attention; allowed: a text-conditioned network")


def network_of(pipe_or_network: Any) -> nn.Module:
    if isinstance(pipe_or_network, nn.Module):
        return pipe_or_network
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe_or_network, name, None), nn.Module):
            return getattr(pipe_or_network, name)
    raise InputError(f"pipe = {type(pipe_or_network).__name__}: allowed: a pipeline with a unet or transformer")
