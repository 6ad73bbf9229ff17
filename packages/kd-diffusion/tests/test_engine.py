"""The mathematics of engine/: conversions, injection, weights, rollout, times, draws. Exact, in float64."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kd_diffusion.engine import score
from kd_diffusion.engine.denoiser import Denoiser, guide
from kd_diffusion.engine.draws import Draws
from kd_diffusion.engine.process import (
    EDM,
    VP,
    Flow,
    TrigFlow,
    add_noise,
    expand,
    from_x0,
    process_of,
    renoise,
    renoising,
    subinterval_target,
    target,
    to_epsilon,
    to_score,
    to_x0,
)
from kd_diffusion.engine.rollout import euler_move, rollout, start_noise
from kd_diffusion.engine.timesteps import TimesConfig, bucket_of, levels, sample_times
from kdcore.errors import InputError

F64 = torch.float64
TABLE = VP(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0))
KINDS = [
    (TABLE, "epsilon"),
    (TABLE, "v_prediction"),
    (TABLE, "sample"),
    (EDM(), "edm"),
    (EDM(boundary=0.002), "edm"),
    (EDM(), "epsilon"),
    (Flow(), "flow_prediction"),
    (Flow(3.0), "flow_prediction"),
    (Flow(), "sample"),
    (TrigFlow(), "trigflow"),
    (TrigFlow(), "flow_prediction"),
]
PROCESSES = [TABLE, EDM(), Flow(), Flow(3.0), TrigFlow()]
kinds = st.sampled_from(KINDS)
processes = st.sampled_from(PROCESSES)
indices = st.integers(1, 998)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def at(process, *index):
    return process.at(torch.tensor(index))


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(actual.to(F64), expected, rtol=tolerance, atol=tolerance)


class Exact(nn.Module):
    """A network that predicts, in any type, what `mu(x_t, t)` gives as x; called like UNet2DModel."""

    def __init__(self, process, kind, mu):
        super().__init__()
        self.process, self.kind, self.mu = process, kind, mu
        self.anchor = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, sample, timestep, class_labels=None, return_dict=False):
        t = {EDM: lambda: (timestep / 250).exp(), Flow: lambda: timestep / 1000}.get(
            type(self.process), lambda: timestep
        )()
        x_t = sample / expand(self.process.input_scale(t), sample)
        return (from_x0(self.process, self.kind, self.mu(x_t, t) + self.anchor, x_t, t),)


def gaussian_mu(process, center, deviation):
    """E[x | x_t] of x ~ N(center, deviation^2): c + k (x_t - a c), k = a q^2 / (a^2 q^2 + s^2)."""

    def mu(x_t, t):
        a, s = (expand(value, x_t) for value in process.levels(t))
        k = a * deviation**2 / (a**2 * deviation**2 + s**2)
        return center + k * (x_t - a * center)

    return mu


# ---------------------------------------------------------------- processes and conversions


@given(kinds, indices, st.integers(0, 2**20))
def test_a_prediction_of_any_type_is_one_of_x(kind, index, seed):
    process, name = kind
    x, e, t = normal(2, 3, seed=seed), normal(2, 3, seed=seed + 1), at(process, index, index)
    x_t = add_noise(process, x, e, t)
    a, s = (expand(value, x) for value in process.levels(t))
    scale = 1 + float(s.max() / a.min())  # 1 / a amplifies rounding
    close(to_x0(process, name, target(process, name, x, e, t), x_t, t), x, 1e-12 * scale)
    y = normal(2, 3, seed=seed + 2)
    assert torch.allclose(from_x0(process, name, to_x0(process, name, y, x_t, t), x_t, t), y, atol=1e-9, rtol=1e-9)


def test_conversions_of_a_table_with_a_0_8_s_0_6():
    process, t = VP(torch.tensor([0.64], dtype=F64)), torch.zeros(1, dtype=torch.int64)
    x, e = torch.tensor([[1.0, -2.0]], dtype=F64), torch.tensor([[0.5, 1.0]], dtype=F64)
    x_t = add_noise(process, x, e, t)
    close(x_t, [[1.1, -1.0]])
    close(target(process, "v_prediction", x, e, t), [[-0.2, 2.0]])
    close(to_x0(process, "epsilon", e, x_t, t), x)
    close(to_x0(process, "v_prediction", torch.tensor([[-0.2, 2.0]], dtype=F64), x_t, t), x)
    close(to_epsilon(process, x, x_t, t), e)
    close(to_score(process, x, x_t, t), -e / 0.6)


def test_rectified_flow_predicts_the_difference_of_noise_and_data():
    process, t = Flow(), torch.tensor([0.25], dtype=F64)
    x, e = normal(1, 4), normal(1, 4, seed=1)
    u = target(process, "flow_prediction", x, e, t)
    close(u, e - x)
    close(to_x0(process, "flow_prediction", u, add_noise(process, x, e, t), t), x)


@given(processes, indices)
def test_score_noise_and_v_differences_are_multiples_of_delta(process, index):
    t = at(process, index)
    x_t, real, fake = normal(1, 3), normal(1, 3, seed=1), normal(1, 3, seed=2)
    a, s = (expand(value, x_t) for value in process.levels(t))
    delta = fake - real
    noise = to_epsilon(process, real, x_t, t) - to_epsilon(process, fake, x_t, t)
    assert torch.allclose(noise, a / s * delta, rtol=1e-8)
    assert torch.allclose(
        to_score(process, fake, x_t, t) - to_score(process, real, x_t, t), a / s**2 * delta, rtol=1e-8
    )
    name = {VP: "v_prediction", Flow: "flow_prediction", TrigFlow: "trigflow"}.get(type(process))
    if name:
        v = from_x0(process, name, real, x_t, t) - from_x0(process, name, fake, x_t, t)
        assert torch.allclose(v, delta / s, rtol=1e-7)


@given(processes, st.integers(0, 999))
def test_index_of_inverts_the_table(process, index):
    close(process.index_of(at(process, index)), [float(index)], 1e-7)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_table_gets_noisier_and_ends_in_noise(process):
    a, s = process.levels(process.at(torch.arange(1000)))
    assert bool(((s / a.clamp_min(1e-12)).diff() > 0).all())
    assert float(s[-1] / a[-1].clamp_min(1e-12)) > 79


def test_karras_table_ends_at_its_sigmas():
    close(at(EDM(), 0, 999), [0.002, 80.0])
    half = (0.5 * (0.002 ** (1 / 7) + 80 ** (1 / 7))) ** 7
    close(EDM().at(torch.tensor([499.5], dtype=F64)), [half])


def test_edm_preconditioning_has_unit_variance_and_keeps_x_at_the_boundary():
    process, s = EDM(), torch.tensor([0.3, 2.0], dtype=F64)
    skip, out = process.preconditioning(s)
    close(process.input_scale(s) ** 2 * (s**2 + 0.25), [1.0, 1.0])
    close(((1 - skip) ** 2 * 0.25 + skip**2 * s**2) / out**2, [1.0, 1.0])  # variance of the target
    skip, out = EDM(boundary=0.002).preconditioning(torch.tensor([0.002], dtype=F64))
    close(skip, [1.0])
    close(out, [0.0])


def test_conversions_run_in_float64_and_come_back_in_the_dtype_of_x_t():
    t = torch.tensor([999])
    x_t, e = torch.tensor([[1.0]], dtype=torch.bfloat16), torch.tensor([[0.99609375]], dtype=torch.bfloat16)
    a, s = TABLE.levels(t)
    found = to_x0(TABLE, "epsilon", e, x_t, t)
    assert found.dtype == torch.bfloat16
    assert float(found) == pytest.approx(float((1 - s * 0.99609375) / a), rel=2**-8)


def test_unknown_prediction_types_are_named():
    t = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InputError, match=r"prediction_type = 'eps'.*epsilon"):
        to_x0(TABLE, "eps", normal(1, 2), normal(1, 2), t)
    with pytest.raises(InputError, match="needs the EDM noise process, got VP"):
        to_x0(TABLE, "edm", normal(1, 2), normal(1, 2), t)
    with pytest.raises(InputError, match="no flow prediction"):
        to_x0(TABLE, "flow_prediction", normal(1, 2), normal(1, 2), t)


def test_schedulers_of_diffusers_name_their_process():
    import diffusers

    assert process_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))[1] == "flow_prediction"
    process, kind = process_of(diffusers.CMStochasticIterativeScheduler(sigma_min=0.01, sigma_max=40.0))
    assert (kind, process.boundary, process.sigma_max) == ("edm", 0.01, 40.0)
    process, kind = process_of(diffusers.DDPMScheduler(prediction_type="v_prediction"))
    assert (kind, process.size) == ("v_prediction", 1000)
    close(process.alphas_cumprod, diffusers.DDPMScheduler().alphas_cumprod.double())


# ---------------------------------------------------------------- from one noise level to another


@given(processes, st.integers(0, 990), st.integers(1, 9))
def test_renoising_reaches_the_levels_of_the_later_time(process, index, gap):
    s, t = at(process, index), at(process, index + gap)
    (a_s, s_s), (a_t, s_t) = process.levels(s), process.levels(t)
    r, b = renoising(process, s, t)
    close(r * a_s, a_t, 1e-9)
    assert torch.allclose((r * s_s) ** 2 + b**2, s_t**2, rtol=1e-9)


def test_subinterval_target_on_rectified_flow():
    s, t = torch.tensor([0.5], dtype=F64), torch.tensor([0.8], dtype=F64)
    r, b = renoising(Flow(), s, t)
    close(torch.cat((r, b)), [0.4, 0.7745966692414834])
    c = (0.8 + 0.2 * 0.25 / 0.25) / 0.7745966692414834
    assert c == pytest.approx(1.2909944487, abs=1e-10)
    x_s, e = normal(1, 3), normal(1, 3, seed=1)
    close(subinterval_target(Flow(), "flow_prediction", x_s, e, s, t), c * e - 2 * x_s)


@pytest.mark.parametrize(("process", "name"), KINDS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_subinterval_target_without_noise_in_x_s_is_the_usual_one(process, name):
    t = at(process, 700)
    x, e = normal(1, 3), normal(1, 3, seed=1)
    if isinstance(process, VP):  # a table has no level without noise; its first entry may be one
        process = VP(torch.cat((torch.ones(1, dtype=F64), process.alphas_cumprod)))
        s, t = torch.tensor([0]), t + 1
    else:
        s = torch.zeros(1, dtype=F64)
    found = subinterval_target(process, name, x, e, s, t)
    assert torch.allclose(found, target(process, name, x, e, t), rtol=1e-7, atol=1e-9)


@given(kinds, st.integers(1, 900), st.integers(1, 98), st.floats(0.2, 3))
def test_subinterval_target_is_unbiased_for_gaussian_data(kind, index, gap, deviation):
    """x, e_0, e are independent, so a row of coefficients stands for a random variable and E[. | x_t] is a regression;
    the target of the subinterval regresses on x_t as that of the clean x does."""
    process, name = kind
    s, t = at(process, index), at(process, index + gap)
    x, e_0, e = torch.eye(3, dtype=F64).unsqueeze(1) * torch.tensor([deviation, 1.0, 1.0], dtype=F64)
    x_s = add_noise(process, x, e_0, s)
    x_t = renoise(process, x_s, e, s, t)
    a, sigma = (expand(value, x_t) for value in process.levels(t))
    usual = target(process, name, x, (x_t - a * x) / sigma, t)
    found = subinterval_target(process, name, x_s, e, s, t)
    regress = lambda y: float((y * x_t).sum() / x_t.square().sum())  # noqa: E731
    assert regress(found) == pytest.approx(regress(usual), rel=1e-6, abs=1e-9)


# ---------------------------------------------------------------- the generator's gradient


def test_delta_of_two_gaussians_is_constant():
    process, t = EDM(), torch.ones(5, dtype=F64)
    x_t = normal(5, 1)
    delta = gaussian_mu(process, 0.6, 1.0)(x_t, t) - gaussian_mu(process, 0.0, 1.0)(x_t, t)
    close(delta, torch.full((5, 1), 0.3, dtype=F64))


@given(st.sampled_from(KINDS), st.floats(-2, 2), st.floats(0.3, 2))
def test_every_network_type_gives_the_delta_of_the_gaussian_world(kind, shift, deviation):
    process, name = kind
    t = at(process, 500, 500)
    x_t = normal(2, 1, 1, 1)
    a, s = process.levels(t)
    k = a * deviation**2 / (a**2 * deviation**2 + s**2)
    real, fake = (
        Denoiser(Exact(process, name, gaussian_mu(process, center, deviation)), process, name)
        for center in (0.3, 0.3 + shift)
    )
    found = (fake(x_t, t, {}) - real(x_t, t, {})).flatten()
    assert torch.allclose(found, (1 - k * a) * shift, rtol=1e-7, atol=1e-9)


def test_numbers_of_one_gradient_in_every_space():
    process, t = VP(torch.tensor([0.64], dtype=F64)), torch.zeros(1, dtype=torch.int64)
    x_t, real = normal(1, 2), normal(1, 2, seed=1)
    delta = torch.tensor([[0.375, -0.75]], dtype=F64)
    close(to_epsilon(process, real, x_t, t) - to_epsilon(process, real + delta, x_t, t), [[0.5, -1.0]])
    v = [from_x0(process, "v_prediction", mu, x_t, t) for mu in (real, real + delta)]
    close(v[0] - v[1], [[0.625, -1.25]])
    close(score.noise_weight(process, t, x_t) * delta, [[0.18, -0.36]])
    close(score.score_weight(process, t, x_t) * delta, delta * 0.64 / 0.36)
    x = real + torch.tensor([[0.5, -1.5]], dtype=F64)
    close(score.dmd_weight(x, real, eps=0.0), [[1.0]])


def test_weight_of_the_flow_difference():
    s, t = torch.tensor([0.5], dtype=F64), torch.tensor([0.8], dtype=F64)
    w = 0.2 * 0.4 / (0.2 * 0.8 + 0.64)
    close(score.flow_weight(Flow(), s, t, normal(1, 2)), [[w / 0.8]])


@given(st.integers(0, 2**20))
def test_injection_is_the_gradient_and_its_value_half_its_mean_square(seed):
    x, g = normal(3, 2, 2, seed=seed).requires_grad_(), normal(3, 2, 2, seed=seed + 1)
    loss = score.inject(x, g)
    (first,) = torch.autograd.grad(loss, x)
    (second,) = torch.autograd.grad((x * g).mean(), x)
    (third,) = torch.autograd.grad(0.5 * (x - (x - g).detach()).square().mean(), x)
    close(first, second.double(), 1e-15)
    close(first, third, 1e-12)
    close(first, g / 12, 1e-15)
    assert float(loss.detach()) == pytest.approx(0.5 * float(g.square().mean()))


@pytest.mark.parametrize("name", ["dmd", "noise", "score"])
def test_halves_of_a_batch_average_to_its_gradient(name):
    process = TABLE
    weight, bias = normal(2, 2, seed=3).requires_grad_(), normal(2, seed=4)
    z, t = normal(6, 2), at(process, 100, 300, 500, 700, 900, 990)
    real, fake = gaussian_mu(process, 0.4, 0.7), gaussian_mu(process, -0.2, 1.1)

    def gradient(rows):
        x = z[rows] @ weight + bias
        x_t = add_noise(process, x.detach(), normal(6, 2, seed=5)[rows], t[rows])
        w = {
            "dmd": lambda: score.dmd_weight(x, real(x_t, t[rows])),
            "noise": lambda: score.noise_weight(process, t[rows], x),
            "score": lambda: score.score_weight(process, t[rows], x),
        }[name]()
        return torch.autograd.grad(score.inject(x, w * (fake(x_t, t[rows]) - real(x_t, t[rows]))), weight)[0]

    halves = (gradient(slice(0, 3)) + gradient(slice(3, 6))) / 2
    close(gradient(slice(0, 6)), halves, 1e-12)


# ---------------------------------------------------------------- score identity distillation


def sid_gradient(process, t, x, e, real, fake, alpha):
    x = x.clone().requires_grad_()
    x_t = add_noise(process, x, e, t)
    return torch.autograd.grad(score.sid_loss(x, real(x_t, t), fake(x_t, t), alpha), x)[0]


def test_sid_gradient_against_distribution_matching_on_gaussians():
    process, t = EDM(), torch.ones(4, dtype=F64)
    x, e = normal(4, 1), normal(4, 1, seed=1)
    real, fake = gaussian_mu(process, 0.0, 1.0), gaussian_mu(process, 0.6, 1.0)
    x_t = add_noise(process, x, e, t)
    w = (x - real(x_t, t)).abs()
    found = sid_gradient(process, t, x, e, real, fake, 1.0) * w * 4
    close(found, torch.full((4, 1), 0.15, dtype=F64))
    x = x.requires_grad_()
    g = score.dmd_weight(x, real(x_t, t), eps=0.0) * (fake(x_t, t) - real(x_t, t))
    (dmd,) = torch.autograd.grad(score.inject(x, g), x)
    close(found, 0.5 * dmd * w * 4)


@given(st.floats(-1, 2), st.integers(0, 2**20))
def test_sid_with_alpha_one_is_the_product_of_delta_and_the_fakes_error(alpha, seed):
    x, real, fake = normal(3, 4, seed=seed), normal(3, 4, seed=seed + 1), normal(3, 4, seed=seed + 2)
    w = (x - real).abs().mean(1)
    simple = ((real - fake) * (fake - x)).sum(1) / w
    close(score.sid_loss(x, real, fake, 1.0), simple.mean())
    general = ((real - fake) * (real - x - alpha * (real - fake))).sum(1) / w
    close(score.sid_loss(x, real, fake, alpha), general.mean())
    close(score.sid_loss(x, real, fake, 1.0, torch.tensor([1.0, 0.0, 0.0], dtype=F64)), simple[0] / 3)


@given(st.floats(-1, 2), st.sampled_from([1.0, 0.0, -1.5, 4.5]), kinds)
def test_equal_scores_give_no_gradient(alpha, kappa, kind):
    process, name = kind
    t, x, e = at(process, 300, 800), normal(2, 1, 1, 1), normal(2, 1, 1, 1, seed=1)
    mu = Denoiser(Exact(process, name, gaussian_mu(process, 0.4, 0.7)), process, name)
    null = gaussian_mu(process, -0.4, 1.2)
    guided = lambda y, s: guide(null(y, s), mu(y, s, {}), kappa)  # noqa: E731
    close(sid_gradient(process, t, x, e, guided, guided, alpha), torch.zeros_like(x), 1e-12)
    x_t = add_noise(process, x, e, t)
    for w in (
        score.dmd_weight(x, guided(x_t, t)),
        score.noise_weight(process, t, x),
        score.score_weight(process, t, x),
    ):
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(score.inject(x, w * (guided(x_t, t) - guided(x_t, t))), x)
        assert not bool(found.any())


@given(st.floats(-3, 8), kinds, indices)
def test_guidance_commutes_with_the_conversions(kappa, kind, index):
    process, name = kind
    t, x_t = at(process, index), normal(1, 3)
    u, c = normal(1, 3, seed=1), normal(1, 3, seed=2)
    outside = guide(to_x0(process, name, u, x_t, t), to_x0(process, name, c, x_t, t), kappa)
    inside = to_x0(process, name, guide(u, c, kappa), x_t, t)
    assert torch.allclose(outside, inside, rtol=1e-6, atol=1e-6)


def test_guidance_scale_may_differ_by_sample():
    u, c = normal(3, 2), normal(3, 2, seed=1)
    found = guide(u, c, torch.tensor([1.0, 0.0, 3.0]))
    close(found, torch.stack((c[0], u[0 + 1], u[2] + 3 * (c[2] - u[2]))))


def test_weights_of_the_fake_scores_errors():
    prediction, goal = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=F64), torch.zeros(2, 2, dtype=F64)
    close(score.weighted_error(prediction, goal), 2.5)
    close(score.weighted_error(prediction, goal, torch.tensor([2.0, 9.0], dtype=F64)), 5.0)
    close(score.min_snr_plus_one(VP(torch.tensor([0.64], dtype=F64)), torch.tensor([0])), [0.64])
    leaf = goal.clone().requires_grad_()
    assert not score.weighted_error(prediction, leaf).requires_grad


# ---------------------------------------------------------------- rollout


def linear_generator(weight):
    return lambda x_t, t, condition: weight * x_t + 0.1 * t.double().reshape(-1, 1)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_one_step_rollout_is_the_one_step_path_bit_for_bit(process):
    generator, draw = linear_generator(0.3), Draws(7).at("sample", 0)
    found = rollout(generator, process, [999], {}, lambda: draw.normal((4, 2)))
    draw = Draws(7).at("sample", 0)
    z, t = draw.normal((4, 2)), process.at(torch.full((4,), 999))
    start = z if not isinstance(process, EDM) else process.levels(t)[1].float().reshape(-1, 1) * z
    assert torch.equal(found, generator(start, t, {}))


@given(processes, st.integers(1, 5), st.data())
def test_the_graph_runs_through_the_drawn_step_alone(process, steps, data):
    stop = data.draw(st.integers(0, steps - 1))
    weight, seen = torch.tensor(0.3, dtype=F64, requires_grad=True), []

    def generator(x_t, t, condition):
        seen.append((x_t, t))
        return weight * x_t

    noises = iter(normal(steps, 2, 3).unbind())
    x = rollout(generator, process, levels(process, steps), {}, lambda: next(noises), stop=stop, grad=True)
    assert len(seen) == stop + 1
    (gradient,) = torch.autograd.grad(x.sum(), weight)
    close(gradient, seen[-1][0].sum(), 1e-9)  # the input of the last step counts as data
    assert not seen[-1][0].requires_grad
    noises = iter(normal(steps, 2, 3).unbind())
    assert not rollout(generator, process, levels(process, steps), {}, lambda: next(noises), stop=stop).requires_grad


def test_steps_are_noised_anew_at_the_next_level():
    noises = [normal(2, 3, seed=seed) for seed in range(2)]
    process, source = Flow(), iter(noises)
    found = rollout(linear_generator(0.3), process, [999, 499], {}, lambda: next(source))
    x = linear_generator(0.3)(noises[0], torch.ones(2), {})
    x_t = 0.5 * x + 0.5 * noises[1]
    close(found, linear_generator(0.3)(x_t, torch.full((2,), 0.5), {}), 1e-9)


@given(processes, st.integers(10, 999), st.data())
def test_euler_moves_along_the_line_of_one_prediction(process, index, data):
    middle, last = data.draw(st.integers(5, index - 1)), data.draw(st.integers(0, 4))
    x, e = normal(1, 3), normal(1, 3, seed=1)
    t, m, end = at(process, index), at(process, middle), at(process, last)
    x_t = add_noise(process, x, e, t)
    assert torch.allclose(euler_move(process, x_t, x, t, m), add_noise(process, x, e, m), rtol=1e-7, atol=1e-9)
    twice = euler_move(process, euler_move(process, x_t, x, t, m), x, m, end)
    assert torch.allclose(twice, euler_move(process, x_t, x, t, end), rtol=1e-7, atol=1e-9)


def test_start_is_noise_or_the_noised_zero_image():
    z, t = normal(2, 3), at(TABLE, 624, 624)
    assert torch.equal(start_noise(TABLE, z, t), z)
    close(start_noise(TABLE, z, t, "noised"), z * TABLE.levels(t)[1].reshape(-1, 1))
    close(start_noise(EDM(), z, at(EDM(), 999, 999)), 80 * z, 1e-10)


# ---------------------------------------------------------------- times


@given(processes, st.integers(1, 50), st.integers(100, 999), st.booleans())
def test_levels_fall_and_start_at_the_start(process, steps, start, floor):
    found = levels(process, steps, start, floor=floor)
    assert len(found) == steps
    assert found[0] == start
    assert all(b < a for a, b in pairwise(found))
    assert found[-1] >= 0


def test_levels_outside_the_table_are_refused():
    for steps, start in ((0, 10), (12, 10), (1, 1000)):
        with pytest.raises(InputError, match=f"{steps} steps from index {start}"):
            levels(Flow(), steps, start)


@given(
    processes, st.sampled_from(["uniform", "continuous"]), st.integers(0, 900), st.integers(1, 99), st.integers(0, 99)
)
def test_times_lie_between_their_bounds(process, kind, low, gap, seed):
    config = TimesConfig(kind=kind, low=low, high=low + gap)
    t = sample_times(config, process, Draws(seed).at("t", 0), 64)
    index = process.index_of(t)
    assert float(index.min()) >= low - 1e-6
    assert float(index.max()) <= low + gap + 1e-6
    above = sample_times(config, process, Draws(seed).at("t", 0), 64, above=low)
    assert float(process.index_of(above).min()) > low - 1e-6 + (kind == "uniform")


def test_uniform_times_reach_both_ends_equally_often():
    t = sample_times(TimesConfig(low=3, high=6), TABLE, Draws(0).at("t", 0), 8000)
    share = torch.bincount(t, minlength=8).double() / 8000
    assert share[:3].sum() == share[7:].sum() == 0
    # four standard errors of a share of 1/4
    assert bool(((share[3:7] - 0.25).abs() < 4 * math.sqrt(0.25 * 0.75 / 8000)).all())


def test_lognormal_times_have_their_moments_and_need_noise_levels():
    config = TimesConfig(kind="lognormal")
    t = sample_times(config, EDM(), Draws(0).at("t", 0), 20_000).log()
    assert float(t.mean()) == pytest.approx(-1.2, abs=4 * 1.2 / math.sqrt(20_000))
    assert float(t.std()) == pytest.approx(1.2, abs=4 * 1.2 / math.sqrt(2 * 20_000))
    with pytest.raises(InputError, match=r"lognormal.*only for EDM, the teacher is Flow"):
        sample_times(config, Flow(), Draws(0).at("t", 0), 2)


def test_lognormal_times_keep_the_targets_of_a_bounded_network_small():
    """c_out is 0 at the boundary: times there would ask the network for infinite outputs."""
    process = EDM(boundary=0.002)
    t = sample_times(TimesConfig(kind="lognormal", mean=-6.0), process, Draws(0).at("t", 0), 4000)
    goal = target(process, "edm", torch.zeros(4000, 1, dtype=F64), torch.ones(4000, 1, dtype=F64), t)
    assert float(goal.abs().max()) < 2.01


def test_times_above_the_table_are_refused():
    with pytest.raises(InputError, match="no index above 990"):
        sample_times(TimesConfig(), TABLE, Draws(0).at("t", 0), 2, above=990)
    with pytest.raises(ValueError, match="low = 9 must be below high = 9"):
        TimesConfig(low=9, high=9)


@given(processes, st.integers(1, 20))
def test_buckets_are_equal_parts_of_the_table(process, buckets):
    counts = bucket_of(process, process.at(torch.arange(1000)), buckets).bincount(minlength=buckets)
    assert len(counts) == buckets
    assert int(counts.max() - counts.min()) <= 1 + (1000 % buckets > 0) + 1


# ---------------------------------------------------------------- draws


def as_rank(monkeypatch, rank, world):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: world)


def everything(turn, count):
    fork = turn.fork()
    drawn = [turn.normal((count, 2)), turn.uniform(count), turn.integers(3, 9, count), turn.normal((count,), F64)]
    return drawn, [turn.one_uniform(1, 4), turn.one_integer(5)], fork.normal((count, 2))


def test_two_ranks_draw_what_one_would(monkeypatch):
    as_rank(monkeypatch, 0, 1)
    whole, numbers, forked = everything(Draws(3).at("generator", 5), 6)
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        own, same, own_forked = everything(Draws(3).at("generator", 5), 3)
        rows = slice(3 * rank, 3 * rank + 3)
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, own, strict=True))
        assert numbers == same
        assert torch.equal(forked[rows], own_forked)
        assert torch.equal(own_forked, own[0])


def test_draws_follow_from_seed_step_and_turn_so_that_a_resumed_run_sees_them_again():
    draws = Draws(11)
    seen = {}
    for step in range(3):
        for name in ("generator", "fake", "generator"):
            seen.setdefault((step, name), []).append(draws.turn(name, step).normal((2,)))
    resumed = Draws(11)
    assert torch.equal(resumed.turn("generator", 2).normal((2,)), seen[2, "generator"][0])
    assert torch.equal(resumed.turn("generator", 2).normal((2,)), seen[2, "generator"][1])
    assert torch.equal(Draws(11).at("fake", 1).normal((2,)), seen[1, "fake"][0])
    drawn = torch.stack([value for values in seen.values() for value in values])
    assert len(drawn.unique(dim=0)) == 9  # every turn has numbers of its own
    assert not torch.equal(Draws(12).turn("generator", 0).normal((2,)), seen[0, "generator"][0])
