"""DMD2: the paper's numbers by hand, who learns from what, and whole runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from kd_diffusion.engine.adversarial import GANConfig
from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.denoiser import guide
from kd_diffusion.engine.distillation import Networks
from kd_diffusion.engine.process import EDM
from kd_diffusion.engine.score import dmd_weight, edm_weight, inject
from kd_diffusion.integrations.pipelines import opened
from kd_diffusion.methods.dmd2 import DMD2, DMD2Config
from kd_diffusion.testing import tiny_unet, unet_pipeline
from kdcore.errors import InputError
from kdcore.losses import non_saturating_discriminator, non_saturating_generator


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def networks() -> Networks:
    found = opened(unet_pipeline(), null_class=10)
    generator = found.denoiser_for(tiny_unet().train())
    fake = found.denoiser_for(tiny_unet().train())
    with torch.no_grad():  # the fake score must differ from the teacher, or there is nothing to learn from
        for parameter in fake.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return Networks(found.denoiser, fake, generator, found.conditioner, found.space)


def dmd2(**arguments) -> DMD2:
    return DMD2(networks(), DMD2Config(**arguments), seed=3)


def batch(count=4, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(count, 1, 8, 8, generator=generator),
        "class_labels": torch.randint(0, 10, (count,), generator=generator),
    }


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before: dict[str, torch.Tensor], module: nn.Module) -> bool:
    after = module.state_dict()
    return all(torch.equal(value, after[name]) for name, value in before.items())


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]


# ---------------------------------------------------------------- the equations


def test_hand_value_of_distribution_matching():
    x = double([[1.0, 2.0, 3.0, 4.0]]).requires_grad_()
    mu_real, mu_fake = double([[0.0, 2.0, 2.0, 6.0]]), double([[1.0, 1.0, 3.0, 3.0]])
    weight = dmd_weight(x, mu_real, eps=0.0)
    g = weight * (mu_fake - mu_real)
    loss = inject(x, g)
    loss.backward()
    assert weight.item() == 1.0
    torch.testing.assert_close(g, double([[1.0, -1.0, 1.0, -3.0]]))
    assert loss.item() == 1.5
    torch.testing.assert_close(x.grad, double([[0.25, -0.25, 0.25, -0.75]]))


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_the_gradient_does_not_depend_on_the_scale_of_the_data(scale):
    generator = torch.Generator().manual_seed(0)
    x, mu_real, mu_fake = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    plain = dmd_weight(x, mu_real, eps=0.0) * (mu_fake - mu_real)
    scaled = dmd_weight(scale * x, scale * mu_real, eps=0.0) * scale * (mu_fake - mu_real)
    torch.testing.assert_close(plain, scaled)


def test_adversarial_terms_at_undecided_logits():
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    loss = non_saturating_generator(logits)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(logits.grad, torch.full((4,), -0.5 / 4, dtype=torch.float64))
    assert non_saturating_discriminator(logits.detach(), logits.detach()).item() == pytest.approx(2 * math.log(2))


def test_weight_of_the_fake_score_on_edm():
    torch.testing.assert_close(edm_weight(double([0.5, 2.0])), double([8.0, 4.25]))


def test_guidance_scale_one_is_one_forward():
    found = networks()
    calls = []
    found.teacher.network.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0], dtype=torch.float64)
    condition: Condition = {"class_labels": torch.tensor([1, 2])}
    null = found.conditioner.null(2, "cpu")
    plain = found.teacher.guided(x, t, condition, null, 1.0)
    assert calls == [2]
    unconditional = found.teacher.guided(x, t, condition, null, 0.0)
    assert calls == [2, 2]
    guided = found.teacher.guided(x, t, condition, null, 1.75)
    assert calls == [2, 2, 4]
    torch.testing.assert_close(guided, unconditional + 1.75 * (plain - unconditional))
    assert guide(double([0.0]), double([1.0]), 1.75).item() == 1.75


# ---------------------------------------------------------------- who learns from what


def test_no_gradient_where_fake_and_teacher_agree():
    found = networks()
    found.fake.load_state_dict(found.teacher.state_dict())
    method = DMD2(found, DMD2Config(gan=None, guidance_scale=1.75, fake_guidance_scale=1.75), seed=3)
    terms = method.loss(batch(), "generator")
    terms.total().backward()
    assert terms["matching"][1].item() == 0.0
    assert not gradients(method.generator)


@pytest.mark.parametrize("host", ["fake_trunk", "teacher_features", "channel_mean", "own_trunk"])
def test_each_turn_changes_its_player_alone(host):
    """The loop freezes the other players; their parameters and gradients must be untouched all the same."""
    method = dmd2(gan=GANConfig(host=host))
    assert method.discriminator is not None
    players = {player.name: player for player in method.players()}
    assert list(players) == ["generator", "fake"]
    assert players["generator"].every == 5
    others = {"generator": players["fake"].module, "fake": method.generator}
    for name, player in players.items():
        frozen = [p for p in others[name].parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        before, teacher = state(others[name]), state(method.teacher)
        optimizer = torch.optim.SGD([p for p in player.module.parameters() if p.requires_grad], lr=0.1)
        method.loss(batch(), name).total().backward()
        assert not gradients(others[name])
        assert not gradients(method.teacher)
        assert gradients(player.module)
        optimizer.step()
        optimizer.zero_grad()
        assert same(before, others[name])
        assert same(teacher, method.teacher)
        for parameter in frozen:
            parameter.requires_grad_(True)


def test_the_discriminator_trains_the_trunk_that_hosts_it():
    for host, reached in (("fake_trunk", True), ("channel_mean", True), ("teacher_features", False)):
        method = dmd2(gan=GANConfig(host=host))
        loss = method.loss(batch(), "fake")["discriminator"][1]
        loss.backward()
        assert bool(gradients(method.fake)) == reached, host


def test_the_discriminator_as_a_third_player_learns_from_the_same_samples():
    method = dmd2(gan=GANConfig(optimizer={"name": "adam", "lr": 1e-3}, host="teacher_features"))
    assert [player.name for player in method.players()] == ["generator", "fake", "discriminator"]
    seen = []
    original = method.discriminator_loss
    method.discriminator_loss = lambda sample, *rest: (seen.append(sample.x), original(sample, *rest))[1]
    generated = []
    sample = method.sample
    method.sample = lambda *args, **options: (generated.append(sample(*args, **options)), generated[-1])[1]
    for name in ("generator", "fake", "discriminator"):
        terms = method.loss(batch(), name)
        assert ("discriminator" in terms) == (name == "discriminator")
    assert len(generated) == 1
    assert torch.equal(seen[0], generated[0].x)


def test_the_fake_learns_from_the_samples_of_the_generator_turn():
    method = dmd2(gan=None)
    seen = []
    original = method.fake_terms
    method.fake_terms = lambda sample, *rest: (seen.append(sample), original(sample, *rest))[1]
    kept = []
    generator_terms = method.generator_terms
    method.generator_terms = lambda sample, *rest: (kept.append(sample), generator_terms(sample, *rest))[1]
    method.loss(batch(), "generator")
    method.loss(batch(), "fake")
    assert torch.equal(seen[0].x, kept[0].x)
    assert not seen[0].x.requires_grad
    method.progress.step = 1
    method.loss(batch(), "fake")
    assert not torch.equal(seen[1].x, kept[0].x)


def test_discriminator_weight_has_no_part_in_the_generators_loss():
    losses = []
    for weight in (0.0, 5.0):
        method = dmd2(gan=GANConfig(weight_discriminator=weight))
        terms = method.loss(batch(), "generator")
        losses.append((terms["matching"][1].item(), terms["adversarial"][1].item()))
    assert losses[0][0] == losses[1][0]


def test_without_the_adversarial_term_a_step_is_distribution_matching_alone():
    with_gan, without = dmd2(gan=GANConfig(weight_generator=0.0)), dmd2(gan=None)
    a, b = with_gan.loss(batch(), "generator"), without.loss(batch(), "generator")
    assert torch.equal(a.total(), b.total())


# ---------------------------------------------------------------- several steps


def test_the_first_step_starts_from_pure_noise():
    method = dmd2(steps=4, gan=None)
    inputs = []
    method.student.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for step in range(12):
        method.progress.step = step
        first = len(inputs)
        sample = method.sample(batch(), "generator", grad=False)
        assert len(inputs) - first == sample.step + 1
    sigma = method.process.sigma_max
    scale = (sigma**2 + 0.25) ** -0.5
    noise = method.draws.at("sample generator", 0)
    noise.one_integer(4)
    torch.testing.assert_close(inputs[0], sigma * scale * noise.normal((4, 1, 8, 8)), rtol=1e-5, atol=1e-5)


def test_no_gradient_through_the_steps_before_the_trained_one():
    """A detached copy that makes the earlier steps gives the same gradient."""
    method = dmd2(steps=4, gan=None)
    frozen = copy.deepcopy(method.generator).requires_grad_(False)
    for step in range(50):
        method.progress.step = step
        if method.sample(batch(), "generator", grad=True).step == 2:
            break
    method.draws._step = -1
    method.sample(batch(), "generator", grad=True).x.square().sum().backward()
    own = [p.grad.clone() for p in method.generator.parameters()]
    method.generator.zero_grad()
    live, calls = method.generator, []

    class Both(nn.Module):
        def forward(self, *inputs):
            calls.append(None)
            return (live if len(calls) == 3 else frozen)(*inputs)

    method.draws._step = -1
    method.generator = Both()
    method.sample(batch(), "generator", grad=True).x.square().sum().backward()
    assert len(calls) == 3
    for gradient, parameter in zip(own, live.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_in_bfloat16_the_trained_step_learns_after_steps_without_a_graph():
    """Autocast may keep the weights that a pass without a graph has cast; the conversions to x stay in float32."""
    found = {}
    for precise in (True, False):
        method = dmd2(steps=4, gan=None)
        method.stop_step = lambda draw: 3
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            sample = method.sample(batch(), "generator", grad=True)
            terms = method.generator_terms(sample, batch(), method.draws.at("generator", 0))
        assert sample.x.dtype == terms["matching"][1].dtype == torch.float32
        terms.total().backward()
        found[precise] = [p.grad for p in method.student.parameters()]
    assert all(grad is not None for grad in found[False])
    exact, rounded = (torch.cat([grad.flatten() for grad in grads]) for grads in found.values())
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.9


def test_noised_data_as_the_input_of_later_steps():
    simulated, noised = (dmd2(steps=2, gan=None, input=name) for name in ("simulated", "noised_data"))
    calls = []
    noised.student.register_forward_hook(lambda *args: calls.append(None))
    for step in range(8):
        noised.progress.step = simulated.progress.step = step
        a, b = (m.sample(batch(), "generator", grad=False) for m in (simulated, noised))
        assert a.step == b.step
        assert torch.equal(a.x, b.x) == (a.step == 0)
    assert len(calls) == 8


# ---------------------------------------------------------------- input


def test_a_discriminator_needs_real_samples():
    with pytest.raises(InputError, match=r"method_args\.gan: needs real samples"):
        dmd2().loss({"class_labels": torch.tensor([1, 2])}, "fake")


def test_guidance_needs_a_class_of_none():
    found = opened(unet_pipeline())
    method = DMD2(
        Networks(found.denoiser, found.copied(), found.copied(), found.conditioner, found.space),
        DMD2Config(guidance_scale=2.0, gan=None),
    )
    with pytest.raises(InputError, match=r"teacher\.null_class"):
        method.loss(batch(), "generator")


def test_process_of_the_teacher():
    assert isinstance(dmd2().process, EDM)
