"""Masked forward passes of timm's VisionTransformer: masks, gathered tokens, queries and keys, decoder, MAE."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from kd_classification.data import Batch
from kd_classification.engine import masked_vit as mv
from kd_classification.engine.mae import (
    DecoderConfig,
    MaskedAutoencoder,
    masked_square_error,
    normalised_patches,
    patchify,
)
from kd_classification.engine.param_groups import weight_decay_groups
from kd_classification.engine.probing import Alignment
from kdcore.errors import InputError

DECODER = DecoderConfig(width=16, depth=1, heads=2)


def tiny(seed=0, width=16, depth=4, channels=1, **args) -> VisionTransformer:
    torch.manual_seed(seed)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": width, "depth": depth, "num_heads": 2, **args}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=channels, **size).double()


def images(count=3, seed=1, channels=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, 16, 16, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(("ratio", "count"), [(0.75, 49), (0.95, 9), (0.98, 3), (0.0, 196), (0.6, 78)])
def test_visible_patches_of_196(ratio, count):
    assert mv.visible_count(196, ratio) == count


def test_a_float_product_that_falls_short_is_rounded_up_to_the_whole_number_it_stands_for():
    assert int(50 * (1 - 0.9)) == 4
    assert mv.visible_count(50, 0.9) == 5


@given(st.integers(1, 6), st.integers(2, 30), st.floats(0, 0.9))
def test_a_mask_hides_exactly_what_it_does_not_keep(batch, patches, ratio):
    if int(patches * (1 - ratio) + 1e-6) == 0:
        return
    mask = mv.draw_mask(batch, patches, ratio)
    assert mask.keep.shape == (batch, mv.visible_count(patches, ratio))
    assert (mask.hidden.sum(1) == patches - mask.keep.shape[1]).all()
    assert not mask.hidden.gather(1, mask.keep).any()


def test_every_patch_is_kept_alike_often():
    torch.manual_seed(0)
    kept = 1 - mv.draw_mask(20000, 16, 0.75).hidden.double().mean(0)
    torch.testing.assert_close(kept, torch.full_like(kept, 0.25), rtol=0, atol=5 * (0.25 * 0.75 / 20000) ** 0.5)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.99])
def test_a_ratio_that_leaves_nothing_is_refused(ratio):
    with pytest.raises(InputError, match=f"mask_ratio = {ratio}"):
        mv.draw_mask(2, 16, ratio)


# ---------------------------------------------------------------- the encoder


@pytest.mark.parametrize(
    "args",
    [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}, {"pre_norm": True}],
    ids=["class token", "registers", "mean pooling", "deit-3 positions", "clip"],
)
def test_without_a_mask_it_is_timms_own_forward_pass(args):
    vit = tiny(**args).eval()
    with torch.no_grad():
        expected = vit.forward_features(images())
        torch.testing.assert_close(vit.norm(mv.encode(vit, images()).tokens), expected, rtol=0, atol=0)
        order = torch.arange(16).expand(3, -1)
        torch.testing.assert_close(vit.norm(mv.encode(vit, images(), order).tokens), expected)


def test_a_masked_pass_is_a_pass_over_the_kept_tokens_with_their_positions():
    vit, x = tiny().eval(), images()
    keep = mv.draw_mask(3, 16, 0.75).keep
    by_hand = []
    for image, kept in zip(x, keep, strict=True):
        tokens = vit.patch_embed(image[None]) + vit.pos_embed[:, 1:]
        prefix = vit.cls_token + vit.pos_embed[:, :1]
        by_hand.append(vit.blocks(torch.cat([prefix, tokens[:, kept]], dim=1)))
    torch.testing.assert_close(mv.encode(vit, x, keep).tokens, torch.cat(by_hand))


def test_hidden_patches_do_not_reach_the_encoder():
    vit, x = tiny().eval(), images()
    mask = mv.draw_mask(3, 16, 0.75)
    noise = 1e3 * torch.randn_like(patchify(x, (4, 4)))
    other = patchify(x, (4, 4)) + noise * mask.hidden.unsqueeze(-1)
    other = other.view(3, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).reshape(3, 1, 16, 16)
    torch.testing.assert_close(mv.encode(vit, other, mask.keep).tokens, mv.encode(vit, x, mask.keep).tokens)


def test_features_are_those_after_the_block_and_a_shorter_pass_stops():
    vit, x = tiny().eval(), images()
    full = mv.encode(vit, x, features=[1, 3], queries_keys=[2])
    short = mv.encode(vit, x, features=[1], queries_keys=[2], blocks=2)
    assert set(full.features) == {1, 3}
    torch.testing.assert_close(full.features[3], full.tokens)
    torch.testing.assert_close(short.tokens, full.features[1])
    torch.testing.assert_close(short.queries_keys[2][1], full.queries_keys[2][1])
    vit.blocks[3].forward = vit.blocks[2].forward = None  # calling it would raise
    mv.encode(vit, x, features=[1], queries_keys=[2], blocks=2)


def test_patches_dropped_on_the_way_are_counted_among_those_that_are_left():
    vit, x = tiny().eval(), images(1)
    steps = {0: torch.tensor([[3, 5, 9, 12]]), 2: torch.tensor([[1, 2]])}
    dropped = mv.encode(vit, x, steps)
    first = mv.encode(vit, x, steps[0], blocks=2).tokens
    torch.testing.assert_close(dropped.tokens, vit.blocks[2:](first[:, [0, 2, 3]]))


def test_activation_checkpointing_changes_no_gradient():
    x, gradients = images(), []
    for checkpointing in (False, True):
        vit = tiny()
        vit.set_grad_checkpointing(checkpointing)
        vit.train()
        mv.encode(vit, x, features=[1]).features[1].square().mean().backward()
        gradients.append(vit.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("args", [{}, {"qk_norm": True}, {"qkv_bias": False}])
def test_queries_and_keys_give_the_blocks_own_attention(args):
    vit, x = tiny(**args).eval(), images()
    block, seen = vit.blocks[1], []
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    q, k = mv.encode(vit, x, queries_keys=[1]).queries_keys[1]
    torch.testing.assert_close((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1), seen[0])


# ---------------------------------------------------------------- decoder and pixels


def test_positions_of_mae():
    table = mv.sincos_positions(8, (2, 3), prefix=1)
    assert table.shape == (7, 8)
    assert (table[0] == 0).all()
    # patch (row 1, column 2): sine and cosine of 2 and 2 / 100, then of 1 and 1 / 100
    angles = torch.tensor([2.0, 0.02, 1.0, 0.01])
    expected = torch.cat([angles[:2].sin(), angles[:2].cos(), angles[2:].sin(), angles[2:].cos()])
    torch.testing.assert_close(table[1 + 3 + 2], expected)
    with pytest.raises(InputError, match="width = 6"):
        mv.sincos_positions(6, (2, 2))


def test_the_decoder_puts_tokens_back_in_place():
    torch.manual_seed(0)
    decoder = mv.MaskedDecoder(16, (4, 4), 5, width=8, depth=1, heads=2).double()
    encoded, keep = torch.randn(2, 1 + 3, 16, dtype=torch.float64), torch.tensor([[9, 2, 4], [0, 1, 15]])
    seen = []
    decoder.blocks.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0] - decoder.positions))
    assert decoder(encoded, keep).shape == (2, 16, 5)
    inside, embedded = seen[0], decoder.embed(encoded)
    torch.testing.assert_close(inside[:, :1], embedded[:, :1])
    torch.testing.assert_close(mv.gather_tokens(inside[:, 1:], keep), embedded[:, 1:])
    hidden = mv.mask_of(keep, 16).hidden
    torch.testing.assert_close(inside[:, 1:][hidden], decoder.mask_token[0].expand(26, -1))
    with pytest.raises(InputError, match="width = 8: not divisible by decoder"):
        mv.MaskedDecoder(16, (4, 4), 5, width=8, heads=3)


def test_patches_are_rows_columns_channels():
    x = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    patches = patchify(x, (2, 3))
    assert patches.shape == (1, 4, 12)
    # second patch: rows 0 and 1, columns 3 to 5, both channels of a pixel side by side
    expected = [x[0, channel, row, column] for row in (0, 1) for column in (3, 4, 5) for channel in (0, 1)]
    assert patches[0, 1].tolist() == [value.item() for value in expected]


def test_pixel_loss_by_hand_and_its_gradient_on_visible_patches():
    prediction = torch.tensor([[[0.0, 1], [2, 2], [1, 0]]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[[1.0, 1], [0, 4], [1, 3]]], dtype=torch.float64)
    loss = masked_square_error(prediction, target, torch.tensor([[False, True, True]]))
    assert loss.item() == pytest.approx(4.25)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert (gradient[0, 0] == 0).all()
    assert (gradient[0, 1] != 0).all()


def test_normalised_patch_divides_by_the_unbiased_deviation():
    found = normalised_patches(torch.tensor([1.0, 2, 3, 6], dtype=torch.float64))
    assert found.tolist() == pytest.approx([-0.92582, -0.46291, 0, 1.38873], abs=1e-5)


def test_masked_autoencoder_trains_all_but_the_positions():
    vit = mv.initialise_encoder(tiny())
    model = MaskedAutoencoder(vit, mask_ratio=0.5, norm_pix=True, decoder=DECODER).double()
    assert torch.equal(vit.pos_embed.data[0], mv.sincos_positions(16, (4, 4), prefix=1).double())
    model.loss(Batch(images(), torch.zeros(3), torch.arange(3))).total().backward()
    unmoved = [name for name, p in model.named_parameters() if p.grad is None]
    assert unmoved == ["student.pos_embed"]
    groups = model.players()[0].param_groups
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert groups[1]["weight_decay"] == 0
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 1
    assert [group for group in weight_decay_groups(torch.nn.LayerNorm(3)) if "weight_decay" not in group] == []


# ---------------------------------------------------------------- checks and the fit


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: timm.create_model("resnet18"), "teacher: ResNet has no token sequence"),
        (lambda: tiny(dynamic_img_size=True), "teacher.args.dynamic_img_size"),
    ],
)
def test_networks_that_cannot_be_masked_are_named(network, message):
    with pytest.raises(InputError, match=message):
        mv.check_vit(network(), "teacher")


def test_other_grids_and_blocks_are_named():
    with pytest.raises(InputError, match="teacher: 8x8 patches, student has 4x4"):
        mv.check_same_grid({"student": tiny(), "teacher": tiny(patch_size=2)})
    with pytest.raises(InputError, match="student_blocks: block 4; allowed: 0 to 3"):
        mv.check_blocks([1, 4], tiny(), "student_blocks")
    parallel = timm.create_model("vit_small_patch16_18x2_224", img_size=16, patch_size=4, depth=1)
    mv.check_vit(parallel, "teacher")
    with pytest.raises(InputError, match="teacher: its blocks are not timm's Block"):
        mv.check_vit(parallel, "teacher", attention=True)


def test_the_block_at_three_quarters_of_the_depth():
    assert [mv.block_at(0.75, depth) for depth in (12, 24, 4, 8)] == [8, 17, 2, 5]


def test_alignment_is_one_for_a_linear_map_and_none_for_noise():
    torch.manual_seed(0)
    source, held_out = torch.randn(400, 5, dtype=torch.float64), torch.randn(300, 5, dtype=torch.float64)
    weight, offset = torch.randn(5, 7, dtype=torch.float64), 10 * torch.randn(7, dtype=torch.float64)
    exact, noise = Alignment(), Alignment()
    exact.fit(source, source @ weight + offset)
    exact.measure(held_out, held_out @ weight + offset)
    assert exact.cosine() == pytest.approx(1)
    noise.fit(source, torch.randn(400, 7, dtype=torch.float64) + offset)
    noise.measure(held_out, torch.randn(300, 7, dtype=torch.float64) + offset)
    assert abs(noise.cosine()) < 0.1
