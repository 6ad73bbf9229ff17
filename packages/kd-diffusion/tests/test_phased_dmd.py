"""Phased DMD: the paper's numbers by hand, experts by noise level, who learns from what, and whole runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kd_diffusion.integrations.experts  # noqa: F401 - what the folders of students name
from kd_diffusion import testing
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.distillation import Networks
from kd_diffusion.engine.draws import Draws
from kd_diffusion.engine.process import Flow, renoise, renoising, subinterval_target, target
from kd_diffusion.engine.score import dmd_weight, flow_weight
from kd_diffusion.integrations.experts import NoiseLevelExperts, above, at_level
from kd_diffusion.integrations.pipelines import opened
from kd_diffusion.methods.dmd2 import DMD2, DMD2Config
from kd_diffusion.methods.phased_dmd import PhasedDMD, PhasedDMDConfig, boundaries_of, clamped_weight, phases_of
from kdcore.errors import InputError

FLOW = Flow()


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def point(value: float) -> torch.Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


def coefficients_of_target(s: float, t: float) -> tuple[float, float]:
    """The target's factors on e and on x_s."""
    ends = (FLOW, "flow_prediction")
    on_e = subinterval_target(*ends, point(0.0), point(1.0), double(s), double(t))
    on_x = subinterval_target(*ends, point(1.0), point(0.0), double(s), double(t))
    return on_e.item(), on_x.item()


# ---------------------------------------------------------------- the equations


@pytest.mark.parametrize(
    ("s", "t", "r", "b", "c", "on_x", "w"),
    [
        (0.5, 0.8, 0.4, 0.7745966692, 1.2909944487, -2.0, 0.1),
        (0.25, 0.7, 0.4, 0.6928203230, 1.0584754935, -1.3333333333, 0.1714285714),
    ],
)
def test_hand_values_of_renoising_target_and_weight(s, t, r, b, c, on_x, w):
    found_r, found_b = renoising(FLOW, double(s), double(t))
    assert found_r.item() == pytest.approx(r, abs=1e-10)
    assert found_b.item() == pytest.approx(b, abs=1e-10)
    assert coefficients_of_target(s, t) == pytest.approx((c, on_x), abs=1e-9)
    weight = flow_weight(FLOW, double(s), double(t), point(0.0)).item() * t  # on u_T - u_F instead of mu_F - mu_T
    assert weight == pytest.approx(w, abs=1e-10)


@given(st.floats(0.001, 1.0))
def test_from_clean_samples_everything_is_the_usual(t):
    r, b = renoising(FLOW, double(0.0), double(t))
    assert (r.item(), b.item()) == pytest.approx((1 - t, t), abs=1e-12)
    assert coefficients_of_target(0.0, t) == pytest.approx((1.0, -1.0), abs=1e-9)
    weight = flow_weight(FLOW, double(0.0), double(t), point(0.0)).item() * t
    assert weight == pytest.approx((1 - t) ** 2 / ((1 - t) * t + t**2), abs=1e-9)


@given(st.floats(0.0, 0.98), st.floats(0.001, 1.0))
def test_noising_in_two_steps_is_noising_in_one(s, share):
    t = s + share * (1 - s)
    r, b = (value.item() for value in renoising(FLOW, double(s), double(t)))
    assert r * (1 - s) == pytest.approx(1 - t, abs=1e-12)
    assert (r * s) ** 2 + b**2 == pytest.approx(t**2, abs=1e-9)


def line_given_x_t(aim, s: float = 0.5, t: float = 0.8) -> tuple[float, float]:
    """(intercept, slope) of E[aim | x_t] for x_0 ~ N(0.7, 1.69); aim(x_0, e_s, e) is linear, so a line is exact."""
    spread = double(1.3, 1.0, 1.0)  # deviations of x_0, of the noise in x_s, and of the noise that is added

    def linear(function) -> torch.Tensor:
        units = [function(*(point(float(i == j)) for j in range(3))).item() for i in range(3)]
        return double(*units)

    def noised(x, e_s, e):
        return renoise(FLOW, (1 - s) * x + s * e_s, e, double(s), double(t))

    on_x_t, on_aim = linear(noised) * spread, linear(aim) * spread
    slope = float((on_x_t * on_aim).sum() / on_x_t.square().sum())
    return 0.7 * float(linear(aim)[0]) - slope * 0.7 * float(linear(noised)[0]), slope


