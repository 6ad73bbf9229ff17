"""Files of other frameworks: what is read, what is refused, plain values."""

import pytest
import torch
from torch import nn

from kdcore.checkpoint import check, fault, save_trainer_state, trainer_checkpoints
from kdcore.errors import InputError
from kdcore.state_files import load_strictly, plain, plain_state, read_checkpoint


def test_a_checkpoint_loads_with_its_meta_and_what_does_not_fit_is_named(tmp_path):
    source, network, path = nn.Linear(2, 3), nn.Linear(2, 3), tmp_path / "x.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}, "meta": {"a": 1}}, path)
    assert load_strictly(network, path, "teacher") == {"a": 1}
    assert torch.equal(network.weight, source.weight)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"teacher = .*does not fit Linear: missing: bias; of another shape: weight"):
        load_strictly(network, path, "teacher")


def test_nothing_but_tensors_and_plain_values_is_read(tmp_path):
    with pytest.raises(InputError, match=r"teacher = '.*absent.pth': no such file"):
        read_checkpoint(tmp_path / "absent.pth", "teacher")
    torch.save({"state_dict": nn.Linear(1, 1)}, tmp_path / "pickled.pth")
    with pytest.raises(InputError, match="holds more than tensors and plain values"):
        read_checkpoint(tmp_path / "pickled.pth", "teacher")
    torch.save({"a": 1}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="expected a state dict"):
        read_checkpoint(tmp_path / "other.pth", "teacher")


def test_plain_values():
    assert plain({1: (torch.float32.itemsize, "x")}) == {"1": [4, "x"]}
    assert plain_state({1: (2, [3])}) == {1: (2, [3])}
    with pytest.raises(InputError, match=r"checkpoint\.a: a object is no plain value"):
        plain_state({"a": object()})


def test_a_damaged_trainer_state_names_the_newest_good_one(tmp_path):
    for step in (1, 2, 3):
        save_trainer_state(tmp_path, {"x": torch.ones(step)}, step, "state.pth")
    found = trainer_checkpoints(tmp_path)
    assert [path.name for path in found] == ["checkpoint-00000001", "checkpoint-00000002", "checkpoint-00000003"]
    assert not any(map(fault, found))
    check(found[-1], found[:-1])
    (found[-1] / "state.pth").write_bytes(b"")
    with pytest.raises(InputError, match="checkpoint-00000002 is good: remove checkpoint-00000003"):
        check(found[-1], found[:-1])
