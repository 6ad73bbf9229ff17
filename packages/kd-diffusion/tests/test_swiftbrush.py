"""SwiftBrush: hand-computed gradients, the shared weights, the turns, and training through the real stages."""

import math

import pytest
import torch
from torch import nn

from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.distillation import Networks
from kd_diffusion.engine.process import VP
from kd_diffusion.engine.rollout import rollout
from kd_diffusion.engine.score import inject
from kd_diffusion.integrations.conditioners import ClassConditioner, NoConditioner
from kd_diffusion.integrations.pipelines import open_pipeline
from kd_diffusion.methods.swiftbrush import METHOD, SwiftBrush, SwiftBrushConfig, build
from kd_diffusion.runs import Sampling, adapter_networks, save_pipeline
from kdcore.config import parse
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import train


class Constant(nn.Module):
    """A network called like UNet2DModel that always answers the same."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64).view(1, -1, 1, 1))

    def forward(self, sample, timestep, class_labels=None, return_dict=False):
        return (self.value.expand_as(sample),)


class TwoPoints(nn.Module):
    """Predicts x itself, such that the noise it means is the given one at a = 0.8, s = 0.6."""

    def __init__(self, epsilon):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(epsilon, dtype=torch.float64).view(1, -1, 1, 1))

    def forward(self, sample, timestep, class_labels=None, return_dict=False):
        return ((sample - 0.6 * self.value) / 0.8,)


class Space:
    def __init__(self, *shape):
        self.shape = shape


def points(network, teacher, other, *, abar=0.64, kind="epsilon", generator=None, **args):
    """A distiller of one sample of two numbers, all of whose levels are `abar`."""
    process = VP(torch.full((1000,), abar, dtype=torch.float64))
    networks = Networks(
        teacher=Denoiser(network(teacher), process, kind),
        fake=Denoiser(network(other), process, kind),
        generator=Denoiser(generator or network([0.0, 0.0]), process, kind),
        conditioner=NoConditioner(),
        space=Space(2, 1, 1),
    )
    return SwiftBrush(networks, SwiftBrushConfig.model_validate({"fake": "copy", **args}))


@pytest.mark.parametrize(("network", "kind"), [(Constant, "epsilon"), (TwoPoints, "sample")])
def test_hand_value_of_the_gradient(network, kind):
    distiller = points(network, [1.0, 2.0], [0.5, 3.0], kind=kind)
    x = torch.tensor([[0.3, -0.7]], dtype=torch.float64).view(1, 2, 1, 1).requires_grad_()
    x_t = torch.randn(1, 2, 1, 1, dtype=torch.float64)
    g = distiller.direction(x.detach(), x_t, torch.tensor([500]), {})
    torch.testing.assert_close(g.flatten(), torch.tensor([0.18, -0.36], dtype=torch.float64))
    loss = inject(x, g)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0405, rel=1e-12)
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([0.09, -0.18], dtype=torch.float64))


def test_score_distillation_sampling_is_the_difference_to_the_true_noise():
    distiller = points(Constant, [1.0, 2.0], [0.0, 0.0], fake="noise")
    x, e = (torch.randn(1, 2, 1, 1, dtype=torch.float64) for _ in range(2))
    g = distiller.direction(x, 0.8 * x + 0.6 * e, torch.tensor([500]), {})
    torch.testing.assert_close(g, 0.36 * (torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1) - e))
    assert [player.name for player in distiller.players()] == ["generator"]


def test_hand_value_of_the_fakes_loss():
    distiller = points(Constant, [0.0, 0.0], [1.0, -1.0])
    x, e = torch.randn(1, 2, 1, 1, dtype=torch.float64), torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    assert float(distiller.denoising_loss(x, e, torch.tensor([500]), {})) == pytest.approx(0.64, rel=1e-12)


def test_gradient_of_the_step_from_pure_noise():
    generator = Constant([0.1, -0.2])
    distiller = points(Constant, [1.0, 2.0], [0.5, 3.0], abar=0.0047, generator=generator)
    z = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    x = rollout(distiller.generator, distiller.process, distiller.indices, {}, lambda: z, grad=True)
    torch.testing.assert_close(x.detach(), (z - math.sqrt(1 - 0.0047) * generator.value.detach()) / math.sqrt(0.0047))
    slope = -math.sqrt((1 - 0.0047) / 0.0047)
    assert slope == pytest.approx(-14.5522, abs=1e-4)
    g = distiller.direction(x.detach(), torch.randn_like(x), torch.tensor([500] * 3), {})
    inject(x, g).backward()
    torch.testing.assert_close(generator.value.grad, slope * g.sum(0, keepdim=True) / x.numel())


# ---------------------------------------------------------------- diversity


class Gaussian(nn.Module):
    """The exact denoiser of N(mean, std^2) in every number, both trainable."""

    def __init__(self, process, mean, std):
        super().__init__()
        self.process = process
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())

    def forward(self, sample, timestep, class_labels=None, return_dict=False):
        a, s = (level.float().view(-1, 1, 1, 1) for level in self.process.levels(timestep))
        variance = (2 * self.log_std).exp()
        return (self.mean + a * variance / (a**2 * variance + s**2) * (sample - a * self.mean),)


class Affine(nn.Module):
    """A generator of N(mean, std^2) from unit noise."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))

    def forward(self, sample, timestep, class_labels=None, return_dict=False):
        return (self.mean + self.std * sample,)


