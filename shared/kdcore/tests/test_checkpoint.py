"""Checkpoints: whole or absent, safe to open, and exact about what is broken."""

from __future__ import annotations

import hashlib
import json
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore import checkpoint as checkpoints
from kdcore.checkpoint import Checkpoint
from kdcore.errors import InputError


def example(step: int = 3, best=None) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    model = {"w": torch.randn(2, 3, generator=generator), "n": torch.tensor(step)}
    state = {"epoch": 1, "ema": {"student": {"w": torch.ones(2)}}, "best": 0.25, "scaler": None, "rng": [[1, 2], "x"]}
    return Checkpoint(step, model, state, best)


@pytest.mark.parametrize("best", [None, {"w": torch.tensor([1.0])}])
def test_round_trip(tmp_path, best):
    saved = example(best=best)
    path = checkpoints.save(tmp_path / "deep" / "folder", saved)
    assert path == tmp_path / "deep" / "folder" / "step-00000003"
    loaded = checkpoints.load(path)
    assert loaded.step == 3
    assert loaded.model.keys() == saved.model.keys()
    assert all(torch.equal(loaded.model[name], saved.model[name]) for name in saved.model)
    assert torch.equal(loaded.state["ema"]["student"].pop("w"), torch.ones(2))
    assert loaded.state == {**saved.state, "ema": {"student": {}}}
    assert (loaded.best is None) == (best is None)
    assert best is None or torch.equal(loaded.best["w"], best["w"])
    assert checkpoints.fault(path) is None


def test_tied_and_strided_tensors_are_saved_as_they_are(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    path = checkpoints.save(tmp_path, Checkpoint(1, {"a": shared, "b": shared, "c": shared.t()}, {}))
    loaded = checkpoints.load(path).model
    assert torch.equal(loaded["a"], shared)
    assert torch.equal(loaded["b"], shared)
    assert torch.equal(loaded["c"], shared.t())


def test_the_newest_are_kept_and_nothing_temporary_stays(tmp_path):
    (tmp_path / ".step-00000007.tmp").mkdir()  # of a process that was killed while it wrote
    for step in (2, 10, 4, 30):
        checkpoints.save(tmp_path, example(step), keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000010", "step-00000030"]
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000030"
    assert checkpoints.latest(tmp_path / "nothing") is None


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    checkpoints.save(tmp_path, Checkpoint(5, {"w": torch.zeros(1)}, {}, {"w": torch.zeros(1)}))
    path = checkpoints.save(tmp_path, Checkpoint(5, {"w": torch.ones(1)}, {}))
    assert checkpoints.load(path).model["w"].item() == 1
    assert checkpoints.load(path).best is None


@pytest.mark.parametrize("kept", [1, 2])
def test_a_corrupt_checkpoint_names_the_newest_older_good_one(tmp_path, kept):
    paths = [checkpoints.save(tmp_path, example(step), keep=9) for step in (1, 2, 3)]
    for path in paths[kept:]:
        content = bytearray((path / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "model.safetensors").write_bytes(content)
    good = paths[kept - 1].name
    message = rf"step-00000003: model\.safetensors is corrupt .*; {good} is good: remove step-00000003 to go on"
    with pytest.raises(InputError, match=message):
        checkpoints.load(paths[2])


def test_without_an_older_good_one_the_message_says_so(tmp_path):
    path = checkpoints.save(tmp_path, example())
    (path / "state.pt").unlink()
    with pytest.raises(InputError, match=r"state\.pt is missing; no older one is good"):
        checkpoints.load(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoints.load(tmp_path / "step-00000009")


@pytest.mark.parametrize(
    "manifest", [None, "", "[]", "{}", '{"step": 3}', '{"step": "x", "files": {}}', '{"step": 3, "files": 1}']
)
def test_a_broken_manifest_is_named(tmp_path, manifest):
    path = checkpoints.save(tmp_path, example())
    if manifest is None:
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=r"manifest\.json is missing or unreadable"):
        checkpoints.load(path)


def test_a_manifest_that_leaves_a_file_out_is_not_believed(tmp_path):
    path = checkpoints.save(tmp_path, example())
    (path / "manifest.json").write_text('{"step": 3, "files": {}}')
    assert "model.safetensors" in (checkpoints.fault(path) or "")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found(tmp_path_factory, data):
    path = checkpoints.save(tmp_path_factory.mktemp("flip"), example(best={"w": torch.ones(2)}))
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(InputError, match="step-00000003"):
        checkpoints.load(path)


class Payload:
    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    path = checkpoints.save(tmp_path, example())
    torch.save({"epoch": Payload()}, path / "state.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.pt"] = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"state\.pt holds more than tensors and plain values"):
        checkpoints.load(path)
    assert not Payload.ran


def test_the_last_good_checkpoint_of_a_run_is_found_over_its_stages(tmp_path):
    assert checkpoints.last_good(tmp_path) is None
    first = checkpoints.save(tmp_path / "checkpoints" / "teacher", example(9))
    second = checkpoints.save(tmp_path / "checkpoints" / "student", example(1))
    os.utime(first, (1000, 1000))
    assert checkpoints.last_good(tmp_path) == second
    (second / "manifest.json").unlink()
    os.utime(second, (2000, 2000))
    assert checkpoints.last_good(tmp_path) == first


def test_weights_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"weights .*absent\.safetensors: no such file"):
        checkpoints.load_weights(tmp_path / "absent.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match=r"broken\.safetensors: not a readable safetensors file"):
        checkpoints.load_weights(tmp_path / "broken.safetensors")
    path = checkpoints.save(tmp_path, example()) / "model.safetensors"
    assert checkpoints.load_weights(path).keys() == {"w", "n"}


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()


def test_generators_go_on_from_a_saved_state(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw()  # leaves a second Gaussian number pending in Python's and numpy's generators
    path = checkpoints.save(tmp_path, Checkpoint(1, {"w": torch.ones(1)}, {"rng": [checkpoints.rng_state()]}))
    expected = [draw() for _ in range(3)]
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    assert draw() != expected[0]
    checkpoints.set_rng_state(checkpoints.load(path).state["rng"][0])
    assert [draw() for _ in range(3)] == expected
