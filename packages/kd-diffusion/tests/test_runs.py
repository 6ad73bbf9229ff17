"""Runs end to end: the student in stock diffusers without kd, kill and resume, two processes, what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd_diffusion import testing_text
from kd_diffusion.engine.distillation import Networks
from kd_diffusion.engine.draws import Draws
from kd_diffusion.engine.rollout import rollout
from kd_diffusion.integrations.pipelines import open_pipeline
from kd_diffusion.methods.dmd2 import DMD2, DMD2Config
from kd_diffusion.networks import make_networks, open_teacher
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import load_run, train

SHRUNK = (
    "data.held_out=0.2",
    "train.batch_size=16",
    "train.steps=6",
    "train.eval_every=1000",
    "evaluation.samples=16",
    "evaluation.batch_size=16",
    "evaluation.teacher_steps=[1]",
    "method_args.fake_updates=2",
)
# Generator, fake score and discriminator, each with an optimiser of its own.
THREE_PLAYERS = (
    "method_args.gan={host: teacher_features, optimizer: {name: adam, lr: 0.001}, weight_generator: 0.1}",
    "method_args.steps=2",
    "train.ema={decay: 0.5}",
)


def overrides(teacher: Path, *more: str) -> list[str]:
    return ["teacher.world=null", f"teacher.pretrained={teacher}", "teacher.null_class=10", *SHRUNK, *more]


def run(teacher: Path, output: Path, *more: str) -> dict:
    method, config = load_config("dmd2/small", overrides(teacher, *more))
    return train(method, config, output, quiet=True, cpu=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_student_is_a_pipeline_that_samples_in_its_own_steps(tiny_unet_folder, tmp_path):
    from diffusers import DiffusionPipeline

    metrics = run(tiny_unet_folder, tmp_path / "run", "method_args.steps=2")
    assert metrics["student/nfe"] == 2
    assert {"student/frechet", "student/accuracy", "teacher_1/frechet"} <= metrics.keys()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=3, class_labels=[1, 2, 3], num_inference_steps=2, output_type="np").images
    assert images.shape == (3, 8, 8, 1)
    record = json.loads((tmp_path / "run" / "student" / "kd.json").read_text())
    assert record["levels"] == [999, 499]


@pytest.mark.slow
def test_what_the_report_is_made_of(tiny_unet_folder, tmp_path):
    """One noise through the teacher and the student at several steps, all terms of all players, gradients by level."""
    more = ("data.held_out=0", "train.batch_size=700", "train.steps=4", "train.eval_every=1")  # epochs of two steps
    method, config = load_config("dmd2/small", overrides(tiny_unet_folder, *THREE_PLAYERS, *more))
    train(method, config, tmp_path / "run", quiet=True, cpu=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = {(line["player"], term) for line in lines if line["kind"] == "train" for term in line["terms"]}
    players = {"generator": ("matching", "adversarial"), "fake": ("denoising",), "discriminator": ("discriminator",)}
    assert {(player, term) for player, terms in players.items() for term in terms} <= seen
    profiles = [line for line in lines if line.get("name") == "gradient norm by noise level"]
    assert [line["step"] for line in profiles] == [2, 4]
    assert all(len(line["values"]) == len(line["x"]) == 10 for line in profiles)
    assert any(value for value in profiles[1]["values"])  # at first the fake score is the teacher
    _, loaded, artefacts = load_run(tmp_path / "run")
    rows = method.predict(loaded, artefacts, 2)
    assert list(rows[0]["images"]) == ["teacher, its path", "teacher, 50 steps", "step 2", "step 4", "student"]
    difference = rows[0]["images"]["step 4"].astype(int) - rows[0]["images"]["student"]
    assert abs(difference).max() <= 1  # the same noise, and the average in both


@pytest.mark.slow
def test_the_student_loads_where_kd_is_not_importable(tiny_unet_folder, tmp_path):
    run(tiny_unet_folder, tmp_path / "run")
    script = textwrap.dedent(
        """
        import sys
        sys.modules.update(kd_diffusion=None, kdcore=None)   # importing either raises
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
        images = pipe(batch_size=2, class_labels=[3, 4], num_inference_steps=1, output_type="np").images
        print(images.shape)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run" / "student")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 8, 8, 1)"


def start(*arguments: str, launch: tuple[str, ...] = ()) -> subprocess.Popen:
    kd = Path(sys.executable).with_name("kd")
    python = () if launch else (sys.executable,)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*launch, *python, str(kd), *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(*arguments: str, launch: tuple[str, ...] = ()) -> None:
    process = start(*arguments, launch=launch)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors


@pytest.mark.slow
def test_a_killed_run_of_three_players_resumes_to_the_same_bits(tiny_unet_folder, tmp_path):
    steps = ("train.steps=40", "train.checkpoint_every=5")
    common = ("train", "dmd2/small", *overrides(tiny_unet_folder, *THREE_PLAYERS, *steps), "-q", "--cpu")
    finish(*common, "--output", str(tmp_path / "whole"))
    process = start(*common, "--output", str(tmp_path / "cut"))
    checkpoints = tmp_path / "cut" / "checkpoints" / "student"
    deadline = time.monotonic() + 300
    while not any(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "cut" / "student").exists()
    finish(*common, "--output", str(tmp_path / "cut"), "--resume")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_unet_folder, tmp_path):
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    launch += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    # Plain gradient descent: Adam would turn the rounding of tiny gradients into full steps.
    plain = ("train.optimizer={name: sgd, lr: 0.01, momentum: 0.0}",)
    gan = ("method_args.gan={host: fake_trunk, weight_generator: 0.1}", "method_args.steps=2")
    common = ("train", "dmd2/small", *overrides(tiny_unet_folder, *gan, *plain), "-q", "--cpu")
    finish(*common, "--output", str(tmp_path / "one"))
    finish(*common, "--output", str(tmp_path / "two"), launch=launch)
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


# ---------------------------------------------------------------- configs and input


@pytest.mark.parametrize("name", ["small", "paper", "paper-sd15", "paper-sdxl"])
def test_configs_validate(name):
    method, config = load_config(f"dmd2/{name}")
    assert method.key == config.method == "dmd2"


def test_the_papers_config_runs_on_another_pipeline_by_name(tiny_unet_folder, tmp_path, image_folder):
    method, config = load_config(
        "dmd2/paper",
        [
            *overrides(tiny_unet_folder),
            f"data.root={image_folder}",
            "data.image_size=8",
            "data.channels=1",
            "train.precision=fp32",
            "train.num_workers=0",
            "train.batch_size=4",
            "train.steps=2",
            "evaluation.features=classifier",
        ],
    )
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert metrics["student/nfe"] == 1
    assert "student/frechet" in metrics


def test_the_text_config_runs_on_another_pipeline_by_name(tiny_text_folder, tmp_path):
    from diffusers import DiffusionPipeline

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a digit {word}" for word in ("one", "two", "three", "four", "five", "six")))
    method, config = load_config(
        "dmd2/paper-sd15",
        [
            f"teacher.pretrained={tiny_text_folder}",  # in bfloat16, as the config has it
            f"data.root={prompts}",
            "data.held_out=0.0",
            "train.precision=fp32",
            "train.num_workers=0",
            "train.batch_size=2",
            "train.steps=2",
            "evaluation={samples: 4, batch_size: 4, teacher_steps: [1]}",
        ],
    )
    train(method, config, tmp_path / "run", quiet=True, cpu=True)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a digit two", num_inference_steps=1, guidance_scale=1.0, output_type="np").images
    assert images.shape[:3] == (1, 16, 16)