def test_the_target_is_unbiased_and_the_obvious_one_is_not():
    s, t = double(0.5), double(0.8)

    def unbiased(x, e_s, e):
        return subinterval_target(FLOW, "flow_prediction", 0.5 * x + 0.5 * e_s, e, s, t)

    def biased(x, e_s, e):
        return target(FLOW, "flow_prediction", 0.5 * x + 0.5 * e_s, e, t)

    def standard(x, e_s, e):  # e_0 - x_0 where x_t = a_t x_0 + t e_0
        x_t = renoise(FLOW, 0.5 * x + 0.5 * e_s, e, s, t)
        return (x_t - 0.2 * x) / 0.8 - x

    assert line_given_x_t(unbiased) == pytest.approx((-0.79141, 0.65291), abs=1e-5)
    assert line_given_x_t(unbiased) == pytest.approx(line_given_x_t(standard), abs=1e-12)
    assert line_given_x_t(biased) == pytest.approx((-0.451, 0.715), abs=1e-3)


def test_target_of_a_noise_predictor():
    found = subinterval_target(FLOW, "epsilon", point(0.3), point(1.0), double(0.5), double(0.8))
    assert found.item() == pytest.approx(1.0327955590, abs=1e-10)


def test_weight_of_the_fake_score_is_clamped():
    s = double(0.5, 0.0)
    t = double(0.8, 0.05**0.5)  # b^2 = 0.6 and 0.05
    torch.testing.assert_close(clamped_weight(FLOW, s, t), double(1.0, 0.5))


# ---------------------------------------------------------------- levels and experts


def test_levels_of_wan_are_shifted_together():
    process, args = Flow(7.0), PhasedDMDConfig.model_validate({})
    first, second = phases_of(process, args)
    assert (first.steps, first.end, second.steps, second.end) == ([999, 749], 499, [499, 249], -1)
    ends = process.at(torch.tensor([first.end, second.end]))
    torch.testing.assert_close(ends, double(0.875, 0.0))
    (boundary,) = boundaries_of(process, args)
    assert 0.875 < boundary < 0.876  # the step at t_1 belongs to the second expert


def test_each_expert_owns_the_levels_from_its_boundary_on():
    experts = NoiseLevelExperts.of([testing.tiny_dit(seed) for seed in range(3)], [0.75, 0.25]).eval()
    x, labels = torch.randn(6, 4, 4, 4), torch.arange(6)
    time = torch.tensor([1000.0, 750.0, 749.9, 250.0, 249.9, 0.0])
    owner = [0, 0, 1, 1, 2, 2]
    assert experts.owner(time).tolist() == owner
    with torch.no_grad():
        mixed = experts(x, timestep=time, class_labels=labels, return_dict=False)[0]
        for row, index in enumerate(owner):
            one = slice(row, row + 1)
            alone = experts.experts[index](x[one], timestep=time[one], class_labels=labels[one]).sample
            torch.testing.assert_close(mixed[one], alone)
    assert above(experts, 0.75) is experts.experts[0]
    assert len(above(experts, 0.5).experts) == 2
    assert above(experts, 0.0).config.boundaries == [0.75, 0.25]
    assert at_level(experts, 0.3) is experts.experts[1]


def test_experts_come_back_from_a_folder(tmp_path):
    experts = NoiseLevelExperts.of([testing.tiny_dit(seed) for seed in range(2)], [0.5])
    experts.save_pretrained(tmp_path)
    found = NoiseLevelExperts.from_pretrained(tmp_path)
    assert found.config.boundaries == [0.5]
    assert found.config.sample_size == 4  # of the experts
    before, after = experts.state_dict(), found.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("boundaries", [[0.5, 0.5], [0.2, 0.6], [1.0], [0.0]])
def test_boundaries_must_fall(boundaries):
    with pytest.raises(InputError, match="boundaries"):
        NoiseLevelExperts.of([testing.tiny_dit()] * (len(boundaries) + 1), boundaries)


def test_experts_have_a_class_of_diffusers():
    with pytest.raises(InputError, match=r"network_class = 'load'"):
        NoiseLevelExperts("load", {}, [])


# ---------------------------------------------------------------- who learns from what


