"""FSDP2 on two CPU processes: the weights of one process, checkpoints that look the same, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcore import checkpoint as checkpoints

SCRIPT = Path(__file__).with_name("sharded_training.py")
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def launch(*arguments: object, launcher: tuple[str, ...] = TWO) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONUNBUFFERED", None)  # or the lines of two processes mix
    command = [*launcher, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def train(*arguments: object, **options) -> None:
    done = launch(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_sharded_training_resumes_and_gives_the_weights_of_one_process(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, launcher=(sys.executable,))
    assert launch(two, "--cut", 10).returncode != 0
    assert not (two / "student").exists()
    train(two, "--resume")
    assert (two / "processes").read_text() == "2"
    expected, found = (load_file(folder / "student" / "model.safetensors") for folder in (one, two))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)  # the same sums in another order
    saved = [checkpoints.load(checkpoints.latest(folder / "checkpoints" / "student")) for folder in (one, two)]
    for part in ("model", "best"):
        plain, whole = (getattr(each, part) for each in saved)
        assert {name: value.shape for name, value in plain.items()} == {n: v.shape for n, v in whole.items()}
    slots = [each.state["optimizers"]["student"]["state"] for each in saved]
    assert slots[0].keys() == slots[1].keys()
    for index, slot in slots[0].items():
        for name, value in slot.items():
            torch.testing.assert_close(slots[1][index][name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--players", 2), "FSDP: Toy has 2 players, allowed: one"),
        (("--rule",), "FSDP: Toy combines per-term gradients"),
    ],
)
def test_what_sharding_cannot_train_is_refused(tmp_path, options, message):
    done = launch(tmp_path, *options)
    assert done.returncode != 0
    assert f"InputError: {message}" in done.stderr
