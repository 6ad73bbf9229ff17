"""Denoiser on every diffusers network, the discriminator's hosts, and whose parameters learn in whose turn."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_diffusion.engine.adversarial import ConvHead, Discriminator, GANConfig, middle_features, with_middle
from kd_diffusion.engine.conditions import concat, take, where
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.distillation import Networks, ScoreArgs, ScoreDistiller
from kd_diffusion.engine.process import EDM, VP, Flow, expand, from_x0, to_x0
from kd_diffusion.integrations.conditioners import ClassConditioner, NoConditioner
from kdcore.config import RunConfig, TrainConfig
from kdcore.data import seeded_loader
from kdcore.errors import InputError
from kdcore.stages import RunContext
from kdcore.training import Loop, TrainSetup, make_accelerator

TABLE = VP(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
B = 2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(pooled=None, mask=False, time_ids=False):
    found = {"prompt_embeds": normal(B, 5, 16, seed=7)}
    if pooled:
        found["pooled_embeds"] = normal(B, pooled, seed=8)
    if mask:
        found["prompt_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    if time_ids:
        found["time_ids"] = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(B, -1)
    return found


UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
}


def unet():
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = UNet2DModel(in_channels=1, out_channels=1, num_class_embeds=4, **UNET, **blocks)
    return network, EDM(), "edm", 1, {"class_labels": torch.tensor([1, 2])}


def unet_condition():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(in_channels=4, out_channels=4, **UNET, **BLOCKS), TABLE, "epsilon", 4, text()


def unet_xl():
    from diffusers import UNet2DConditionModel

    extra = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    }
    network = UNet2DConditionModel(in_channels=4, out_channels=4, **UNET, **BLOCKS, **extra)
    return network, TABLE, "v_prediction", 4, text(pooled=12, time_ids=True)


def dit():
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        norm_num_groups=4,
        sample_size=8,
        num_embeds_ada_norm=3,
    )
    return network, TABLE, "epsilon", 4, {"class_labels": torch.tensor([1, 2])}


def pixart():
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        norm_num_groups=4,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return network, TABLE, "epsilon", 4, text(mask=True)


def sd3():
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
    )
    return network, Flow(3.0), "flow_prediction", 4, text(pooled=12)


def flux(guidance_embeds=True):
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    return network, Flow(), "flow_prediction", 4, text(pooled=12)


KINDS = [unet, unet_condition, unet_xl, dit, pixart, sd3, flux]


def randomise(network):
    """Many layers start at zero; with random weights the output depends on everything that is put in."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def world(request):
    network, process, kind, channels, condition = request.param()
    denoiser = Denoiser(randomise(network), process, kind)
    t = process.at(torch.tensor([300, 800]))
    return SimpleNamespace(
        denoiser=denoiser, process=process, kind=kind, t=t, condition=condition, x_t=normal(B, channels, 8, 8)
    )


def null_of(condition):
    return {
        name: 0 * value if name != "time_ids" and name != "prompt_mask" else value for name, value in condition.items()
    }


# ---------------------------------------------------------------- Denoiser


def test_prediction_has_the_samples_shape_and_depends_on_every_input(world):
    denoiser, x_t, t, condition = world.denoiser, world.x_t, world.t, world.condition
    x = denoiser(x_t, t, condition)
    assert x.shape == x_t.shape
    assert x.dtype == x_t.dtype
    assert bool(x.isfinite().all())
    assert not torch.allclose(denoiser(x_t, world.process.at(torch.tensor([301, 700])), condition), x, atol=1e-5)
    for name, value in condition.items():
        changed = value.roll(1, -1) if name == "prompt_mask" else value.flip(0) + (value.is_floating_point())
        other = denoiser(x_t, t, {**condition, name: changed})
        assert not torch.allclose(other, x, atol=1e-6), name


def test_samples_of_a_batch_do_not_meet(world):
    whole = world.denoiser(world.x_t, world.t, world.condition)
    for row in range(B):
        rows = slice(row, row + 1)
        alone = world.denoiser(world.x_t[rows], world.t[rows], take(world.condition, rows))
        torch.testing.assert_close(alone, whole[rows], rtol=1e-4, atol=1e-4)


