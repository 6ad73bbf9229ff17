"""Masked forward passes of timm's VisionTransformer: one draw of visible patches for every network that sees the image.

    mask = draw_mask(len(images), 196, 0.75)
    seen = encode(student, images, mask.keep, features=[8])          # seen.features[8] (B, 1 + 49, 768)
    with torch.no_grad():
        known = encode(teacher, images, mask.keep, features=[17], blocks=18)         # stops after block 17

A network's own pieces do the work (patch_embed, positions, blocks), so any timm ViT takes part unchanged. Prefix tokens
(class, distillation, registers) are never masked and come first. L is the number of patches, K of visible ones, T of
prefix tokens. timm's PatchDropout is left out: its draw would be each network's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kd_classification.models import Adapted
from kdcore.errors import InputError

# ---------------------------------------------------------------- masks and tokens


class Mask(NamedTuple):
    """keep (B, K) int64: visible patches, in the order the encoders see them. hidden (B, L) bool: the others."""

    keep: Tensor
    hidden: Tensor


def floor_share(share: float, count: int) -> int:
    """The largest whole number not above share * count, where a float product such as 0.1 * 50 may fall short of it."""
    return int(share * count + 1e-6)


def visible_count(patches: int, ratio: float, *, field: str = "mask_ratio") -> int:
    """K = floor(L (1 - r)), as MAE's code counts; InputError unless 0 <= r < 1 leaves at least one patch.

    >>> [visible_count(196, ratio) for ratio in (0.75, 0.95, 0.98)]
    [49, 9, 3]
    """
    if not 0 <= ratio < 1:
        raise InputError(f"{field} = {ratio}: must be at least 0 and below 1")
    count = floor_share(1 - ratio, patches)
    if count == 0:
        raise InputError(f"{field} = {ratio}: leaves none of the {patches} patches visible")
    return count


def draw_mask(batch: int, patches: int, ratio: float, *, device: torch.device | str | None = None) -> Mask:
    """K patches of each image at random, alike likely and without replacement; from torch's global generator."""
    order = torch.rand(batch, patches, device=device).argsort(dim=1)
    return mask_of(order[:, : visible_count(patches, ratio)], patches)


def mask_of(keep: Tensor, patches: int) -> Mask:
    """The mask in which the patches `keep` (B, K) are visible."""
    hidden = torch.ones(len(keep), patches, dtype=torch.bool, device=keep.device)
    return Mask(keep, hidden.scatter_(1, keep, False))


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, N, D), index (B, K) -> (B, K, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def keep_patches(tokens: Tensor, keep: Tensor, prefix: int) -> Tensor:
    """tokens (B, T + N, D) -> (B, T + K, D): the prefix and the patches `keep`, which count from 0 after the prefix."""
    return torch.cat([tokens[:, :prefix], gather_tokens(tokens[:, prefix:], keep)], dim=1)


# ---------------------------------------------------------------- the encoder


class Encoding(NamedTuple):
    """tokens (B, T + K, D): the residual stream after the last block that ran, before the final norm.

    features: block index (from 0) -> residual stream after it. queries_keys: block index -> its queries and keys
    (B, H, T + K, D / H) each.
    """

    tokens: Tensor
    features: dict[int, Tensor]
    queries_keys: dict[int, tuple[Tensor, Tensor]]


def encode(
    vit: nn.Module, images: Tensor, keep: Tensor | Mapping[int, Tensor] | None = None, **options: Any
) -> Encoding:
    """`embed` and `run_blocks`, which has the options."""
    return run_blocks(vit, embed(vit, images), keep, **options)


def embed(vit: nn.Module, images: Tensor) -> Tensor:
    """images (B, C, H, W) -> (B, T + L, D): every patch with its position, behind the prefix tokens."""
    vit = cast(Any, vit)
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))


def run_blocks(
    vit: nn.Module,
    tokens: Tensor,
    keep: Tensor | Mapping[int, Tensor] | None = None,
    *,
    features: Iterable[int] = (),
    queries_keys: Iterable[int] = (),
    blocks: int | None = None,
) -> Encoding:
    """Runs embedded tokens (B, T + L, D) through the first `blocks` blocks (None: all).

    keep (B, K): the patches that enter block 0. A mapping drops patches on the way: block index -> patches kept before
    that block, counted among those that are still there. `features` and `queries_keys`: blocks to record.
    """
    vit = cast(Any, vit)
    features, queries_keys = set(features), set(queries_keys)
    steps = keep if isinstance(keep, Mapping) else {} if keep is None else {0: keep}
    stop = len(vit.blocks) if blocks is None else blocks
    found, projected = {}, {}
    for index in range(max(stop, max(queries_keys, default=-1) + 1)):
        block = vit.blocks[index]
        if index in steps:
            tokens = keep_patches(tokens, steps[index], vit.num_prefix_tokens)
        if index in queries_keys:
            projected[index] = query_key(block, tokens)
        if index >= stop:
            continue  # nothing but the queries and keys of this block is wanted
        if vit.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, use_reentrant=False)
        else:
            tokens = block(tokens)
        if index in features:
            found[index] = tokens
    return Encoding(tokens, found, projected)


def query_key(block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, N, D / H) that a timm Block computes from its input tokens (B, N, D)."""
    block = cast(Any, block)
    attention, width = block.attn, 2 * block.attn.attn_dim  # the first two thirds of the joint projection
    bias = None if attention.qkv.bias is None else attention.qkv.bias[:width]
    both = F.linear(block.norm1(tokens), attention.qkv.weight[:width], bias)
    both = both.unflatten(-1, (2, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(both[0]), attention.k_norm(both[1])


def final_norm(vit: nn.Module, tokens: Tensor) -> Tensor:
    """The network's last normalisation, token by token: timm keeps it in `norm`, or in `fc_norm` with mean pooling."""
    vit = cast(Any, vit)
    return vit.fc_norm(vit.norm(tokens))


