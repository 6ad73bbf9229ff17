"""Phased DMD: whole runs, what they leave, video pipelines, and the paper's example in one dimension."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import kd_diffusion.integrations.experts  # noqa: F401 - what the folders of students name
from kd_diffusion import testing
from kd_diffusion.engine.process import Flow, add_noise, renoise, subinterval_target, target
from kd_diffusion.engine.rollout import rollout
from kd_diffusion.engine.score import weighted_error
from kd_diffusion.engine.timesteps import levels
from kd_diffusion.integrations.experts import NoiseLevelExperts
from kd_diffusion.integrations.pipelines import open_pipeline, opened, sampler_config
from kd_diffusion.methods import phased_dmd
from kd_diffusion.methods.phased_dmd import clamped_weight
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import train

FAST = [
    "train.steps=2",
    "train.batch_size=4",
    "train.num_workers=0",
    "train.precision=fp32",
    "train.optimizer.lr=1.0e-3",
    "method_args.fake_updates=1",
    "evaluation.samples=20",
    "evaluation.batch_size=20",
    "evaluation.teacher_steps=[2]",
]


@pytest.fixture(scope="module")
def flow_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "flow"
    testing.flow_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "wan"
    testing.wan_pipeline().save_pretrained(folder)
    return folder


def small(folder, *overrides):
    given = ["teacher.world=null", f"teacher.pretrained={folder}", *FAST, *overrides]
    return load_config("phased_dmd/small", given)


def same(first, second) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_leaves_a_mixture_that_stock_diffusers_samples(flow_folder, tmp_path, monkeypatch):
    starts = {}
    original = phased_dmd.PhasedDMD.__init__

    def kept(self, networks, args, number=1, *rest, **given):
        original(self, networks, args, number, *rest, **given)
        starts[number] = (same(self.fake.network, self._teacher[0].network), self)

    monkeypatch.setattr(phased_dmd.PhasedDMD, "__init__", kept)
    method, config = small(flow_folder)
    run = tmp_path / "run"
    train(method, config, run, quiet=True, cpu=True)

    assert {number: equal for number, (equal, _) in starts.items()} == {1: True, 2: True}  # anew from the teacher
    first = open_pipeline(run / "phase_1").network
    pipe = DiffusionPipeline.from_pretrained(run / "student")
    assert isinstance(pipe.transformer, NoiseLevelExperts)
    assert same(pipe.transformer.experts[0], first)  # bit for bit what phase 1 left
    assert not same(pipe.transformer.experts[1], first)
    teacher = open_pipeline(flow_folder).network
    assert not same(pipe.transformer.experts[1], teacher)
    before = starts[2][1].before
    assert all(p.grad is None for p in before.parameters())

    kd = json.loads((run / "student" / "kd.json").read_text())
    assert kd["levels"] == [999, 749, 499, 249]
    # Stock sampling is the rollout that was trained.
    labels = [1, 2, 3]
    shown = pipe(labels, guidance_scale=1.0, num_inference_steps=4, output_type="np", generator=torch.manual_seed(5))
    found = opened(pipe)
    noise = torch.randn(3, 4, 4, 4, generator=torch.manual_seed(5))
    x = rollout(
        found.denoiser.eval(),
        found.process,
        kd["levels"],
        {"class_labels": torch.tensor(labels)},
        lambda: noise,
        renoise="euler",
    )
    pixels = found.space.decode(x)
    torch.testing.assert_close(
        torch.from_numpy(shown.images), (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-5, rtol=1e-4
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["student/nfe"] == 4


@pytest.mark.slow
def test_resuming_between_the_phases_gives_the_same_student(flow_folder, tmp_path):
    method, config = small(flow_folder, "train.steps=3", "train.checkpoint_every=2")
    train(method, config, tmp_path / "whole", quiet=True, cpu=True)
    original = phased_dmd.PhasedDMD.loss

    def broken(self, batch, player="generator"):
        if self.phase.number == 2 and self.progress.step == 2:
            raise KeyboardInterrupt
        return original(self, batch, player)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phased_dmd.PhasedDMD, "loss", broken)
        with pytest.raises(KeyboardInterrupt):
            train(method, config, tmp_path / "cut", quiet=True, cpu=True)
    train(method, config, tmp_path / "cut", resume=True, quiet=True, cpu=True)
    students = [open_pipeline(tmp_path / name / "student").network for name in ("whole", "cut")]
    assert same(*students)


@pytest.mark.slow
def test_adapters_of_every_expert_are_kept(flow_folder, tmp_path):
    method, config = small(flow_folder, "student.lora.rank=2", "student.lora.alpha=2")
    train(method, config, tmp_path / "run", quiet=True, cpu=True)
    files = sorted(path.parent.name for path in (tmp_path / "run" / "student" / "lora").rglob("*.safetensors"))
    assert files == ["expert_1", "expert_2"]
    student, teacher = (open_pipeline(path).network for path in (tmp_path / "run" / "student", flow_folder))
    changed = {
        name
        for name, value in teacher.state_dict().items()
        if not torch.equal(value, student.experts[0].state_dict()[name])
    }
    assert changed
    assert all(any(part in name for part in ("to_q", "to_k", "to_v", "to_out.0")) for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["random_stop", "random_stop_two_experts", "trainer_form", "interval_times"])
def test_the_arms_train(flow_folder, tmp_path, arm):
    method, config = small(flow_folder)
    overrides = [f"{key}={json.dumps(value)}" for key, value in config.compare[arm].items() if key != "train.steps"]
    method, config = small(flow_folder, *overrides)
    train(method, config, tmp_path / "run", quiet=True, cpu=True)
    network = open_pipeline(tmp_path / "run" / "student").network
    assert isinstance(network, NoiseLevelExperts) == (arm != "random_stop")


def test_configs_are_valid():
    for name in ("small", "paper"):
        method, config = load_config(f"phased_dmd/{name}")
        assert method.key == "phased_dmd"
        assert (config.method_args.steps, config.method_args.phases) == (4, 2)


def test_a_teacher_of_another_process_is_refused_before_the_run(tiny_unet_folder, tmp_path):
    method, config = small(tiny_unet_folder)
    with pytest.raises(InputError, match="allowed: a rectified flow"):
        train(method, config, tmp_path / "run", quiet=True, cpu=True)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (4, 7.0)])
def test_the_saved_scheduler_steps_at_the_students_levels(steps, shift):
    process, taught = Flow(shift), testing.flow_pipeline().scheduler
    indices = levels(process, steps)
    scheduler = sampler_config(taught, "flow_prediction", process, indices, renoise="euler")
    scheduler.set_timesteps(steps)
    expected = process.at(torch.tensor([*indices, -1]))
    torch.testing.assert_close(scheduler.sigmas, expected)
    torch.testing.assert_close(scheduler.timesteps, process.network_time(expected[:-1]))


# ---------------------------------------------------------------- video


def test_a_pipeline_of_two_networks_is_opened_as_one(wan_folder):
    found = open_pipeline(wan_folder, size=(5, 16, 16))
    assert found.space.shape == (4, 2, 4, 4)
    assert found.network.config.boundaries == [0.875]
    assert found.process.shift == 3.0
    condition = found.conditioner.embed(found.conditioner.tokens(["a cat", "a dog"]))
    pipe_embeds, _ = found.pipe.encode_prompt(
        ["a cat", "a dog"], do_classifier_free_guidance=False, max_sequence_length=512
    )
    torch.testing.assert_close(condition["prompt_embeds"], pipe_embeds)
    x, t = torch.randn(2, *found.space.shape), torch.tensor([0.9, 0.5], dtype=torch.float64)
    with torch.no_grad():
        both = found.denoiser.output(x, t, condition)
        for row, network in enumerate((found.pipe.transformer, found.pipe.transformer_2)):
            one = slice(row, row + 1)
            embeds = condition["prompt_embeds"][one]
            alone = network(x[one], timestep=1000 * t[one].float(), encoder_hidden_states=embeds, return_dict=False)[0]
            torch.testing.assert_close(both[one], alone)
    video = found.space.decode(x)
    assert video.shape == (2, 3, 5, 16, 16)
    assert found.space.encode(video.clamp(-1, 1)).shape == x.shape


def test_frames_that_a_pipeline_cannot_make(wan_folder):
    with pytest.raises(InputError, match=r"teacher.size = \[3, 16, 16\]"):
        open_pipeline(wan_folder, size=(3, 16, 16))


@pytest.mark.slow
def test_paper_config_builds_on_another_teacher(wan_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a video of {letter}" for letter in "abcdefgh"))
    method, config = load_config(
        "phased_dmd/paper",
        [
            f"teacher.pretrained={wan_folder}",
            "teacher.dtype=fp32",
            "teacher.size=[5,16,16]",
            f"data.root={prompts}",
            *FAST,
            "train.batch_size=2",
            "evaluation.samples=2",
        ],
    )
    run = tmp_path / "run"
    train(method, config, run, quiet=True, cpu=True)
    pipe = DiffusionPipeline.from_pretrained(run / "student")
    assert 0.875 < pipe.config.boundary_ratio < 0.876
    assert not same(pipe.transformer, pipe.transformer_2)
    used = []
    for name in ("transformer", "transformer_2"):
        network = getattr(pipe, name)
        network.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: used.append((name, float(kwargs["timestep"][0]))), with_kwargs=True
        )
    given = {"height": 16, "width": 16, "num_frames": 5, "output_type": "latent", "max_sequence_length": 512}
    latents = torch.randn(1, 4, 2, 4, 4, generator=torch.manual_seed(1))
    shown = pipe("a video of a", guidance_scale=1.0, num_inference_steps=4, latents=latents.clone(), **given).frames
    assert [name for name, _ in used] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert [time for _, time in used] == pytest.approx([1000.0, 954.5454, 875.0, 700.0], abs=1e-3)
    found = open_pipeline(run / "student", size=(5, 16, 16))
    condition = found.conditioner.embed(found.conditioner.tokens(["a video of a"]))
    levels = json.loads((run / "student" / "kd.json").read_text())["levels"]
    x = rollout(found.denoiser.eval(), found.process, levels, condition, lambda: latents, renoise="euler")
    torch.testing.assert_close(shown, x, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the paper's example in one dimension

MODES = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
FLOW = Flow()
END = 0.5  # of the interval (END, 1]


def exact_flow(x_t: torch.Tensor, t: float) -> torch.Tensor:
    """E[e - x_0 | x_t] for x_0 on the four modes, equally likely; x_t (N,)."""
    weights = (-(x_t[:, None] - (1 - t) * MODES).square() / (2 * t * t)).softmax(1)
    x0 = weights @ MODES
    return (x_t - x0) / t


def trained_flow(arm: str, seed: int):
    """A flow (x_t, t) -> u that learned from clean samples on (0, 1], or on (END, 1] from noisy ones alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()]
        network = nn.Sequential(*layers, nn.Linear(64, 1)).double()
    steps, size = 1000, 512
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    s = torch.full((size,), 0.0 if arm == "clean" else END, dtype=torch.float64)
    for _ in range(steps):
        x = MODES[torch.randint(4, (size, 1), generator=generator)]
        noise, e = torch.randn(2, size, 1, generator=generator, dtype=torch.float64)
        share = torch.rand(size, generator=generator, dtype=torch.float64)
        x_s = add_noise(FLOW, x, noise, s)
        t = s + (1 - s) * (0.02 + 0.98 * share)
        if arm == "biased":
            goal = target(FLOW, "flow_prediction", x_s, e, t)
        else:
            goal = subinterval_target(FLOW, "flow_prediction", x_s, e, s, t)
        x_t = renoise(FLOW, x_s, e, s, t)
        output = network(torch.cat((x_t, t[:, None]), 1))
        loss = weighted_error(output, goal, clamped_weight(FLOW, s, t) if arm == "clamped" else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def flow(x_t: torch.Tensor, t: float) -> torch.Tensor:
        return network(torch.stack((x_t, torch.full_like(x_t, t)), 1))[:, 0]

    return flow


def end_points(flow) -> torch.Tensor:
    """Where 50 Euler steps from t = 1 to END end, for 512 quantiles of the noise."""
    x = torch.special.ndtri((torch.arange(512, dtype=torch.float64) + 0.5) / 512)
    levels = torch.linspace(1, END, 51, dtype=torch.float64).tolist()
    for level, to in pairwise(levels):
        x = x + (to - level) * flow(x, level)
    return x


@pytest.mark.slow
def test_unbiased_target_learns_the_flow_of_clean_data_and_the_biased_one_another():
    exact = end_points(exact_flow)
    errors = {arm: [] for arm in ("clean", "unbiased", "clamped", "biased")}
    for seed in range(3):
        for arm, found in errors.items():
            found.append(float((end_points(trained_flow(arm, seed)) - exact).square().mean().sqrt()))
    # The worst run without bias is better than the best with it, with the clamp and without.
    assert max(errors["unbiased"] + errors["clamped"]) < min(errors["biased"])