def test_gradient_reaches_the_input(world):
    x_t = world.x_t.clone().requires_grad_()
    weights = normal(*x_t.shape, seed=3)
    (gradient,) = torch.autograd.grad((world.denoiser(x_t, world.t, world.condition) * weights).sum(), x_t)
    direction, step = normal(*x_t.shape, seed=4), 1e-2
    with torch.no_grad():
        ends = [
            (world.denoiser(x_t + sign * step * direction, world.t, world.condition).double() * weights).sum()
            for sign in (1, -1)
        ]
    slope = float(ends[0] - ends[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02, abs=0.02)


def test_output_is_the_networks_own_prediction(world):
    output = world.denoiser.output(world.x_t, world.t, world.condition)
    x = world.denoiser(world.x_t, world.t, world.condition)
    torch.testing.assert_close(x, to_x0(world.process, world.kind, output, world.x_t, world.t))
    torch.testing.assert_close(from_x0(world.process, world.kind, x, world.x_t, world.t), output, rtol=1e-3, atol=1e-3)


def test_guidance_goes_from_the_unconditional_through_the_conditional_prediction(world):
    denoiser, x_t, t, condition = world.denoiser, world.x_t, world.t, world.condition
    null = null_of(condition)
    u, c = denoiser(x_t, t, null), denoiser(x_t, t, condition)
    calls = []
    handle = denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    try:
        torch.testing.assert_close(denoiser.guided(x_t, t, condition, null, 1.0), c)
        torch.testing.assert_close(denoiser.guided(x_t, t, condition, null, 0.0), u)
        assert len(calls) == 2
        for kappa in (4.5, -1.5):
            found = denoiser.guided(x_t, t, condition, null, kappa)
            torch.testing.assert_close(found, u + kappa * (c - u), rtol=1e-3, atol=2e-3)
        assert len(calls) == 4
        scales = torch.tensor([7.5, 1.0])
        found = denoiser.guided(x_t, t, condition, null, scales)
        torch.testing.assert_close(found, u + expand(scales, u) * (c - u), rtol=1e-3, atol=2e-3)
    finally:
        handle.remove()


@torch.no_grad()
def test_networks_keep_their_own_dtype_behind_a_float32_interface(world):
    low = Denoiser(copy.deepcopy(world.denoiser.network).bfloat16(), world.process, world.kind)
    x = low(world.x_t, world.t, world.condition)
    assert x.dtype == torch.float32
    exact = world.denoiser(world.x_t, world.t, world.condition)
    assert float((x - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("kind", [dit, pixart])
def test_learned_variance_is_cut_off(kind):
    network, process, name, channels, condition = kind()
    denoiser = Denoiser(randomise(network), process, name)
    kept = []
    network.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    output = denoiser.output(normal(B, channels, 8, 8), process.at(torch.tensor([3, 900])), condition)
    assert kept[0].shape == (B, 2 * channels, 8, 8)
    assert torch.equal(output, kept[0][:, :channels])


def test_edm_networks_see_scaled_samples_and_the_logarithm_of_the_noise_level():
    network, process, name, _, condition = unet()
    randomise(network)
    x_t, s = normal(B, 1, 8, 8), torch.tensor([0.5, 3.0])
    scale = (s**2 + 0.25).rsqrt().reshape(-1, 1, 1, 1)
    by_hand = network(scale * x_t, 250 * s.log(), condition["class_labels"]).sample
    torch.testing.assert_close(Denoiser(network, process, name).output(x_t, s, condition), by_hand)


def test_dit_does_not_drop_labels_in_training_mode():
    network, process, name, channels, condition = dit()
    denoiser = Denoiser(randomise(network), process, name)
    x_t, t = normal(B, channels, 8, 8).requires_grad_(), process.at(torch.tensor([3, 900]))
    expected = denoiser(x_t, t, condition)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x_t)
    denoiser.train()
    network.enable_gradient_checkpointing()  # activations are computed a second time, in the backward pass
    for _ in range(20):
        x = denoiser(x_t, t, condition)
        assert torch.equal(x, expected)
        torch.testing.assert_close(torch.autograd.grad(x.square().sum(), x_t)[0], gradient)


def test_flux_reads_tokens_as_its_pipeline_packs_them():
    from diffusers import FluxPipeline

    network, process, name, channels, condition = flux(guidance_embeds=False)
    randomise(network)
    x_t, t = normal(B, channels, 8, 4), torch.tensor([0.3, 0.9])
    tokens = FluxPipeline._pack_latents(x_t, B, channels, 8, 4)
    ids = FluxPipeline._prepare_latent_image_ids(B, 4, 2, "cpu", torch.float32)
    output = network(
        hidden_states=tokens,
        encoder_hidden_states=condition["prompt_embeds"],
        pooled_projections=condition["pooled_embeds"],
        timestep=t,
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
    ).sample
    expected = FluxPipeline._unpack_latents(output, 64, 32, 8)
    found = Denoiser(network, process, name).output(x_t, t, condition)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_unknown_networks_are_refused():
    with pytest.raises(InputError, match="network Linear: not known how to call it"):
        Denoiser(nn.Linear(2, 2), TABLE, "epsilon")


def test_conditions_are_taken_joined_and_mixed_by_sample():
    first, second = {"a": torch.arange(4).reshape(2, 2)}, {"a": 10 + torch.arange(4).reshape(2, 2)}
    assert take(first, torch.tensor([1]))["a"].tolist() == [[2, 3]]
    assert concat(first, second)["a"].tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert where(torch.tensor([True, False]), first, second)["a"].tolist() == [[0, 1], [12, 13]]
    assert concat({}, {}) == {}
    with pytest.raises(ValueError, match=r"\['a'\] and \[\]"):
        concat(first, {})


# ---------------------------------------------------------------- the discriminator


def test_middle_features_are_a_map_and_come_with_the_prediction(world):
    mu, features = with_middle(world.denoiser, world.x_t, world.t, world.condition)
    torch.testing.assert_close(mu, world.denoiser(world.x_t, world.t, world.condition))
    assert features.ndim == 4
    assert len(features) == B
    assert features.shape[2] == features.shape[3]
    assert torch.equal(middle_features(world.denoiser, world.x_t, world.t, world.condition), features)


def test_nothing_behind_the_middle_runs_for_its_features(world):
    modules = [m for m in world.denoiser.network.modules() if not list(m.children())]
    with_middle(world.denoiser, world.x_t, world.t, world.condition)
    ran = []
    handles = [m.register_forward_hook(lambda module, args, output: ran.append(module)) for m in modules]
    middle_features(world.denoiser, world.x_t, world.t, world.condition)
    part = len(ran)
    world.denoiser(world.x_t, world.t, world.condition)
    for handle in handles:
        handle.remove()
    assert 0 < part < len(ran) - part
    assert ran[part : 2 * part] == ran[:part]  # the whole pass starts with the same modules


def test_middle_features_have_the_same_gradient_with_recomputed_activations(world):
    network = world.denoiser.network.train()
    gradients = []
    for _ in range(2):
        x_t = world.x_t.clone().requires_grad_()
        middle_features(world.denoiser, x_t, world.t, world.condition).square().sum().backward()
        gradients.append(x_t.grad)
        network.enable_gradient_checkpointing()
    torch.testing.assert_close(*gradients)


def test_tokens_become_a_map_row_by_row():
    network, process, name, channels, condition = dit()
    denoiser = Denoiser(randomise(network), process, name)
    kept = []
    denoiser.middle.register_forward_hook(lambda module, args, output: kept.append(output))
    features = middle_features(denoiser, normal(B, channels, 8, 8), process.at(torch.tensor([3, 900])), condition)
    assert features.shape == (B, 16, 4, 4)
    assert torch.equal(features[:, :, 2, 1], kept[0][:, 2 * 4 + 1])


@pytest.mark.parametrize("host", ["fake_trunk", "teacher_features", "channel_mean", "own_trunk"])
def test_hosts_train_exactly_what_they_should(world, host):
    fake, teacher = world.denoiser, Denoiser(world.denoiser.network, world.process, world.kind)
    fake = Denoiser(copy.deepcopy(world.denoiser.network), world.process, world.kind).requires_grad_(True)
    teacher = copy.deepcopy(fake).requires_grad_(False)
    one = take(world.condition, slice(0, 1))
    discriminator = Discriminator(host, fake, teacher, shape=tuple(world.x_t.shape[1:]), condition=one)
    x_t = world.x_t.clone().requires_grad_()
    logits = discriminator(x_t, world.t, world.condition)
    assert logits.shape[0] == B
    assert logits.ndim == 2
    assert logits.dtype == torch.float32
    nn.functional.softplus(-logits).mean().backward()
    assert bool(x_t.grad.abs().sum() > 0)  # the generator's way through the discriminator

    learns = lambda module: any(p.grad is not None for p in module.parameters())  # noqa: E731
    assert not learns(teacher)
    assert learns(fake) == (host in ("fake_trunk", "channel_mean"))
    if host == "channel_mean":
        assert list(discriminator.parameters()) == []
        assert logits.shape[1] == middle_features(fake, world.x_t, world.t, world.condition)[0, 0].numel()
    else:
        assert all(p.grad is not None for p in discriminator.head.parameters())
    if host == "own_trunk":
        assert learns(discriminator.trunk)
        assert {id(p) for p in discriminator.parameters()}.isdisjoint(map(id, fake.parameters()))


@pytest.mark.parametrize(("size", "logits"), [(1, 1), (2, 1), (4, 1), (5, 1), (7, 1), (8, 1), (16, 1)])
def test_head_reduces_a_map_to_one_logit(size, logits):
    head = ConvHead(8, size)
    assert head(normal(B, 8, size, size)).shape == (B, logits)


# ---------------------------------------------------------------- turns


class Spread(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": normal(1, 8, 8, seed=index), "class_labels": index % 3}


def distiller(*, host="fake_trunk", same=False, **args):
    network, process, name, _, _ = unet()
    teacher = Denoiser(randomise(network), process, name)
    fake, generator = copy.deepcopy(teacher), copy.deepcopy(teacher)
    if not same:
        with torch.no_grad():
            for parameter in fake.parameters():
                parameter.mul_(1.05)
    gan = None if host is None else GANConfig(host=host, weight_generator=0.1)
    networks = Networks(teacher, fake, generator, ClassConditioner(3, 3), SimpleNamespace(shape=(1, 8, 8)))
    return ScoreDistiller(networks, ScoreArgs(gan=gan, fake_updates=2, **args), seed=3)


@pytest.mark.parametrize("host", [None, "fake_trunk", "teacher_features", "channel_mean", "own_trunk"])
def test_only_the_player_whose_turn_it_is_collects_gradients(host, tmp_path):
    """In the real loop, looked at before each optimiser steps."""
    score = distiller(host=host)
    config = TrainConfig.model_validate({"steps": 4, "batch_size": 4, "optimizer": {"name": "sgd", "lr": 1e-4}})
    context = RunContext(RunConfig(method="none", train=config), tmp_path, make_accelerator(config), quiet=True)
    loop = Loop("student", context, TrainSetup(score, seeded_loader(Spread(), 4, seed=0)), config)
    others = {
        "generator": [score.fake, score.real_score, score.discriminator or nn.Identity()],
        "fake": [score.student, score.real_score],
    }
    seen = []

    def look(name, own):
        def hook(optimizer, *_):
            seen.append((score.progress.step, name))
            assert all(p.grad is None for module in others[name] for p in module.parameters())
            assert any(p.grad is not None for p in own)

        return hook

    for turn in loop.turns:
        inner = getattr(turn.optimizer, "optimizer", turn.optimizer)
        inner.register_step_pre_hook(look(turn.player.name, turn.parameters))
    loop.fit()
    assert seen == [
        (0, "generator"), (0, "fake"), (1, "fake"), (2, "generator"), (2, "fake"), (3, "fake"),
    ]  # fmt: skip


def test_distribution_matching_alone_needs_no_freezing():
    score = distiller(host=None)
    batch = {"x": normal(4, 1, 8, 8), "class_labels": torch.tensor([0, 1, 2, 0])}
    score.loss(batch, "generator").total().backward()
    assert all(p.grad is None for p in (*score.fake.parameters(), *score.real_score.parameters()))
    assert any(p.grad is not None for p in score.student.parameters())
    score.zero_grad()
    score.loss(batch, "fake").total().backward()
    assert all(p.grad is None for p in (*score.student.parameters(), *score.real_score.parameters()))
    assert any(p.grad is not None for p in score.fake.parameters())


@pytest.mark.parametrize("kappa", [1.0, 4.5])
def test_a_fake_that_equals_the_teacher_leaves_the_generator_alone(kappa):
    score = distiller(host=None, same=True, guidance_scale=kappa, fake_guidance_scale=kappa)
    terms = score.loss({"x": normal(4, 1, 8, 8), "class_labels": torch.tensor([0, 1, 2, 0])}, "generator")
    assert terms.total().item() == 0
    terms.total().backward()
    assert not any(bool(p.grad.any()) for p in score.student.parameters() if p.grad is not None)


def test_the_fake_learns_from_the_samples_of_the_generators_turn():
    score = distiller(host=None)
    batch = {"x": normal(4, 1, 8, 8), "class_labels": torch.tensor([0, 1, 2, 0])}
    seen = []
    score.fake_terms = lambda sample, batch, draw: seen.append(sample)
    generator_terms, kept = score.generator_terms, []
    score.generator_terms = lambda sample, batch, draw: kept.append(sample) or generator_terms(sample, batch, draw)
    score.loss(batch, "generator")
    score.loss(batch, "fake")
    assert torch.equal(seen[0].x, kept[0].x)
    assert not seen[0].x.requires_grad
    score.progress.step = 1
    score.loss(batch, "fake")  # an iteration of the fake alone has samples of its own
    assert not torch.equal(seen[1].x, kept[0].x)


@pytest.mark.parametrize("host", ["fake_trunk", "channel_mean"])
def test_the_batch_of_two_ranks_gives_the_gradient_of_one(host, monkeypatch):
    batch = {"x": normal(4, 1, 8, 8), "class_labels": torch.tensor([0, 1, 2, 0])}

    def gradients(rank, world, player):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: world > 1)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: world)
        torch.manual_seed(0)  # of the discriminator's head
        score = distiller(host=host, steps=2)
        score.progress.step = 2
        own = {name: value.chunk(world)[rank] for name, value in batch.items()}
        score.loss(own, player).total().backward()
        module = score.student if player == "generator" else score.fake
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    for player in ("generator", "fake"):
        whole = gradients(0, 1, player)
        average = (gradients(0, 2, player) + gradients(1, 2, player)) / 2
        torch.testing.assert_close(average, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_adversarial_terms_need_real_samples():
    with pytest.raises(InputError, match=r"method_args\.gan: needs real samples"):
        distiller().loss({"class_labels": torch.tensor([0, 1])}, "fake")


def test_same_noise_shows_the_discriminator_real_and_fake_samples_alike():
    score = distiller()
    score.args.gan.same_noise = True
    seen = []
    score.discriminator.forward = lambda x_t, t, condition: seen.append((x_t, t)) or x_t.flatten(1)[:, :1]
    x = normal(4, 1, 8, 8, seed=9)
    batch = {"x": x, "class_labels": torch.tensor([0, 1, 2, 0])}
    sample = SimpleNamespace(x=x, condition={"class_labels": batch["class_labels"]})
    score.discriminator_loss(sample, batch, score.draws.at("fake", 0))
    assert torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[0][0], seen[1][0])
    score.args.gan.same_noise = False
    score.discriminator_loss(sample, batch, score.draws.at("fake", 0))
    assert not torch.equal(seen[2][1], seen[3][1])


def test_unconditional_worlds_have_empty_conditions():
    assert NoConditioner().embed({"x": normal(1, 1)}) == NoConditioner().null(3, "cpu") == {}