@pytest.mark.slow
def test_the_sdxl_config_runs_on_another_pipeline_by_name(tmp_path):
    """Two text encoders, pooled text and sizes; with the adapters of the readme, whose file gives the same student."""
    from diffusers import DiffusionPipeline
    from PIL import Image

    tokenizer = testing_text.word_tokenizer(tmp_path)
    testing_text.sdxl_pipeline(tokenizer).save_pretrained(tmp_path / "teacher")
    for word in ("cat", "dog"):
        (tmp_path / "images" / word).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (8, 8), (40 * index, 90, 20)).save(tmp_path / "images" / word / f"{index}.png")
    targets = ["to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj"]
    method, config = load_config(
        "dmd2/paper-sdxl",
        [
            f"teacher.pretrained={tmp_path / 'teacher'}",
            "teacher.variant=null",
            f"student.lora={{rank: 2, alpha: 8, targets: {targets}}}",
            f"data.root={tmp_path / 'images'}",
            "data.image_size=8",
            "data.held_out=0.0",
            "train.optimizer.lr=0.02",
            "train.precision=fp32",
            "train.num_workers=0",
            "train.batch_size=2",
            "train.steps=6",
            "evaluation={samples: 2, batch_size: 2, teacher_steps: [1]}",
        ],
    )
    train(method, config, tmp_path / "run", quiet=True, cpu=True)
    given = {"timesteps": [999, 749, 499, 249], "guidance_scale": 0.0, "output_type": "latent"}

    def sampled(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe("cat", generator=torch.Generator().manual_seed(0), **given).images

    student = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    encoders = {name: getattr(student, name) for name in ("text_encoder", "text_encoder_2")}  # as rounded in training
    base = DiffusionPipeline.from_pretrained(tmp_path / "teacher", scheduler=student.scheduler, **encoders)
    x, plain = sampled(student), sampled(base)
    base.load_lora_weights(tmp_path / "run" / "student" / "lora")
    torch.testing.assert_close(sampled(base), x, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, x, atol=1e-2)
    own = open_pipeline(tmp_path / "run" / "student")
    draw = torch.Generator().manual_seed(0)
    condition = own.conditioner.embed(own.conditioner.tokens(["cat"]))
    noise = lambda: torch.randn(1, *own.space.shape, generator=draw)  # noqa: E731
    trained = rollout(own.denoiser.eval(), own.process, given["timesteps"], condition, noise)
    torch.testing.assert_close(x, trained, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["teacher.pretrained=/nowhere"], r"teacher\.pretrained = '/nowhere': no diffusers pipeline"),
        (["data.image_size=16"], r"data: images are 1x16x16, the teacher's 1x8x8"),
        (["teacher.null_class=11"], r"teacher\.null_class = 11: the network has classes 0 to 10"),
        (["teacher.null_class=null", "method_args.guidance_scale=2"], r"teacher\.null_class: guidance needs a class"),
        (["train.batch_size=5000"], r"train\.batch_size = 5000: larger than the 1438 samples"),
        (["method_args.gan={host: nowhere}"], r"method_args\.gan\.host' = 'nowhere': allowed: 'fake_trunk'"),
        (["method_args.times={low: 9, high: 3}"], r"low = 9 must be below high = 3"),
        (["method_args.fake_update=3"], r"unknown key 'method_args\.fake_update'.*fake_updates"),
        (["teacher.world={name: digits_unet}"], r"give either pretrained or world"),
        (
            ["data.held_out=0", "evaluation.features=classifier"],
            r"'classifier': needs labelled images, some of them held",
        ),
        (["student.lora={targets: [nothing]}"], r"student\.lora\.targets = \['nothing'\]: no layer"),
    ],
)
def test_bad_input_is_one_message_before_anything_trains(tiny_unet_folder, tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        run(tiny_unet_folder, tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()


def test_inception_features_need_torch_fidelity(tiny_unet_folder, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch_fidelity" else found(name))
    with pytest.raises(InputError, match=r"evaluation\.features = 'inception': needs torch-fidelity"):
        run(tiny_unet_folder, tmp_path / "run", "evaluation.features=inception")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def image_folder(tmp_path):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for label in range(10):
        folder = tmp_path / "images" / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(6):
            pixels = torch.randint(0, 255, (8, 8), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return tmp_path / "images"


def test_what_trains_starts_from_the_weights_as_they_are_stored(tiny_text_folder):
    """A frozen teacher in bfloat16 is rounded; its copies are not."""
    overridden = [f"teacher.pretrained={tiny_text_folder}", "data={name: digits}"]
    _, config = load_config("dmd2/paper-sd15", overridden)
    opened = open_teacher(config, {}, None)
    networks, stored = make_networks(config, opened, {}, None), open_pipeline(tiny_text_folder).network.state_dict()
    assert config.teacher.dtype == "bf16"
    rounded = networks.teacher.network.state_dict()
    assert all(torch.equal(rounded[name], value.bfloat16()) for name, value in stored.items())
    for network in (networks.fake.network, networks.generator.network):
        assert all(torch.equal(network.state_dict()[name], value) for name, value in stored.items())


def test_real_images_are_encoded_with_noise_of_the_step_alone(tiny_text_folder):
    """So that a resumed run and several processes see the latents that one would have seen."""
    opened = open_pipeline(tiny_text_folder)
    networks = Networks(opened.denoiser, opened.copied(), opened.copied(), opened.conditioner, opened.space)
    distiller, found = DMD2(networks, DMD2Config(gan=None)), []
    for step in (3, 3, 4):
        distiller.draws, distiller.progress.step = Draws(0), step
        found.append(distiller.real({"pixels": torch.zeros(2, 1, 16, 16)}))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_an_autoencoder_that_overflows_in_float16_stays_in_float32(tiny_text_folder):
    found = open_pipeline(tiny_text_folder, dtype="fp16")
    assert found.network.dtype == torch.float16
    assert found.space.vae.config.force_upcast
    assert found.space.decode(torch.randn(1, 4, 8, 8)).dtype == torch.float32
    assert found.space.vae.dtype == torch.float32