def phased(number: int = 1, *, different: bool = True, dtype=torch.float64, **arguments) -> PhasedDMD:
    """A phase on tiny networks; the fake score is another network than the teacher where `different`."""
    found = opened(testing.flow_pipeline())
    found.network.to(dtype)
    args = PhasedDMDConfig.model_validate({"guidance_scale": 1.0, **arguments})
    fake = testing.tiny_dit(5 if different else 0).to(dtype)
    networks = Networks(
        found.denoiser,
        found.denoiser_for(fake),
        found.denoiser_for(testing.tiny_dit(6).to(dtype)),
        found.conditioner,
        found.space,
    )
    before = None
    if number > 1:
        earlier = [testing.tiny_dit(10 + n).to(dtype) for n in range(number - 1)]
        boundaries = boundaries_of(found.process, args)[: number - 2]
        network = earlier[0] if number == 2 else NoiseLevelExperts.of(earlier, boundaries)
        before = Denoiser(network, found.process, "flow_prediction")
    distiller = PhasedDMD(networks, args, number, before, seed=3)
    normal = distiller.draws.turn

    def turn(*given):  # noise in the networks' type
        draw = normal(*given)
        plain = draw.normal
        draw.normal = lambda shape: plain(shape, torch.float64).to(dtype)
        return draw

    distiller.draws.turn = turn
    return distiller


def batch(count: int = 4) -> dict:
    return {"class_labels": torch.arange(count) % 10}


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]


@pytest.mark.parametrize("form", ["flow", "x0"])
@pytest.mark.parametrize("kappa", [1.0, 4.0])
def test_no_gradient_where_fake_and_guided_teacher_agree(form, kappa):
    distiller = phased(different=False, form=form, guidance_scale=kappa, fake_guidance_scale=kappa)
    distiller.loss(batch(), "generator").total().backward()
    assert max(p.grad.abs().max() for p in distiller.student.parameters() if p.grad is not None) < 1e-12


@pytest.mark.parametrize("form", ["flow", "x0"])
@pytest.mark.parametrize("number", [1, 2])
def test_each_turn_trains_its_own_network(form, number):
    distiller = phased(number, form=form)
    others = [distiller.real_score, distiller.fake, *([distiller.before] if number > 1 else [])]
    distiller.loss(batch(), "generator").total().backward()
    assert gradients(distiller.student)
    distiller.zero_grad()
    distiller.loss(batch(), "fake").total().backward()
    assert gradients(distiller.fake)
    for module in (distiller.student, *(m for m in others if m is not distiller.fake)):
        assert not gradients(module)


def test_both_forms_push_the_flow_of_the_step_the_same_way():
    """dL/du of one sample's one-step phase: both are a positive multiple of u_F - u_T."""
    found = {}
    for form in ("flow", "x0"):
        distiller = phased(form=form, steps=2, phases=2)
        kept = []
        distiller.generator.network.register_forward_hook(lambda m, args, output, kept=kept: kept.append(output))
        terms = distiller.loss(batch(1), "generator")
        (found[form],) = torch.autograd.grad(terms.total(), kept[0][0])
    cosine = torch.nn.functional.cosine_similarity(found["flow"].flatten(), found["x0"].flatten(), dim=0)
    assert cosine.item() == pytest.approx(1.0, abs=1e-9)


def test_one_phase_of_one_step_in_the_trainers_form_is_dmd_with_guidance():
    arguments = {"steps": 1, "guidance_scale": 3.0}
    ours = phased(phases=1, form="x0", **arguments)
    networks = Networks(ours.real_score, ours.fake, ours.generator, ours.conditioner, ours.space)
    times = ours.args.times.model_dump()
    dmd = DMD2(networks, DMD2Config.model_validate({"gan": None, "times": times, **arguments}), seed=3)
    dmd.draws = phased(phases=1, **arguments).draws
    dmd.weight = lambda x, mu_real, t: dmd_weight(x, mu_real, eps=0.0)  # the guards of the division differ
    found = []
    for distiller in (ours, dmd):
        distiller.zero_grad()
        distiller.loss(batch(), "generator").total().backward()
        found.append([p.grad.clone() for p in distiller.student.parameters() if p.grad is not None])
    assert max(g.abs().max() for g in found[0]) > 0
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-12)


class Flat(nn.Module):
    """u = slope * x + 0.1 time / 1000, called like UNet2DModel."""

    def __init__(self, slope: float):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return (self.slope * sample + 1e-4 * timestep.reshape(-1, 1, 1, 1),)


