"""SiD: the saved sampler against the training's rollout, whole runs, the shipped configs, and the plane."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from kd_diffusion.engine.timesteps import levels
from kd_diffusion.evaluation import student_function
from kd_diffusion.integrations.pipelines import open_pipeline
from kd_diffusion.methods.sid import METHOD, SAMPLING, build
from kd_diffusion.runs import Networks, save_pipeline
from kdcore import run
from kdcore.compare import load_arms
from kdcore.config import override, read_yaml
from kdcore.errors import InputError
from kdcore.method import config_folder, config_of

CONFIGS = sorted(path.stem for path in config_folder("sid").glob("*.yaml"))
FAST = {
    "train.steps": 3,
    "train.batch_size": 8,
    "train.optimizer": {"name": "adam", "lr": 1e-3, "betas": [0.0, 0.999]},
    "evaluation": {"samples": 40, "batch_size": 40, "teacher_steps": [1]},
}


def config(folder, **changes):
    values = {"method": "sid", "teacher": {"pretrained": str(folder)}, "train": {"steps": 1}}
    return config_of(METHOD, override(values, {**FAST, **changes}))


def digits(folder, **changes):
    """On the 8x8 digits, with the class of none."""
    return config(folder, **{"teacher.null_class": 10, "data": {"name": "digits"}, **changes})


def saved(tmp_path, folder, steps: int):
    """A student of so many steps with the teacher's weights, saved as the stage saves it."""
    settings = config(folder, **{"method_args.steps": steps, "method_args.guidance_scale": 1.0})
    opened = open_pipeline(folder)
    networks = Networks(opened.denoiser, opened.copied(), opened.copied(), opened.conditioner, opened.space)
    method = build(settings, networks)
    method.eval()
    save_pipeline(settings, opened, method.student, tmp_path / "student", method.indices, SAMPLING)
    return method, DiffusionPipeline.from_pretrained(tmp_path / "student"), open_pipeline(tmp_path / "student")


class FromGenerator:
    """Noise in the order in which a stock pipeline draws it."""

    def __init__(self, seed: int, count: int):
        self.generator, self.count = torch.Generator().manual_seed(seed), count

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator)


# ---------------------------------------------------------------- the saved sampler


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_stock_pipeline_takes_the_trained_steps_on_edm(tmp_path, tiny_unet_folder, steps):
    method, pipe, own = saved(tmp_path, tiny_unet_folder, steps)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.tensor([1, 2, 3])
    stock = pipe(
        batch_size=3,
        class_labels=labels,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    x = student_function(own, steps, start=SAMPLING.start, floor=SAMPLING.floor)(
        {"class_labels": labels}, FromGenerator(5, 3)
    )
    # The scheduler noises with (sigma^2 - sigma_min^2)^(1/2), short of sigma by less than 1e-4 at these levels.
    torch.testing.assert_close(stock, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=5e-4)
    trained = method.process.at(torch.tensor(method.indices, dtype=torch.float64))
    shipped = own.process.at(torch.tensor(levels(own.process, steps), dtype=torch.float64))
    torch.testing.assert_close(trained, shipped, rtol=1e-6, atol=0)
    assert trained[0].item() == pytest.approx(2.5)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_stock_pipeline_takes_the_trained_steps_on_a_table(tmp_path, tiny_text_folder, steps):
    """One step needs nothing else; several need the levels of kd.json, and the first latent scaled to s_t z."""
    method, pipe, own = saved(tmp_path, tiny_text_folder, steps)
    pipe.set_progress_bar_config(disable=True)
    notes = json.loads((tmp_path / "student" / "kd.json").read_text())
    assert notes["levels"] == method.indices == [625, 468, 312, 156][:steps]
    z = torch.randn(2, *own.space.shape, generator=torch.Generator().manual_seed(6))
    s = method.process.levels(torch.tensor(notes["levels"][0]))[1].item()
    arguments = {"num_inference_steps": 1, "latents": z}
    if steps > 1:
        arguments = {"timesteps": notes["levels"], "latents": s * z}
    stock = pipe(
        ["a two", "seven"],
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **arguments,
    ).images
    draw, noises = FromGenerator(5, 2), [z]
    draw.normal = lambda shape: noises.pop() if noises else torch.randn(shape, generator=draw.generator)
    condition = own.conditioner.embed(own.conditioner.tokens(["a two", "seven"]))
    x = student_function(own, steps, start=SAMPLING.start, floor=SAMPLING.floor)(condition, draw)
    torch.testing.assert_close(stock, x, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 1},
        {"steps": 2, "gan": {"after": 8}, "guidance_scale": 1.0, "fake_guidance_scale": 0.0, "generator_after": 8},
    ],
)
def test_a_run_gives_a_stock_pipeline_and_metrics(tmp_path, tiny_unet_folder, arguments):
    settings = digits(tiny_unet_folder, method_args=arguments, **{"train.ema": {"kind": "halflife", "halflife": 100}})
    metrics = run.train(METHOD, settings, tmp_path / "run", quiet=True, cpu=True)
    steps = arguments["steps"]
    assert metrics["student/nfe"] == steps
    assert ("student_after_1/frechet" in metrics) == (steps > 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line["kind"] == "train" for line in lines)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, class_labels=[3, 4], num_inference_steps=steps, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    before = open_pipeline(tiny_unet_folder).network.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