def trained_spread(fake, seed):
    """|std| of a generator that starts at N(0, 1), its teacher being N(1, 0.5^2)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    process = VP((1 - betas).cumprod(0))
    networks = Networks(
        *[Denoiser(n, process, "sample") for n in (Gaussian(process, 1.0, 0.5), Gaussian(process, 0.0, 1.0))],
        Denoiser(Affine(0.0, 1.0), process, "sample"),
        ClassConditioner(1, 1),
        Space(2, 1, 1),
    )
    args = SwiftBrushConfig.model_validate({"fake": fake, "guidance_scale": 1.0})
    distiller = SwiftBrush(networks, args, seed=seed)
    optimizers = {
        player.name: torch.optim.Adam(player.module.parameters(), lr={"generator": 0.01, "fake": 0.03}[player.name])
        for player in distiller.players()
    }
    for step in range(600):
        distiller.progress.step = step
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            distiller.loss({"class_labels": torch.zeros(64, dtype=torch.int64)}, name).total().backward()
            optimizer.step()
    return abs(float(distiller.student.std.detach()))


@pytest.mark.slow
def test_the_adapted_teacher_keeps_the_spread_that_the_true_noise_loses():
    """At a fixed x the mean of e is zero, so that without a fake score every sample is drawn to the mode."""
    for seed in range(3):
        kept, lost = trained_spread("copy", seed), trained_spread("noise", seed)
        assert abs(kept - 0.5) < abs(lost - 0.5)
        assert lost < kept


# ---------------------------------------------------------------- on a Stable Diffusion pipeline


def run_config(folder, **overrides):
    values = {
        "method": "swiftbrush",
        "teacher": {"pretrained": str(folder)},
        "data": {"name": "digits", "image_size": 16},
        "method_args": {"lora": {"rank": 2, "alpha": 4, "targets": ["to_q", "to_v"]}},
        "train": {
            "steps": 2,
            "batch_size": 4,
            "optimizer": {"name": "adam", "lr": 1e-4},
            "clip": 1.0,
            "ema": {"decay": 0.9},
        },
        "evaluation": {"samples": 8, "batch_size": 4, "teacher_steps": [1]},
    }
    for name, value in overrides.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return parse(METHOD.config, values)


def text_distiller(folder, *, double=False, **args):
    config = run_config(folder, method_args={"lora": {"rank": 2, "alpha": 4, "targets": ["to_q", "to_v"]}, **args})
    opened = open_pipeline(folder)
    if double:
        opened.network.double()
    networks = adapter_networks(config, opened, {}, None)
    if double:
        for denoiser in (networks.generator, networks.fake):
            denoiser.double()
    return build(config, networks), opened


def prompts(distiller, count=2):
    words = ["a bold seven", "a thin three, tilted left", "an upright one"]
    return distiller.conditioner.tokens([words[i % 3] for i in range(count)])


def perturb_adapters(distiller):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in distiller.fake.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def pair(count=2):
    x, e = (torch.randn(count, 4, 8, 8, dtype=torch.float64) for _ in range(2))
    return x, x + e, torch.tensor([300, 700])[:count]


@pytest.mark.parametrize("kappa", [0.0, 1.0, 4.5])
def test_first_gradient_is_exactly_zero(tiny_text_folder, kappa):
    distiller, _ = text_distiller(tiny_text_folder, guidance_scale=kappa)
    terms = distiller.loss(prompts(distiller), "generator")
    terms.total().backward()
    assert float(terms.total().detach()) == 0
    grads = [parameter.grad for parameter in distiller.student.parameters() if parameter.grad is not None]
    assert len(grads) > 50
    assert all(not bool(grad.any()) for grad in grads)


def test_gradient_is_linear_in_the_scale_when_both_are_guided(tiny_text_folder):
    x, x_t, t = pair()

    def direction(kappa, **args):
        distiller, _ = text_distiller(tiny_text_folder, double=True, guidance_scale=kappa, **args)
        perturb_adapters(distiller)
        return distiller.direction(x, x_t, t, distiller.condition(prompts(distiller)))

    line = -1.5 * direction(0.0) + 2.5 * direction(1.0)
    torch.testing.assert_close(direction(2.5), line, rtol=1e-8, atol=1e-10)
    alone = direction(2.5, fake_guidance_scale=1.0)
    assert float((alone - line).abs().max()) > 1e-3 * float(line.abs().max())


def test_teacher_is_the_fake_without_its_adapters(tiny_text_folder):
    distiller, _ = text_distiller(tiny_text_folder, double=True)
    plain = open_pipeline(tiny_text_folder)
    plain.network.double()
    _, x_t, t = pair()
    condition = distiller.condition(prompts(distiller))
    before = plain.denoiser(x_t, t, condition)
    torch.testing.assert_close(distiller.fake(x_t, t, condition), before, rtol=0, atol=0)
    perturb_adapters(distiller)
    torch.testing.assert_close(distiller.real_score(x_t, t, condition), before, rtol=0, atol=0)
    assert not torch.allclose(distiller.fake(x_t, t, condition), before)
    torch.testing.assert_close(distiller.real_score(x_t, t, condition), before, rtol=0, atol=0)


def take_turns(distiller, steps):
    """A loop of one's own: Adam on whatever each player trains."""
    optimizers = {
        player.name: torch.optim.Adam([p for p in player.module.parameters() if p.requires_grad], lr=1e-3)
        for player in distiller.players()
    }
    for step in range(steps):
        distiller.progress.step = step
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            distiller.loss(prompts(distiller), name).total().backward()
            optimizer.step()