# ---------------------------------------------------------------- the decoder


def sincos_positions(width: int, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """(prefix + rows * columns, width) sine-cosine positions: half the width for the column, half for the row.

    Prefix tokens get zeros. Frequencies 10000^(-4 i / width). As in MAE (arXiv 2111.06377).
    """
    if width % 4:
        raise InputError(f"width = {width}: sine-cosine positions in two dimensions need a multiple of 4")
    rates = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    parts = []
    for place in (columns, rows):
        angle = place.reshape(-1, 1) * rates
        parts += [angle.sin(), angle.cos()]
    table = torch.cat(parts, dim=1)
    return torch.cat([table.new_zeros(prefix, width), table]).float()


class MaskedDecoder(nn.Module):
    """MAE's decoder: Linear to its width, a mask token at every hidden patch, positions, blocks, norm, Linear.

    Encoded tokens (B, T + K, D) and keep (B, K) -> predictions (B, L, outputs) for every patch, in the image's order.
    """

    def __init__(
        self,
        encoder_width: int,
        grid: tuple[int, int],
        outputs: int,
        *,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
        prefix: int = 1,
    ):
        super().__init__()
        from timm.layers import LayerNorm
        from timm.models.vision_transformer import Block

        if width % heads:
            raise InputError(f"decoder.width = {width}: not divisible by decoder.heads = {heads}")
        self.patches, self.prefix = grid[0] * grid[1], prefix
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_positions(width, grid, prefix), persistent=False)
        self.blocks = nn.Sequential(*[Block(width, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)])
        self.norm = LayerNorm(width)
        self.predict = nn.Linear(width, outputs)
        initialise_linear(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, keep: Tensor) -> Tensor:
        tokens = self.embed(encoded)
        prefix, visible = tokens[:, : self.prefix], tokens[:, self.prefix :]
        patches = self.mask_token.to(tokens.dtype).expand(len(tokens), self.patches, -1)
        patches = patches.scatter(1, keep.unsqueeze(-1).expand_as(visible), visible)
        tokens = torch.cat([prefix, patches], dim=1) + self.positions
        return self.predict(self.norm(self.blocks(tokens))[:, self.prefix :])


# ---------------------------------------------------------------- initialisation and checks


def initialise_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear of `module`, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def initialise_encoder(vit: nn.Module) -> nn.Module:
    """MAE's initialisation of an encoder that starts at random, in place: Xavier weights, sine-cosine positions."""
    vit = cast(Any, vit)
    initialise_linear(vit)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.detach().flatten(1))
    for name in ("cls_token", "reg_token", "dist_token"):
        if getattr(vit, name, None) is not None:
            nn.init.normal_(getattr(vit, name), std=0.02)
    if vit.pos_embed is not None:
        prefix = vit.pos_embed.shape[1] - vit.patch_embed.num_patches
        with torch.no_grad():
            vit.pos_embed.copy_(sincos_positions(vit.embed_dim, vit.patch_embed.grid_size, prefix))
    return vit


def fix_positions(vit: nn.Module) -> nn.Module:
    """Positions are no parameter of masked pre-training; the saved network has them as it always has. In place."""
    if cast(Any, vit).pos_embed is not None:
        cast(Any, vit).pos_embed.requires_grad_(False)
    return vit


def inner_vit(network: nn.Module) -> nn.Module:
    """The VisionTransformer itself, where it stands behind another normalisation or size."""
    return network.model if isinstance(network, Adapted) else network


def own_images(network: nn.Module, images: Tensor) -> Tensor:
    """The images as `inner_vit(network)` wants them."""
    return network.adapt(images) if isinstance(network, Adapted) else images


def check_vit(network: nn.Module, field: str, *, attention: bool = False) -> None:
    """InputError unless the network is timm's VisionTransformer (with its ordinary attention, where queries count)."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    vit = inner_vit(network)
    if not isinstance(vit, VisionTransformer):
        raise InputError(f"{field}: {type(vit).__name__} has no token sequence to mask; give a timm VisionTransformer")
    if vit.dynamic_img_size:
        raise InputError(f"{field}.args.dynamic_img_size: masks are for one grid of patches; leave it out")
    plain = all(type(block) is Block and type(block.attn) is Attention for block in vit.blocks)
    if attention and not plain:
        raise InputError(
            f"{field}: its blocks are not timm's Block with Attention, whose queries and keys are compared"
        )


def check_same_grid(networks: Mapping[str, nn.Module]) -> tuple[int, int]:
    """(rows, columns) of the patches of all networks; InputError where they differ, because one mask serves all."""
    grids = {field: tuple(cast(Any, inner_vit(network)).patch_embed.grid_size) for field, network in networks.items()}
    (first, grid), *others = grids.items()
    for field, other in others:
        if other != grid:
            raise InputError(
                f"{field}: {other[0]}x{other[1]} patches, {first} has {grid[0]}x{grid[1]}; one mask serves both"
            )
    return grid


def check_blocks(blocks: Collection[int], vit: nn.Module, field: str) -> None:
    """InputError unless every index names a block of the network."""
    depth = len(cast(Any, inner_vit(vit)).blocks)
    for block in blocks:
        if not 0 <= block < depth:
            raise InputError(f"{field}: block {block}; allowed: 0 to {depth - 1}")


def block_at(share: float, depth: int) -> int:
    """Index (from 0) of the block that ends at `share` of the depth: 3/4 of 12 blocks is block 8, of 24 block 17."""
    return max(0, math.floor(share * depth + 0.5) - 1)
