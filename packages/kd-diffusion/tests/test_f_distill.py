"""f-distill: weights of every divergence, the ratio and its normalisation, and what reaches whom."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_diffusion.engine.adversarial import GANConfig
from kd_diffusion.engine.distillation import Networks
from kd_diffusion.engine.process import EDM, VP, Flow
from kd_diffusion.engine.score import inject
from kd_diffusion.integrations.pipelines import opened
from kd_diffusion.methods.dmd2 import DMD2, DMD2Config
from kd_diffusion.methods.f_distill import (
    METHOD,
    WEIGHTS,
    FDistill,
    FDistillConfig,
    density_ratio,
    divergence_weight,
    normalise_by_bin,
    time_bins,
)
from kd_diffusion.testing import tiny_unet, unet_pipeline
from kdcore.config import override, parse, read_yaml
from kdcore.errors import InputError
from kdcore.method import arm_config, find_config, load_config
from kdcore.run import train

F64 = torch.float64
CLIP = (0.1, 20.0)
DIVERGENCES = sorted(WEIGHTS)
HOSTS = ["fake_trunk", "teacher_features", "channel_mean", "own_trunk"]


def double(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(actual.to(F64), expected, rtol=tolerance, atol=tolerance)


def networks():
    found = opened(unet_pipeline(), null_class=10)
    generator, fake = (found.denoiser_for(tiny_unet().train()) for _ in range(2))
    with torch.no_grad():  # the fake score must differ from the teacher, or there is nothing to learn from
        for parameter in fake.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return Networks(found.denoiser, fake, generator, found.conditioner, found.space)


def f_distill(host="teacher_features", weight_generator=1e-3, **arguments):
    torch.manual_seed(0)  # of the head
    gan = GANConfig(host=host, weight_generator=weight_generator, weight_discriminator=1.0)
    return FDistill(networks(), FDistillConfig(gan=gan, **arguments), seed=3)


def batch(count=16):
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(count, 1, 8, 8, generator=generator),
        "class_labels": torch.randint(0, 10, (count,), generator=generator),
    }


def gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


# ---------------------------------------------------------------- h(r)

GENERATORS = {  # f of D_f(p || q) = E_q f(p / q), and the constant that the method leaves out of h = r^2 f''
    "rkl": (lambda r: -r.log(), 1.0),
    "kl": (lambda r: r * r.log(), 1.0),
    "js": (lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), 1.0),
    "sf": (lambda r: (r + 1) * (0.5 + 0.5 / r).log(), 1.0),
    "sh": (lambda r: (1 - r.sqrt()) ** 2, 0.5),
    "jf": (lambda r: (r - 1) * r.log(), 1.0),
    "neyman": (lambda r: (1 - r) ** 2 / r, 2.0),
}
AT = (0.25, 1.0, 2.0, 5.0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weight_is_r_squared_times_the_second_derivative(name):
    f, constant = GENERATORS[name]
    r = double(*AT).requires_grad_()
    (first,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    close(r.detach() ** 2 * second, constant * WEIGHTS[name](r.detach()), 1e-12)


def test_weights_at_four_ratios():
    r = double(*AT)
    close(WEIGHTS["js"](r), [0.2, 0.5, 2 / 3, 5 / 6], 1e-12)
    close(WEIGHTS["sf"](r), [0.8, 0.5, 1 / 3, 1 / 6], 1e-12)
    close(WEIGHTS["kl"](r), AT, 1e-12)
    close(WEIGHTS["jf"](r), [1.25, 2, 3, 6], 1e-12)


@given(st.floats(0.01, 100))
def test_weights_are_related(ratio):
    r = double(ratio)
    close(WEIGHTS["js"](r) + WEIGHTS["sf"](r), [1.0], 1e-12)
    close(WEIGHTS["jf"](r), WEIGHTS["kl"](r) + WEIGHTS["rkl"](r), 1e-12)
    close(WEIGHTS["js"](r), WEIGHTS["kl"](r) * WEIGHTS["sf"](r), 1e-12)


@given(st.floats(0.01, 50), st.floats(1.001, 2))
def test_weights_are_monotone(ratio, factor):
    r = double(ratio, ratio * factor)
    for name in DIVERGENCES:
        change = float(WEIGHTS[name](r).diff())
        if name == "rkl":
            assert change == 0
        else:
            assert (change > 0) == (name in ("kl", "js", "sh", "jf")), name


def test_weights_of_four_logits():
    logits = torch.cat((double(0.0), double(3.0).log(), -double(3.0).log(), double(5.0)))[:, None]
    r = density_ratio(logits, CLIP)
    close(r, [1, 3, 1 / 3, 20], 1e-12)
    close(divergence_weight("js", r), [0.8155327, 1.2232990, 0.4077663, 1.5533955], 2e-6)
    close(divergence_weight("kl", r), [0.1643835, 0.4931506, 0.0547945, 3.2876707], 2e-6)


@given(st.sampled_from(DIVERGENCES), st.lists(st.floats(-12, 12), min_size=2, max_size=20))
def test_mean_of_the_weight_is_one(name, logits):
    """But for the 1e-6 that guards the division."""
    r = density_ratio(double(*logits)[:, None], CLIP)
    h, before = divergence_weight(name, r), float(WEIGHTS[name](r).mean())
    assert float(h.mean()) == pytest.approx(before / (before + 1e-6), rel=1e-12)
    assert bool((h > 0).all())


@given(st.sampled_from(DIVERGENCES), st.floats(-12, 12))
def test_equal_logits_leave_the_gradient_as_it_is(name, logit):
    r = density_ratio(torch.full((5, 2), logit, dtype=F64), CLIP)
    h, before = divergence_weight(name, r), WEIGHTS[name](r)
    close(h, before / (before + 1e-6), 1e-12)


def test_ratio_is_that_of_the_mean_logit_clipped_and_without_a_graph():
    logits = double(1.0, 3.0, -200.0, 200.0).reshape(2, 2).requires_grad_()
    r = density_ratio(logits, CLIP)
    close(r, [double(2.0).exp().item(), 1.0], 1e-12)
    assert not r.requires_grad
    assert density_ratio(torch.ones(2, 1, dtype=torch.bfloat16), CLIP).dtype == torch.float32
    close(density_ratio(double(-50.0, 50.0)[:, None], CLIP), CLIP, 1e-12)


# ---------------------------------------------------------------- the theorem, in one dimension


def log_mixture(x, weights, means, deviations):
    parts = [torch.distributions.Normal(m, d).log_prob(x) + math.log(w) for w, m, d in zip(weights, means, deviations)]
    return torch.stack(parts).logsumexp(0)


def log_normal(x, mean, deviation):
    return -0.5 * ((x - mean) / deviation) ** 2 - deviation.log() - 0.5 * math.log(2 * math.pi)


def scores(log_p, log_q, x):
    x = x.detach().requires_grad_()
    return [torch.autograd.grad(log(x).sum(), x)[0] for log in (log_p, log_q)]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weighted_score_difference_is_the_gradient_of_the_divergence(name):
    """Of the student x = m + s z against two Gaussians, both sides by quadrature."""
    f, constant = GENERATORS[name]
    grid = torch.linspace(-9, 9, 20_001, dtype=F64)
    log_p = lambda x: log_mixture(x, (0.7, 0.3), (-1.0, 1.5), (0.6, 0.7))  # noqa: E731
    mean, deviation = double(0.2)[0].requires_grad_(), double(0.5)[0].requires_grad_()
    log_q = log_normal(grid, mean, deviation)
    inside = log_q.detach() > -300  # beyond, q is zero in float64
    divergence = torch.trapezoid(torch.where(inside, log_q.exp() * f((log_p(grid) - log_q).exp()), 0.0), grid)
    expected = torch.stack(torch.autograd.grad(divergence, (mean, deviation)))
    own = log_q.detach()
    score_p, score_q = scores(log_p, lambda x: log_normal(x, mean.detach(), deviation.detach()), grid)
    h = constant * WEIGHTS[name]((log_p(grid) - own).exp())
    z = (grid - mean.detach()) / deviation.detach()
    pull = torch.where(inside, own.exp() * h * (score_q - score_p), 0.0)
    close(torch.stack([torch.trapezoid(pull * d, grid) for d in (torch.ones_like(z), z)]), expected, 1e-6)


@pytest.mark.parametrize(("name", "expected"), [("rkl", (2.0, 0.5)), ("js", (0.0, None)), ("kl", (0.0, 4.25**0.5))])
def test_reverse_kl_takes_one_mode_and_others_cover_both(name, expected):
    """A Gaussian student of modes at -2 and 2, with the exact ratio: it ends as one, or (kl) has their moments."""
    modes = double(-2.0, 2.0)[:, None]
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(400, dtype=F64) + 0.5) / 400)
    mean, log_s = double(1.0).requires_grad_(), double(0.0).requires_grad_()
    optimizer = torch.optim.SGD([mean, log_s], lr=0.1)
    for _ in range(400):
        x = mean + log_s.exp() * z
        y, s = x.detach(), log_s.detach().exp()
        joint = math.log(0.5) + log_normal(y, modes, double(0.5))
        score_p = ((joint.softmax(0) * modes).sum(0) - y) / 0.25
        ratio = (joint.logsumexp(0) - log_normal(y, mean.detach(), s)).exp()
        optimizer.zero_grad()
        inject(x, divergence_weight(name, ratio) * ((mean.detach() - y) / s**2 - score_p)).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(expected[0], abs=0.05)
    if expected[1] is not None:
        assert log_s.exp().item() == pytest.approx(expected[1], abs=0.05)
    else:
        assert log_s.exp().item() > 1


# ---------------------------------------------------------------- bins of time


def test_ratios_are_divided_by_the_mean_of_their_bin():
    means, r = torch.ones(4, dtype=F64), double(1.0, 3.0, 1 / 3, 20.0)
    found = normalise_by_bin(r, torch.tensor([0, 0, 2, 2]), means, 0.5)
    close(means, [1.5, 1, 5.5833333, 1])
    close(found, [0.666666, 1.999999, 0.0597015, 3.5820905])


@given(st.floats(0.1, 10), st.integers(0, 2**20))
def test_a_bins_factor_cancels_without_memory(factor, seed):
    r = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.1
    index = torch.arange(12) % 3
    scaled = torch.where(index == 1, factor * r, r)
    plain = normalise_by_bin(r, index, torch.ones(3, dtype=F64), 0.0)
    close(normalise_by_bin(scaled, index, torch.ones(3, dtype=F64), 0.0), plain, 2e-5)


def test_bins_are_equal_parts_of_the_range_of_times():
    t = double(0.1, 0.2, 0.6, 0.6)
    assert time_bins(Flow(), t, 4).tolist() == [0, 0, 2, 2]
    assert time_bins(EDM(), double(0.002, 7.9, 8.1, 80.0), 10).tolist() == [0, 0, 1, 9]
    table = VP(torch.linspace(0.99, 0.01, 1000, dtype=F64))
    assert time_bins(table, torch.tensor([0, 99, 100, 999]), 10).tolist() == [0, 0, 1, 9]
    whole = time_bins(table, torch.arange(1000), 10).bincount()
    assert int(whole.max() - whole.min()) <= 1


def test_means_of_the_bins_are_checkpointed_but_not_shipped():
    method = f_distill(ratio_ema=0.5)
    method.loss(batch(), "generator")
    assert not torch.equal(method.ratio_means, torch.ones(10))
    state = method.checkpoint_state()
    assert torch.equal(state["ratio_means"], method.ratio_means)
    assert not any("ratio" in name for name in method.deployed().state_dict())
    again = f_distill(ratio_ema=0.5)
    again.load_checkpoint_state(state)
    assert torch.equal(again.ratio_means, method.ratio_means)


# ---------------------------------------------------------------- one turn


def test_reverse_kl_is_dmd2():
    times = {"kind": "uniform", "low": 20, "high": 980}
    own = f_distill(f_div="rkl", times=times, guidance_scale=1.75, weight_generator=0.0)
    torch.manual_seed(0)
    gan = GANConfig(host="teacher_features", weight_generator=0.0)
    dmd2 = DMD2(networks(), DMD2Config(gan=gan, times=times, guidance_scale=1.75), seed=3)
    losses = []
    for method in (own, dmd2):
        terms = method.loss(batch(), "generator")
        terms.total().backward()
        losses.append(terms["matching"][1].detach())
    close(losses[0] * (1 + 1e-6) ** 2, losses[1], 1e-5)
    close(gradient(own.student), gradient(dmd2.student).double(), 1e-6)


def test_the_weight_couples_the_samples_of_a_batch():
    """Halves do not average to the whole, as they do for the weights of one sample alone."""
    g, r = double(1.0, 2.0, -1.0, -3.0), double(0.2, 0.3, 5.0, 9.0)
    whole = (divergence_weight("kl", r) * g).mean()
    halves = torch.stack([(divergence_weight("kl", r[h]) * g[h]).mean() for h in (slice(0, 2), slice(2, 4))]).mean()
    assert abs(float(whole - halves)) > 0.1
    plain = [float((divergence_weight("rkl", r[h]) * g[h]).mean()) for h in (slice(0, 2), slice(2, 4), slice(0, 4))]
    assert sum(plain[:2]) / 2 == pytest.approx(plain[2], rel=1e-12)


@pytest.mark.parametrize("name", ["kl", "js"])
def test_nothing_to_match_where_the_fake_score_is_the_teacher(name):
    method = f_distill(f_div=name, guidance_scale=1.75, fake_guidance_scale=1.75)
    method.fake.load_state_dict(method.real_score.state_dict())
    terms = method.loss(batch(), "generator")
    terms["matching"][1].backward()
    largest = max(float(p.grad.abs().max()) for p in method.student.parameters() if p.grad is not None)
    other = f_distill(f_div=name, guidance_scale=1.75, fake_guidance_scale=1.75)
    other.loss(batch(), "generator")["matching"][1].backward()
    assert largest < 1e-4 * float(gradient(other.student).abs().max())  # the two are guided in passes of other forms


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_discriminator_that_cannot_tell_gives_dmd2_for_every_divergence(name):
    gradients = []
    for f_div in ("rkl", name):
        method = f_distill(f_div=f_div, ratio_bins=0)
        for parameter in method.discriminator.head.layers[-1].parameters():
            torch.nn.init.zeros_(parameter)
        method.loss(batch(), "generator")["matching"][1].backward()
        gradients.append(gradient(method.student).double())
    close(gradients[0], gradients[1], 1e-5)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kappa", [1.0, 0.0, 1.75])
def test_the_pass_that_gives_the_ratio_also_gives_the_scores(host, kappa):
    method = f_distill(host, guidance_scale=kappa, fake_guidance_scale=kappa)
    seen = {}
    for name in ("real_score", "fake"):
        getattr(method, name).network.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(len(args[0]))
        )
    matching, kept = method.matching, []
    method.matching = lambda *args: kept.append((args, matching(*args))) or kept[-1][1]
    method.loss(batch(), "generator")
    (x, x_t, t, condition, mu_host), g = kept[0]
    forwards = {name: sum(counts) // 16 for name, counts in seen.items()}
    expected = method.direction(x, x_t, t, condition)
    torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(mu_host, method.discriminator.network(x_t, t, condition).detach(), rtol=1e-4, atol=1e-4)
    one = {1.0: 1, 0.0: 1, 1.75: 2}[kappa]
    shared = {"teacher_features": "real_score", "own_trunk": None}.get(host, "fake")
    for name in ("real_score", "fake"):
        assert forwards[name] == (2 if name == shared and kappa == 0 else one)


def test_ratio_and_scores_are_of_the_same_noised_samples():
    method = f_distill("own_trunk")
    seen = {}
    for name, denoiser in (("d", method.discriminator.trunk), ("real", method.real_score), ("fake", method.fake)):
        denoiser.network.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[:2]}))
    method.loss(batch(), "generator")
    for name in ("real", "fake"):
        assert torch.equal(seen[name][0], seen["d"][0])
        assert torch.equal(seen[name][1], seen["d"][1])


@pytest.mark.parametrize("host", HOSTS)
def test_the_ratio_has_no_graph_and_the_adversarial_term_has_one(host):
    method = f_distill(host, f_div="kl")
    for module in (method.fake, method.real_score):
        module.requires_grad_(False)
    terms = method.loss(batch(), "generator")
    terms["matching"][1].backward(retain_graph=True)
    assert all(p.grad is None for p in method.discriminator.parameters())
    before = gradient(method.student).clone()
    terms["adversarial"][1].backward()
    assert not torch.equal(before, gradient(method.student))


def test_samples_that_look_real_weigh_more_for_mode_covering_divergences():
    """A logit above 0 says that data are denser there than samples: r = p / q > 1, and kl turns to these."""
    method, t = f_distill(f_div="kl", ratio_bins=0), torch.full((16,), 1.0)
    logits = torch.linspace(-2, 2, 16)[:, None]
    assert bool((method.sample_weight(logits, t).diff() > 0).all())
    method.args.f_div = "neyman"
    assert bool((method.sample_weight(logits, t).diff() < 0).all())


def test_effective_share_of_the_batch_is_logged_and_not_minimised():
    terms = f_distill(f_div="kl").loss(batch(), "generator")
    weight, share = terms["effective_share"]
    assert weight == 0
    assert 1 / 16 <= float(share) < 1
    assert float(f_distill(f_div="rkl").loss(batch(), "generator")["effective_share"][1]) == pytest.approx(1)


def test_error_of_the_fake_score_without_a_weight():
    method = f_distill(fake_error="x")
    x, t = batch()["x"], torch.full((16,), 2.0, dtype=F64)
    condition, e = {"class_labels": batch()["class_labels"]}, torch.ones_like(x)
    error = (method.fake(x + 2 * e, t, condition) - x).square().mean()
    torch.testing.assert_close(method.denoising_loss(x, e, t, condition), error)
    method.args.fake_error = "dmd2"
    torch.testing.assert_close(method.denoising_loss(x, e, t, condition), error * (0.25 + 4.0))


def test_gradient_does_not_depend_on_the_order_of_the_batch():
    h = divergence_weight("kl", density_ratio(torch.linspace(-3, 3, 20, dtype=F64)[:, None], CLIP))
    turned = divergence_weight("kl", density_ratio(torch.linspace(3, -3, 20, dtype=F64)[:, None], CLIP))
    close(h.flip(0), turned, 1e-12)


RANKS = """
import os, sys, torch
from kd_diffusion.methods.f_distill import density_ratio, divergence_weight, normalise_by_bin
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
logits = torch.linspace(-3, 3, 8, dtype=torch.float64)[4 * rank : 4 * rank + 4, None]
means = torch.ones(3, dtype=torch.float64)
index = (torch.arange(8) % 3)[4 * rank : 4 * rank + 4]
r = normalise_by_bin(density_ratio(logits, (0.1, 20.0)), index, means, 0.5)
torch.save({"h": divergence_weight("kl", r), "means": means}, sys.argv[1] + f"/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_means_are_over_all_ranks(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    subprocess.run([*launch, str(script), str(tmp_path)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    means = torch.ones(3, dtype=F64)
    r = density_ratio(torch.linspace(-3, 3, 8, dtype=F64)[:, None], CLIP)
    h = divergence_weight("kl", normalise_by_bin(r, torch.arange(8) % 3, means, 0.5))
    close(torch.cat([part["h"] for part in parts]), h, 1e-12)
    assert all(torch.allclose(part["means"], means) for part in parts)


# ---------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"f_div": "hellinger"}, r"'f_div' = 'hellinger': allowed: 'rkl', 'kl'"),
        ({"ratio_clip": [2.0, 20.0]}, r"has ratio_clip 2.0 to 20.0; allowed: 0 < smallest < 1 < largest"),
        ({"ratio_bins": -1}, r"'ratio_bins' = -1"),
        ({"ratio_ema": 1.0}, r"'ratio_ema' = 1.0"),
        ({"gan": None}, r"'gan' = None"),
        ({"ratio_clips": [0.1, 2.0]}, r"unknown key 'ratio_clips'; did you mean 'ratio_clip'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(FDistillConfig, arguments)


def test_small_batches_are_refused_except_for_reverse_kl():
    with pytest.raises(InputError, match=r"15 samples, weights of f_div = 'js'.*allowed: 16 and more"):
        f_distill().loss(batch(15), "generator")
    assert torch.isfinite(f_distill(f_div="rkl").loss(batch(2), "generator").total())


# ---------------------------------------------------------------- whole runs


def config(folder, **overrides):

    values = {
        "method": "f_distill",
        "teacher": {"pretrained": str(folder), "null_class": 10},
        "data": {"name": "digits"},
        "method_args": {"fake_updates": 2},
        "train": {"steps": 4, "batch_size": 16, "optimizer": {"name": "adam", "lr": 1e-4}},
        "evaluation": {"samples": 20, "teacher_steps": [1]},
    }
    return parse(METHOD.config, override(values, overrides))


def test_a_run_with_small_batches_stops_before_it_trains(tiny_unet_folder, tmp_path):
    with pytest.raises(InputError, match=r"train\.batch_size: 8 samples"):
        train(METHOD, config(tiny_unet_folder, **{"train.batch_size": 8}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_trains_to_a_stock_pipeline_and_resumes_with_its_bins(tiny_unet_folder, tmp_path):
    from diffusers import DiffusionPipeline

    settings = {"method_args.ratio_ema": 0.5, "train.checkpoint_every": 2, "train.ema": {"decay": 0.9}}
    metrics = train(METHOD, config(tiny_unet_folder, **settings), tmp_path / "run", quiet=True)
    assert metrics["student/frechet"] > 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    images = pipe(batch_size=2, class_labels=[1, 2], num_inference_steps=1, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    with pytest.MonkeyPatch.context() as patch:
        loss, calls = FDistill.loss, []

        def cut(self, batch, player="generator"):
            calls.append(player)
            if len(calls) > 4:
                raise KeyboardInterrupt
            return loss(self, batch, player)

        patch.setattr(FDistill, "loss", cut)
        with pytest.raises(KeyboardInterrupt):
            train(METHOD, config(tiny_unet_folder, **settings), tmp_path / "cut", quiet=True)
    train(METHOD, config(tiny_unet_folder, **settings), tmp_path / "cut", quiet=True, resume=True)
    whole, resumed = (
        DiffusionPipeline.from_pretrained(tmp_path / name / "student").unet.state_dict() for name in ("run", "cut")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("name", ["small", "mixture", "paper", "paper-sd15", "paper-sdxl"])
def test_configs_and_their_arms_are_valid(name):
    values = read_yaml(find_config(f"f_distill/{name}"))
    method, config = load_config(f"f_distill/{name}")
    assert method.key == "f_distill"
    for arm, overrides in config.compare.items():
        arm_config(values, overrides, source=arm)


@pytest.mark.parametrize("name", ["paper", "paper-sd15"])
def test_paper_configs_build_on_another_teacher(name, tiny_unet_folder, tiny_text_folder, tmp_path):
    from PIL import Image

    folder, size = {"paper": (tiny_unet_folder, 8), "paper-sd15": (tiny_text_folder, 16)}[name]
    for label in range(2):
        (tmp_path / "images" / f"class_{label}").mkdir(parents=True)
        for index in range(8):
            picture = Image.new("L", (size, size), 100 * label + 10 * index)
            picture.save(tmp_path / "images" / f"class_{label}" / f"{index}.png")
    method, config = load_config(
        f"f_distill/{name}",
        [
            f"teacher.pretrained={folder}",
            f"teacher.null_class={10 if name == 'paper' else 'null'}",
            f"data.root={tmp_path / 'images'}",
            f"data.image_size={size}",
            "data.channels=1",
            "train.steps=1",
            "train.batch_size=16",
            "train.precision=fp32",
            "train.num_workers=0",
            "evaluation.samples=2",
            "evaluation.teacher_steps=[1]",
        ],
    )
    train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert (tmp_path / "run" / "student" / "model_index.json").is_file()