@pytest.mark.slow
def test_a_run_on_text(tmp_path, tiny_text_folder):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a {word}" for word in ("one", "two", "three", "four") * 8))
    settings = config(
        tiny_text_folder,
        data={"name": "prompts", "root": str(prompts), "held_out": 0.25},
        method_args={"steps": 4, "gan": None},
    )
    run.train(METHOD, settings, tmp_path / "run", quiet=True, cpu=True)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    pipe.set_progress_bar_config(disable=True)
    notes = json.loads((tmp_path / "run" / "student" / "kd.json").read_text())
    images = pipe("a two", timesteps=notes["levels"], guidance_scale=1.0, output_type="pt").images
    assert images.shape == (1, 3, 16, 16) or images.shape == (1, 1, 16, 16)
    assert images.isfinite().all()


def test_arguments_out_of_range_are_named():
    with pytest.raises(InputError, match=r"method_args\.matched"):
        config("x", method_args={"matched": "first"})
    with pytest.raises(InputError, match=r"method_args\.start_sigma"):
        config("x", method_args={"start_sigma": 0})
    with pytest.raises(InputError, match=r"method_args\.gan\.afer'; did you mean 'after'"):
        config("x", method_args={"gan": {"afer": 3}})


# ---------------------------------------------------------------- the shipped configs


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_and_their_arms_are_valid(name):
    assert {"small", "paper", "paper-sdxl"} <= set(CONFIGS)
    arms = load_arms(f"sid/{name}")
    assert arms[0].name == "sid"
    assert len(arms) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "paper-sdxl"])
def test_the_papers_settings_train_on_another_pipeline(tmp_path, tiny_text_folder, name):
    changes = {
        **FAST,
        "teacher.pretrained": str(tiny_text_folder),
        "teacher.dtype": "fp32",
        "train.steps": 1,
        "train.precision": "fp32",
        "train.num_workers": 0,
        "method_args.gradient_checkpointing": True,
    }
    if name == "paper":
        (tmp_path / "prompts.txt").write_text("\n".join(f"a {word}" for word in ("one", "two", "three", "four") * 8))
        changes["data.root"] = str(tmp_path / "prompts.txt")
    else:
        for subject in ("cat", "dog"):
            (tmp_path / "images" / subject).mkdir(parents=True)
            for index in range(12):
                picture = Image.new("L", (16, 16), 20 * index)
                picture.save(tmp_path / "images" / subject / f"{index}.png")
        changes |= {"data.root": str(tmp_path / "images"), "data.image_size": 16, "data.channels": 1}
        changes["data.held_out"] = 0.0
    values = override(read_yaml(config_folder("sid") / f"{name}.yaml"), changes)
    run.train(METHOD, config_of(METHOD, values), tmp_path / "run", quiet=True, cpu=True)
    scheduler = open_pipeline(tmp_path / "run" / "student").pipe.scheduler
    assert (type(scheduler).__name__, scheduler.config.num_train_timesteps) == ("LCMScheduler", 626)
