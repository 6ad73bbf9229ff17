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

from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import train

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