def test_only_adapters_and_student_change(tiny_text_folder):
    distiller, _ = text_distiller(tiny_text_folder)
    before = {name: value.clone() for name, value in distiller.fake.state_dict().items()}
    start = {name: value.clone() for name, value in distiller.student.state_dict().items()}
    take_turns(distiller, 10)
    after = distiller.fake.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "lora_" not in name)
    assert all(not torch.equal(after[name], value) for name, value in before.items() if "lora_" in name)
    assert any(not torch.equal(value, start[name]) for name, value in distiller.student.state_dict().items())
    assert sum("lora_" in name for name in before) == 2 * 2 * sum(
        name.endswith(("attn1.to_q.base_layer.weight", "attn2.to_q.base_layer.weight")) for name in before
    )


def test_each_turn_reaches_its_own_player(tiny_text_folder):
    distiller, _ = text_distiller(tiny_text_folder)
    perturb_adapters(distiller)
    distiller.loss(prompts(distiller), "generator").total().backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in distiller.fake.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in distiller.student.parameters())
    distiller.student.zero_grad()
    distiller.loss(prompts(distiller), "fake").total().backward()
    assert all(p.grad is None for p in distiller.student.parameters())
    grads = {name: p.grad for name, p in distiller.fake.named_parameters() if p.grad is not None}
    assert grads
    assert all("lora_" in name for name in grads)


def test_checkpoints_hold_the_adapters_but_not_the_teacher(tiny_text_folder):
    distiller, _ = text_distiller(tiny_text_folder)
    kept = [name for name in distiller.checkpoint_state() if name.startswith("fake.")]
    assert kept
    assert all("lora_" in name for name in kept)