def flat_phase(number: int, **arguments) -> PhasedDMD:
    distiller = phased(1, **arguments)
    denoisers = [Denoiser(Flat(slope), distiller.process, "flow_prediction") for slope in (0.3, -0.2, 0.5, 0.1)]
    networks = Networks(*denoisers[:3], distiller.conditioner, distiller.space)
    made = PhasedDMD(networks, distiller.args, number, denoisers[3] if number > 1 else None, seed=3)
    made.draws = distiller.draws
    return made


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("stop", [0, 1])
def test_the_path_is_eulers_and_leaves_for_the_end_of_the_phase(number, stop):
    distiller = flat_phase(number)
    distiller.stop_step = lambda draw: 2 * (number - 1) + stop
    sample = distiller.sample(batch(2), "generator", grad=True)
    levels = [1.0, 0.75, 0.5, 0.25][: 2 * (number - 1) + stop + 1]
    x = Draws(3).at("sample generator", 0).normal((2, *distiller.space.shape), torch.float64)
    for level, to in zip(levels, [*levels[1:], 0.5 if number == 1 else 0.0], strict=True):
        slope = 0.1 if number == 2 and level > 0.5 else 0.5
        x = x + (to - level) * (slope * x + 0.1 * level)
    torch.testing.assert_close(sample.x, x)
    sample.x.sum().backward()
    assert distiller.generator.network.slope.grad is not None
    assert number == 1 or distiller.before.network.slope.grad is None


def test_the_jump_from_the_last_step_is_that_step():
    """A path that leaves at the phase's last step is the whole path that the fake score sees."""
    distiller = phased(2)
    distiller.stop_step = lambda draw: 3
    distiller.sample_draw = lambda player: Draws(8).at("one", 0)
    left = distiller.sample({"class_labels": torch.arange(2)}, "generator", grad=False)
    whole = distiller.sample({"class_labels": torch.arange(2)}, "fake", grad=False)
    assert torch.equal(left.x, whole.x)


@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([1, 2, 4]), st.booleans())
def test_every_time_is_above_the_end_of_the_phase(seed, margin, phases, interval):
    args = PhasedDMDConfig.model_validate(
        {"phases": phases, "margin": margin, "interval": interval, "guidance_scale": 1.0}
    )
    for phase in phases_of(FLOW, args):
        distiller = PhasedDMD.__new__(PhasedDMD)
        nn.Module.__init__(distiller)
        distiller.args, distiller.process, distiller.phase = args, FLOW, phase
        for config in (args.times, args.fake_times):
            t = distiller.times(config, Draws(seed).at("t", 0), 64)
            above_end = t - FLOW.at(torch.tensor(phase.end))
            assert bool((above_end >= margin / FLOW.size - 1e-12).all())
            assert bool((t <= FLOW.at(torch.tensor(phase.steps[0] if interval else 999)) + 1e-12).all())


def test_the_stop_step_is_uniform_over_the_phase():
    distiller = phased(2)
    stops = [distiller.stop_step(Draws(0).at("stop", step)) for step in range(400)]
    assert set(stops) == {2, 3}
    assert 140 < stops.count(2) < 260  # six deviations


def test_the_biased_ablation_learns_another_target():
    losses = {kind: phased(fake_target=kind).loss(batch(), "fake").total().item() for kind in ("unbiased", "biased")}
    assert losses["unbiased"] != losses["biased"]
    last = {kind: phased(2, fake_target=kind).loss(batch(), "fake").total().item() for kind in ("unbiased", "biased")}
    assert last["unbiased"] == pytest.approx(last["biased"], rel=1e-9)  # s = 0: they are one


def test_adding_the_clamp_only_weighs_times_near_the_end_less():
    plain, clamped = (phased(clamp=clamp).loss(batch(64), "fake").total().item() for clamp in (None, 10.0))
    assert 0 < clamped < plain


# ---------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"steps": 4, "phases": 3}, "steps = 4 for 3 phases of 1 experts"),
        ({"steps": 4, "phases": 2, "experts_per_phase": 4}, "2 phases of 4 experts"),
        ({"gan": {}}, "gan: null"),
        ({"start_index": 500}, "start_index: null"),
        ({"margin": 0}, "margin"),
    ],
)
def test_arguments_that_do_not_fit(arguments, names):
    with pytest.raises(ValueError, match=names):
        PhasedDMDConfig.model_validate(arguments)


def test_a_teacher_that_is_no_flow_is_refused():
    found = opened(testing.unet_pipeline(), null_class=10)
    networks = Networks(found.denoiser, found.copied(), found.copied(), found.conditioner, found.space)
    with pytest.raises(InputError, match="allowed: a rectified flow"):
        PhasedDMD(networks, PhasedDMDConfig.model_validate({}))
