"""Kill -9 at a random step, resume, and the weights are those of a run that was never cut; DDP equals one process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TOY = Path(__file__).with_name("toy_training.py")
STUDENT = Path("student") / "model.safetensors"

# accelerate's --multi_gpu is its torchrun launcher; on a machine without GPUs the processes form a gloo group.
TWO_PROCESSES = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


def start(*arguments: str, launcher: tuple[str, ...] = (sys.executable,), **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*launcher, str(TOY), *arguments], env=environment, text=True, **options)


def finish(*arguments: str, **options) -> None:
    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


def kill_at(step: int, *arguments: str) -> None:
    process = start(*arguments, "--say", stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1]) >= step:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(timeout=60) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--players", "2"), ("--rule",)], ids=["one player", "two players", "rule"])
def test_resume_after_kill_is_bit_identical(tmp_path, options):
    finish(str(tmp_path / "whole"), *options)
    step = random.SystemRandom().randrange(5, 29)
    kill_at(step, str(tmp_path / "cut"), *options)
    assert not (tmp_path / "cut" / STUDENT).exists()
    finish(str(tmp_path / "cut"), "--resume", *options)
    whole, cut = load_file(tmp_path / "whole" / STUDENT), load_file(tmp_path / "cut" / STUDENT)
    assert whole.keys() == cut.keys()
    for name in whole:
        assert torch.equal(whole[name], cut[name]), f"killed at step {step}: {name} differs"
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    assert len(lines[0]) == len(lines[1])  # nothing logged twice, nothing lost


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--players", "2"), ("--rule",)], ids=["one player", "two players", "rule"])
def test_two_processes_give_the_weights_of_one(tmp_path, options):
    options = (*options, "--dropout", "0")  # dropout masks are drawn per process
    finish(str(tmp_path / "one"), *options)
    finish(str(tmp_path / "two"), *options, launcher=TWO_PROCESSES)
    assert [(tmp_path / name / "processes").read_text() for name in ("one", "two")] == ["1", "2"]
    one, two = load_file(tmp_path / "one" / STUDENT), load_file(tmp_path / "two" / STUDENT)
    for name in one:
        # The same sums in another order: float32 rounding over 30 AdamW steps.
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