def test_fake_sees_the_empty_prompt_for_whole_batches():
    process = VP(torch.full((1000,), 0.64, dtype=torch.float64))
    seen = []

    class Recorded(SwiftBrush):
        def denoising_loss(self, x, e, t, condition):
            seen.append(condition["class_labels"])
            return x.sum() * 0

    networks = Networks(
        *[Denoiser(Constant([0.0, 0.0]), process, "epsilon") for _ in range(3)], ClassConditioner(4, 4), Space(2, 1, 1)
    )
    distiller = Recorded(networks, SwiftBrushConfig.model_validate({"fake": "copy"}))
    labels = torch.tensor([0, 1, 2, 3])
    for step in range(2000):
        distiller.progress.step = step
        distiller.loss({"class_labels": labels}, "fake")
    empty = [bool((found == 4).all()) for found in seen]
    assert all(blank or torch.equal(found, labels) for blank, found in zip(empty, seen, strict=True))
    assert 0.08 < sum(empty) / len(empty) < 0.12


def test_shipped_pipeline_takes_the_step_of_the_training(tiny_text_folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    distiller, opened = text_distiller(tiny_text_folder)
    batch = prompts(distiller, 3)
    sample = distiller.sample(batch, "generator", grad=False)
    distiller.draws = type(distiller.draws)(0)
    z = distiller.sample_draw("generator").normal(sample.x.shape)
    save_pipeline(run_config(tiny_text_folder), opened, distiller.student, tmp_path, distiller.indices, Sampling())
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        prompt_embeds=sample.condition["prompt_embeds"],
        latents=z,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, sample.x, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("fake", ["lora", "copy", "noise"])
@pytest.mark.slow
def test_trains_to_a_stock_pipeline(tiny_text_folder, tmp_path, fake):
    from diffusers import DiffusionPipeline

    config = run_config(tiny_text_folder, method_args={"fake": fake, "lora": {"rank": 2, "targets": ["to_q"]}})
    metrics = train(METHOD, config, tmp_path / "run", quiet=True, cpu=True)
    assert metrics["student/nfe"] == 1
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    images = pipe("a bold seven", num_inference_steps=1, guidance_scale=1.0, output_type="np").images
    assert images.shape == (1, 16, 16, 1)


def test_trains_from_prompts_alone(tiny_text_folder, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(["a bold seven", "a thin three", "an upright one", "a nine"] * 3))
    config = run_config(tiny_text_folder, data={"name": "prompts", "root": str(lines), "image_size": None})
    train(METHOD, config, tmp_path / "run", quiet=True, cpu=True)
    assert (tmp_path / "run" / "student" / "unet").is_dir()


@pytest.mark.parametrize("name", ["small", "paper"])
def test_configs_are_valid(name):
    method, config = load_config(f"swiftbrush/{name}")
    assert method.key == "swiftbrush"
    assert {"to_q", "to_v"} <= set(config.method_args.lora.targets)
    assert (name == "small") or config.method_args.lora.targets == ["to_q", "to_v"]  # the paper's


def test_paper_config_builds_on_another_teacher(tiny_text_folder, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(f"a photo number {i}" for i in range(80)))
    method, config = load_config(
        "swiftbrush/paper",
        [
            f"teacher.pretrained={tiny_text_folder}",
            f"data.root={lines}",
            "train.epochs=null",
            "train.steps=1",
            "train.batch_size=2",
            "train.precision=fp32",
            "train.num_workers=0",
            "evaluation.samples=2",
            "evaluation.teacher_steps=[1]",
        ],
    )
    train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert (tmp_path / "run" / "student" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"fake": "adapter"}, "method_args.fake"),
        ({"drop_prompt": 1.5}, "method_args.drop_prompt"),
        ({"lora": {"rank": 0}}, "method_args.lora.rank"),
    ],
)
def test_bad_arguments(tiny_text_folder, args, message):
    with pytest.raises(InputError, match=message):
        run_config(tiny_text_folder, method_args=args)


def test_targets_that_the_network_lacks(tiny_text_folder):
    with pytest.raises(InputError, match=r"method_args\.lora\.targets"):
        text_distiller(tiny_text_folder, lora={"targets": ["query"]})
