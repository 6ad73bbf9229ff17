"""SiD: the paper's numbers by hand, who learns from what, the turns, and what the saved sampler does."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.distillation import Networks, Sample, ScoreDistiller
from kd_diffusion.engine.process import EDM, VP, add_noise
from kd_diffusion.engine.rollout import rollout
from kd_diffusion.engine.score import edm_weight, sid_loss
from kd_diffusion.integrations.pipelines import opened
from kd_diffusion.methods import sid
from kd_diffusion.methods.sid import SiD, SiDConfig, adversarial_loss, finite_gradient
from kd_diffusion.testing import tiny_unet, unet_pipeline
from kdcore.errors import InputError
from kdcore.losses import non_saturating_discriminator


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Affine(Denoiser):
    """mu(x_t) = c + k x_t on EDM, with both numbers as parameters."""

    def __init__(self, c: float, k: float):
        nn.Module.__init__(self)
        self.process, self.prediction_type = EDM(), "edm"
        self.network = nn.ParameterDict({"c": nn.Parameter(double(c)), "k": nn.Parameter(double(k))})

    def forward(self, x_t, t, condition):
        return self.network["c"] + self.network["k"] * x_t


class Still:
    """Stands for the random numbers of a turn: the noise given, whatever is asked."""

    def __init__(self, e: Tensor):
        self.e = e

    def normal(self, shape, dtype=None):
        return self.e


def affine(teacher, fake, monkeypatch, t=1.0, **arguments) -> SiD:
    """SiD between two affine denoisers, all times of the loss at t."""
    found = opened(unet_pipeline(), null_class=10)
    networks = Networks(Affine(*teacher), Affine(*fake), Affine(0.0, 0.0), found.conditioner, found.space)
    monkeypatch.setattr(sid, "sample_times", lambda config, process, draw, count: torch.full((count,), t).double())
    return SiD(networks, SiDConfig(guidance_scale=1.0, **arguments))


def generator_loss(method: SiD, x: Tensor, e: Tensor) -> Tensor:
    return method.generator_terms(Sample(x, {}, 0), {}, Still(e)).total()


def networks(double_precision: bool = False) -> Networks:
    """Tiny U-Nets; the fake score differs from the teacher."""
    found = opened(unet_pipeline(), null_class=10)
    fake, generator = found.denoiser_for(tiny_unet().train()), found.denoiser_for(tiny_unet().train())
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    made = Networks(found.denoiser, fake, generator, found.conditioner, found.space)
    if double_precision:
        for denoiser in (made.teacher, made.fake, made.generator):
            denoiser.double()
    return made


def small(*, made: Networks | None = None, **arguments) -> SiD:
    arguments.setdefault("guidance_scale", 1.0)
    return SiD(made or networks(), SiDConfig(**arguments), seed=3)


def batch(count=8, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(count, 1, 8, 8, generator=generator),
        "class_labels": torch.randint(0, 10, (count,), generator=generator),
    }


def freeze_others(method: SiD, player: str) -> None:
    """As the loop does."""
    for name, network in (("generator", method.generator), ("fake", method.fake)):
        network.requires_grad_(name == player)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]


def backward(method: SiD, player: str, items: dict | None = None) -> None:
    freeze_others(method, player)
    method.loss(batch() if items is None else items, player).total().backward()


# ---------------------------------------------------------------- the generator's loss


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, -0.3), (1.2, -0.84), (0.0, 2.4)])
def test_hand_value_for_three_alphas(alpha, expected):
    x, mu_real, mu_fake = double([[1.0, -1, 2]]), double([[0.5, 0, 1]]), double([[1.5, -0.5, 2]])
    assert sid_loss(x, mu_real, mu_fake, alpha).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_nothing_to_learn_where_the_fake_score_is_the_teacher(monkeypatch, alpha):
    method = affine((0.3, 0.7), (0.3, 0.7), monkeypatch, alpha=alpha)
    x, e = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = generator_loss(method, x.requires_grad_(), e)
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()


@pytest.mark.parametrize("kappa", [1.0, 2.0, -1.0])
def test_nothing_to_learn_from_equal_networks_under_equal_guidance(kappa):
    sizes = []
    for equal in (True, False):
        made = networks()
        if equal:
            made.fake.load_state_dict(made.teacher.state_dict())
        method = small(made=made, guidance_scale=kappa, fake_guidance_scale=kappa)
        backward(method, "generator")
        sizes.append(max(p.grad.abs().max().item() for p in method.generator.parameters()))
    assert sizes[0] < 1e-6 * sizes[1]  # the two paths through a network add up in another order


def test_on_gaussians_the_gradient_is_half_of_distribution_matching(monkeypatch):
    # data N(m, 1), samples N(A, 1), s = 1: both denoisers have slope 1/2, d = (m - A) / 2 at every x_t
    m, a = 0.4, 1.0
    method = affine((m / 2, 0.5), (a / 2, 0.5), monkeypatch)
    x, e = double([[[[0.3]]]]).requires_grad_(), double([[[[-0.7]]]])
    generator_loss(method, x, e).backward()
    x_t = x.detach() + e
    weight = 1 / (x.detach() - (m / 2 + 0.5 * x_t)).abs()
    torch.testing.assert_close(x.grad, 0.15 * weight, rtol=1e-12, atol=1e-12)
    g = ScoreDistiller.direction(method, x.detach(), x_t, double([1.0]), {})
    torch.testing.assert_close(g, 0.30 * weight, rtol=1e-4, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_gradient_flows_through_teacher_and_fake_score(monkeypatch, alpha):
    """The closed form of affine denoisers; without a graph through the teacher its slope would be missing."""
    (c_r, k_r), (c_f, k_f) = (0.3, 0.7), (-0.2, 0.4)
    method = affine((c_r, k_r), (c_f, k_f), monkeypatch, alpha=alpha)
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 3, 1, 2, 2, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    generator_loss(method, x, e).backward()
    with torch.no_grad():
        x_t = x + e
        mu_r, mu_f = c_r + k_r * x_t, c_f + k_f * x_t
        d = mu_r - mu_f
        w = (x - mu_r).abs().mean((1, 2, 3), keepdim=True)
        expected = ((k_r - k_f) * (mu_r - x - alpha * d) + d * ((k_r - 1) - alpha * (k_r - k_f))) / w / len(x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-12)
    detached = (k_r - k_f) * (mu_r - x.detach() - alpha * d) / w / len(x)
    assert not torch.allclose(x.grad, detached)


def test_it_sums_over_a_sample_and_averages_over_the_batch(monkeypatch):
    method = affine((0.3, 0.7), (-0.2, 0.4), monkeypatch)
    x, e = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = generator_loss(method, x, e)
    wide = generator_loss(method, torch.cat((x, x), -1), torch.cat((e, e), -1))
    torch.testing.assert_close(wide, 2 * once)
    torch.testing.assert_close(generator_loss(method, torch.cat((x, x)), torch.cat((e, e))), once)


# ---------------------------------------------------------------- who learns from what


@pytest.mark.parametrize("gan", [None, {}])
def test_each_turn_reaches_its_own_player_alone(gan):
    for steps in (1, 3):
        method = small(steps=steps, gan=gan, guidance_scale=1.5)
        for player, own, other in (
            ("generator", method.generator, method.fake),
            ("fake", method.fake, method.generator),
        ):
            backward(method, player)
            assert gradients(own)
            assert not gradients(other)
            assert not gradients(method.teacher)
            own.zero_grad()


def test_no_gradient_through_the_steps_before_the_trained_one():
    """A detached copy that makes the earlier steps gives the same gradient."""
    method = small(steps=4)
    method.generator.train()
    frozen = copy.deepcopy(method.generator).requires_grad_(False)
    step = next(s for s in range(50) if stop_at(method, s) == 2)

    def gradient() -> list[Tensor]:
        method.draws._step = -1
        method.progress.step = step
        method.sample(batch(), "generator", grad=True).x.square().sum().backward()
        found = [p.grad.clone() for p in live.parameters()]
        live.zero_grad()
        return found

    live, calls = method.generator, []
    own = gradient()

    class Mixed(nn.Module):
        def forward(self, *inputs):
            calls.append(None)
            return (live if len(calls) == 3 else frozen)(*inputs)

    method.generator = Mixed()
    for mine, other in zip(own, gradient(), strict=True):
        assert torch.equal(mine, other)
    assert len(calls) == 3


def stop_at(method: SiD, step: int, player: str = "generator") -> int:
    method.progress.step = step
    return method.stop_step(method.draws.at(f"sample {player}", step))


def test_every_step_is_matched_equally_often_and_independently_in_the_two_turns():
    method = small(steps=4)
    drawn = [(stop_at(method, s), stop_at(method, s, "fake")) for s in range(4000)]
    for counts in (Counter(a for a, _ in drawn), Counter(b for _, b in drawn)):
        chi2 = sum((counts[k] - 1000) ** 2 / 1000 for k in range(4))
        assert chi2 < 21.1  # 3 degrees of freedom, p = 1e-4
    pairs = Counter(drawn)
    assert sum((pairs[a, b] - 250) ** 2 / 250 for a in range(4) for b in range(4)) < 44.3  # 15 degrees, p = 1e-4


def test_the_last_step_alone_as_the_ablation():
    method = small(steps=4, matched="last")
    assert {stop_at(method, s, player) for s in range(20) for player in ("generator", "fake")} == {3}


def test_one_step_is_the_few_step_path_with_one_level():
    process = VP(torch.linspace(0.999, 0.001, 1000, dtype=torch.float64))
    generator = Affine(0.1, 0.5)
    z = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    x = rollout(generator, process, [625], {}, lambda: z, start="noised")
    torch.testing.assert_close(x, generator(process.levels(torch.tensor([625]))[1] * z, None, {}))


@pytest.mark.parametrize(("steps", "expected"), [(1, [625]), (2, [625, 312]), (4, [625, 468, 312, 156])])
def test_levels_of_the_table(tiny_text_folder, steps, expected):
    from kd_diffusion.integrations.pipelines import open_pipeline

    found = open_pipeline(tiny_text_folder)
    made = Networks(found.denoiser, found.copied(), found.copied(), found.conditioner, found.space)
    assert small(made=made, steps=steps).indices == expected


def test_edm_starts_at_its_own_sigma():
    method = small(steps=2, start_sigma=2.5)
    sigma = method.process.at(double(method.indices))
    assert sigma[0].item() == pytest.approx(2.5)
    assert sigma[1] < sigma[0]
    inputs = []
    method.student.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    method.sample(batch(512), "fake", grad=False)
    first = inputs[0] * (2.5**2 + 0.25) ** 0.5  # without c_in
    assert first.std().item() == pytest.approx(2.5, rel=0.02)


def test_the_turns_take_alternate_items_and_noise_of_their_own():
    method, whole = small(), batch()
    fake, generator = method.turn_batch(whole, "fake"), method.turn_batch(whole, "generator")
    assert torch.equal(fake["x"], whole["x"][[0, 2, 4, 6]])
    assert torch.equal(generator["class_labels"], whole["class_labels"][[1, 3, 5, 7]])
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(0, 4), slice(4, 8))]
    joined = torch.cat([method.turn_batch(half, "fake")["x"] for half in halves])
    assert torch.equal(joined, fake["x"])  # two processes take what one would
    assert [player.name for player in method.players()] == ["fake", "generator"]
    a, b = (method.sample(fake, player, grad=False).x for player in ("fake", "generator"))
    assert not torch.equal(a, b)


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (2.0, 2.0, 2.0)),
        ({"guidance_scale": 4.5}, (4.5, 4.5, 4.5)),
        ({"guidance_scale": 1.0, "fake_guidance_scale": 0.0}, (0.0, 0.0, 1.0)),  # Zero-CFG
        ({"guidance_scale": 1.0, "fake_guidance_scale": -1.0}, (1.0, -1.0, 1.0)),  # Anti-CFG
        ({"fake_guidance_scale": 1.0, "training_guidance_scale": 1.5}, (1.5, 1.0, 2.0)),
    ],
)
def test_guidance_scales_follow_from_few(arguments, expected):
    assert SiDConfig(**arguments).kappas() == expected


def test_zero_cfg_never_asks_the_fake_score_for_the_condition():
    losses = []
    for noise in (0.0, 100.0):
        made = networks()
        with torch.no_grad():
            made.fake.network.class_embedding.weight[:10] += noise
        method = small(made=made, fake_guidance_scale=0.0)
        losses.append([method.loss(batch(), player).total().item() for player in ("generator", "fake")])
    assert losses[0] == losses[1]
    assert losses[0] != [small().loss(batch(), player).total().item() for player in ("generator", "fake")]


def test_without_guidance_nothing_is_unconditional(monkeypatch):
    method = small()

    def refuse(*args):
        raise AssertionError("the class of none was asked for")

    monkeypatch.setattr(method.conditioner, "null", refuse)
    whole = batch()
    for player in ("generator", "fake"):
        method.loss(whole, player)
        condition = method.sample_condition(method.turn_batch(whole, player), player)
        assert torch.equal(condition["class_labels"], method.turn_batch(whole, player)["class_labels"])


def test_prompts_are_dropped_in_the_turn_of_the_fake_score_alone():
    method = small(guidance_scale=2.0)
    labels = {"class_labels": torch.zeros(4000, dtype=torch.int64)}
    assert not (method.sample_condition(labels, "generator")["class_labels"] == 10).any()
    dropped = (method.sample_condition(labels, "fake")["class_labels"] == 10).double()
    assert abs(dropped.mean().item() - 0.1) < 4 * (0.09 / 4000) ** 0.5


def test_guidance_needs_a_class_of_none():
    found = opened(unet_pipeline())
    made = Networks(found.denoiser, found.copied(), found.copied(), found.conditioner, found.space)
    with pytest.raises(InputError, match=r"teacher\.null_class"):
        SiD(made, SiDConfig(guidance_scale=1.0, fake_guidance_scale=0.0))


# ---------------------------------------------------------------- the fake score's loss


@pytest.mark.parametrize("kappa", [1.0, 0.0, 2.5])
def test_fake_loss_on_edm_sums_over_a_sample(kappa):
    made = networks(double_precision=True)
    method = small(made=made, training_guidance_scale=kappa)
    x, e = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    t, condition = double([0.1, 1.0, 5.0]), {"class_labels": torch.tensor([1, 2, 3])}
    x_t = add_noise(method.process, x, e, t)
    null = made.fake(x_t, t, made.conditioner.null(3, "cpu"))
    guided = null + kappa * (made.fake(x_t, t, condition) - null)
    expected = (edm_weight(t) * (guided - x).square().sum((1, 2, 3))).sum() / 3
    torch.testing.assert_close(method.denoising_loss(x, e, t, condition), expected, rtol=1e-9, atol=1e-9)


class Table(Denoiser):
    """A network that answers 0, on a DDPM table."""

    def __init__(self, kind: str):
        nn.Module.__init__(self)
        self.network = nn.Linear(1, 1)
        self.process, self.prediction_type = VP(double([0.9, 0.64, 0.3])), kind

    def output(self, x_t, t, condition):
        return 0 * x_t


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_fake_loss_on_a_table_is_on_the_networks_own_prediction(kind):
    found = opened(unet_pipeline(), null_class=10)
    made = Networks(Table(kind), Table(kind), Table(kind), found.conditioner, found.space)
    method = SiD(made, SiDConfig(guidance_scale=1.0, start_index=2))
    x, e, t = *torch.randn(2, 1, 1, 2, 2, dtype=torch.float64), torch.tensor([1])
    goal, weight = (e, 1.0) if kind == "epsilon" else (0.8 * e - 0.6 * x, 0.64)  # snr / (snr + 1) = a^2
    torch.testing.assert_close(method.denoising_loss(x, e, t, {}), weight * goal.square().sum())


# ---------------------------------------------------------------- samples and gradients that are not finite


def test_a_sample_with_nan_is_left_out_and_the_others_keep_their_share():
    method, whole = small(), batch()
    freeze_others(method, "generator")
    original = method.real_prediction

    def poisoned(x_t, t, condition):
        mu = original(x_t, t, condition)
        mask = torch.ones(len(mu), 1, 1, 1)
        mask[0] = torch.nan
        return mu * mask

    def run(prediction) -> list[Tensor]:
        method.draws._step, method.real_prediction = -1, prediction
        method.student.zero_grad()
        method.loss(whole, "generator").total().backward()
        return [p.grad.clone() for p in method.student.parameters()]

    def without_first(x_t, t, condition):  # where teacher and fake score agree a sample adds nothing
        mu = original(x_t, t, condition)
        return torch.cat((method.fake_prediction(x_t, t, condition)[:1], mu[1:]))

    for mine, other in zip(run(poisoned), run(without_first), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    method.real_prediction = lambda *args: torch.nan * original(*args)
    loss = method.loss(whole, "generator").total()
    assert loss.item() == 0.0
    loss.backward()


def test_fake_loss_leaves_out_what_is_not_finite():
    method = small()
    x, e, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), double([1.0, 1, 1, 1])
    condition = {"class_labels": torch.tensor([1, 2, 3, 4])}
    rest = method.denoising_loss(x[1:], e[1:], t[1:], {"class_labels": torch.tensor([2, 3, 4])})
    x[0, 0, 0, 0] = torch.inf
    torch.testing.assert_close(method.denoising_loss(x, e, t, condition), 0.75 * rest, rtol=1e-4, atol=1e-4)


def test_gradients_are_made_finite_before_the_step():
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0])
    assert finite_gradient(bad).tolist() == [0.0, 1e5, -1e5, 2.0]
    for fp16 in (False, True):  # the loss scaler of fp16 has to see them
        method = SiD(networks(), SiDConfig(guidance_scale=1.0), fp16=fp16)
        weight = next(method.student.parameters())
        (weight * torch.nan).sum().backward()
        assert bool(weight.grad.isfinite().all()) == (not fp16)


# ---------------------------------------------------------------- adversarial


def test_adversarial_terms_by_hand():
    x, mu_real = double([[[[1.0, 3.0]]], [[[0.0, 0.0]]]]), double([[[[0.0, 2.0]]], [[[0.5, 0.5]]]])
    logits = torch.zeros(2, 4, dtype=torch.float64)
    # D = 2 elements, normalisers 1 and 1/2: 2 * mean(1, 2) * ln 2
    assert adversarial_loss(x, mu_real, logits).item() == pytest.approx(3 * torch.log(double(2.0)).item())
    beyond = double([[50.0] * 4] * 2).requires_grad_()
    adversarial_loss(x, mu_real, beyond).backward()
    assert not beyond.grad.any()  # cut at 10


def test_the_discriminator_is_the_mean_of_the_fake_scores_middle():
    method = small(gan={})
    assert method.discriminator is not None
    assert not list(method.discriminator.parameters())
    kept = []
    method.fake.middle.register_forward_hook(lambda module, args, output: kept.append(output))
    x, t = torch.randn(3, 1, 8, 8), double([1.0, 2, 3])
    logits = method.discriminator(x, t, {"class_labels": torch.tensor([1, 2, 3])})
    torch.testing.assert_close(logits, kept[0].mean(1).flatten(1))


def test_real_and_fake_samples_get_the_same_noise():
    method, seen = small(gan={}), []
    original = method.discriminator.forward
    method.discriminator.forward = lambda x, t, c: (seen.append((x, t)), original(x, t, c))[1]
    items = method.turn_batch(batch(), "fake")
    sample = Sample(torch.zeros(4, 1, 8, 8), method.condition(items), 0)
    loss = method.discriminator_loss(sample, items, method.draws.at("fake", 0))
    (fake_t, t), (real_t, again) = seen
    assert torch.equal(t, again)
    torch.testing.assert_close(real_t - fake_t, items["x"], rtol=1e-4, atol=1e-4)
    logits = [original(x_t, t, sample.condition) for x_t in (real_t, fake_t)]
    expected = 0.5 * edm_weight(t).mean() * non_saturating_discriminator(*logits)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_the_adversarial_term_and_the_generator_join_later():
    gan, made = {"after": 100}, networks()
    method = SiD(made, SiDConfig(guidance_scale=1.0, gan=gan, generator_after=50), samples_per_step=4)
    players = {player.name: player for player in method.players()}
    assert (players["generator"].start, players["fake"].start) == (13, 0)
    assert (players["generator"].clip_value, players["fake"].clip_value) == (None, 1.0)
    for step, present in ((24, False), (25, True)):
        method.progress.step = step
        assert ("adversarial" in method.loss(batch(), "generator")) == present
        assert "discriminator" in method.loss(batch(), "fake")
    fp16 = SiD(networks(), SiDConfig(guidance_scale=1.0), fp16=True).players()
    assert {player.name: player.clip_value for player in fp16} == {"generator": 1.0, "fake": None}


def test_a_discriminator_needs_real_samples():
    with pytest.raises(InputError, match=r"method_args\.gan: needs real samples"):
        small(gan={}).loss({"class_labels": torch.tensor([1, 2, 3, 4])}, "fake")
