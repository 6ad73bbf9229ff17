"""What bad input gets: one clear message on stderr, exit code 2, nothing trained, nothing left behind."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_classification.data import DataConfig, load_data
from kd_classification.models import ModelConfig, create_model, save_model
from kdcore.cli import main
from kdcore.method import load_config
from kdcore.run import train

SHORT = ["train.epochs=1", "teacher.train.epochs=1", "data.per_class=5", "data.image_size=8"]
NO_TEACHER_TRAINING = "teacher.train=null"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Files that are wrong in one way each, a finished run, and models of other classes and channels."""
    root = tmp_path_factory.mktemp("bad input")
    (root / "empty").mkdir()
    (root / "no images" / "cat").mkdir(parents=True)
    (root / "pictures" / "cat").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.full((8, 8), 40 * i, dtype=np.uint8)).save(root / "pictures" / "cat" / f"{i}.png")
    shutil.copytree(root / "pictures", root / "broken")
    (root / "broken" / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    for part, classes in (("train", ["cat"]), ("val", ["cat", "dog"])):
        for name in classes:
            shutil.copytree(root / "pictures" / "cat", root / "unknown class" / part / name)
    images, labels = np.zeros((4, 8, 8), dtype=np.uint8), np.array([0, 1, 0, 1])
    np.savez(root / "floats.npz", train_images=images / 2.0, train_labels=labels)
    np.savez(root / "lacks.npz", train_images=images)
    np.savez(root / "labels.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels + 1)
    np.savez(root / "negative.npz", train_images=images, train_labels=labels - 1)
    np.savez(root / "short.npz", train_images=images, train_labels=labels[:3])
    (root / "text.npz").write_text("no archive")
    (root / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0" * 12 + b"rest")
    (root / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + b"\0" * 4)
    (root / "broken.yaml").write_text("method: kd\n  teacher: [")
    (root / "list.yaml").write_text("- kd\n")
    (root / "twice.yaml").write_text("method: kd\nseed: 1\nseed: 2\n")
    (root / "nameless.yaml").write_text("seed: 1\n")
    (root / "foreign.yaml").write_text("method: kdd\n")
    (root / "other files").mkdir()
    (root / "other files" / "thesis.tex").write_text("years of work")
    data = load_data(DataConfig(name="digits"))
    small = ModelConfig(name="resnet18", args={"layers": [1] * 4, "channels": [4] * 4, "stem_width": 4})
    save_model(create_model(small, data, field="teacher", num_classes=7), root / "seven", data)
    save_model(create_model(small, data, field="teacher"), root / "cut off", data)
    weights = root / "cut off" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    torch.save({"weights": torch.zeros(3)}, root / "foreign.pth")
    (root / "text.pth").write_text("no checkpoint")
    method, config = load_config("kd/small", SHORT)
    train(method, config, root / "finished", quiet=True, cpu=True)
    return root


def source(name, place_name):
    return [f"data.name={name}", f"data.root={{place}}/{place_name}"]


CASES = {
    # configs and overrides
    "unknown method": (["kdd/small"], "'kdd' is not installed; did you mean"),
    "unknown config": (["kd/smal"], "'kd' has no config 'smal'; did you mean 'small'?"),
    "no config": (["kd"], "expected key/name"),
    "missing file": (["{place}/nowhere.yaml"], "no such file"),
    "broken yaml": (["{place}/broken.yaml"], "not valid YAML"),
    "list yaml": (["{place}/list.yaml"], "expected a mapping"),
    "key twice": (["{place}/twice.yaml"], "key 'seed' is given twice"),
    "no method": (["{place}/nameless.yaml"], "'method' is required"),
    "foreign method": (["{place}/foreign.yaml"], "'kdd' is not installed"),
    "config of another method": (["kd/small", "method=dhkd"], "method 'dhkd', not of 'kd'"),
    "unknown key": (["kd/small", "train.epoch=3"], "unknown key 'train.epoch'; did you mean 'epochs'?"),
    "unknown section": (["kd/small", "trian.epochs=3"], "unknown key 'trian'; did you mean 'train'?"),
    "unknown argument": (["kd/small", "method_args.temprature=2"], "did you mean 'temperature'?"),
    "argument of another method": (["kd/small", "method_args.nd_weight=2"], "unknown key 'method_args.nd_weight'"),
    "alpha above 1": (["kd/small", "method_args.alpha=1.5"], "'method_args.alpha' = 1.5"),
    "temperature zero": (["kd/small", "method_args.temperature=0"], "'method_args.temperature' = 0"),
    "negative rate": (["kd/small", "train.optimizer.lr=-1"], "'train.optimizer.lr' = -1"),
    "no number": (["kd/small", "train.epochs=many"], "'train.epochs' = 'many'"),
    "unknown optimiser": (["kd/small", "train.optimizer.name=sdg"], "'train.optimizer.name' = 'sdg'"),
    "negative seed": (["kd/small", "--seed", "-3"], "-3"),
    "no budget": (["kd/small", "train.epochs=null"], "'train' needs a budget: give epochs or steps"),
    "patience without monitor": (["kd/small", "train.patience=3"], "need monitor"),
    "value as section": (["kd/small", "method.x=1"], "'method' is a value, not a section"),
    "no equals sign": (["kd/small", "train.epochs"], "expected key=value"),
    "unknown option": (["kd/small", "--epochs", "3"], "--epochs"),
    # data
    "no root": (["kd/small", "data.name=image_folder"], "data.root: required"),
    "unset variable": (["kd/small", "data.name=idx", "data.root=$NOT_SET_HERE"], "environment variable is not set"),
    "missing folder": (["kd/small", *source("image_folder", "nowhere")], "no such folder"),
    "no class folders": (["kd/small", *source("image_folder", "empty")], "it has no class folders"),
    "no images": (["kd/small", *source("image_folder", "no images")], "no images"),
    "unreadable image": (["kd/small", *source("image_folder", "broken")], "1.png: cannot be read"),
    "class only in test": (["kd/small", *source("image_folder", "unknown class")], "'dog' is not among the training"),
    "no idx files": (["kd/small", *source("idx", "empty")], "no pair"),
    "broken idx": (["kd/small", "data.name=idx", "data.root={place}"], "t10k-images-idx3-ubyte: not an IDX file"),
    "no npz": (["kd/small", *source("npz", "text.npz")], "text.npz: not a readable npz file"),
    "npz of floats": (["kd/small", *source("npz", "floats.npz")], "allowed: uint8"),
    "npz lacks labels": (["kd/small", *source("npz", "lacks.npz")], "array 'train_labels' is missing"),
    "npz of two lengths": (["kd/small", *source("npz", "short.npz")], "must be 4 integers"),
    "label outside the classes": (["kd/small", *source("npz", "labels.npz")], "label 2 in the test part is outside"),
    "negative label": (["kd/small", *source("npz", "negative.npz")], "label -1 in the training part is outside"),
    "no cifar": (["kd/small", *source("cifar10", "empty")], "torchvision finds no cifar10"),
    "too few of a class": (["kd/small", "data.per_class=5000"], "data.per_class = 5000: class '0' has only"),
    "two means": (["kd/small", "data.mean=[0.1, 0.2]", "data.channels=3"], "2 values for 3 channels"),
    "deviation zero": (["kd/small", "data.std=[0.0]"], "must be positive"),
    "unknown monitor": (["kd/small", "train.monitor=f1", "data.validation=0.2"], "train.monitor = 'f1': not a metric"),
    "monitor of nothing": (["kd/small", "teacher.train.monitor=accuracy"], "no image is held out for it"),
    # networks
    "unknown network": (["kd/small", "student.name=resnet81", "student.args={}"], "'resnet81': not a timm model"),
    "bad network argument": (["kd/small", "student.args.layer=[1]"], "student.args"),
    "images too large": (["kd/small", "student={name: vit_tiny_patch16_224}"], "student: the network does not take"),
    "teacher without weights": (["kd/small", NO_TEACHER_TRAINING], "'teacher' has no weights"),
    "missing checkpoint": (["kd/small", NO_TEACHER_TRAINING, "teacher.checkpoint={place}/no.pth"], "no.pth: no such"),
    "no checkpoint": (
        ["kd/small", NO_TEACHER_TRAINING, "teacher.checkpoint={place}/text.pth"],
        "text.pth: not a check",
    ),
    "foreign weights": (
        ["kd/small", NO_TEACHER_TRAINING, "teacher.checkpoint={place}/foreign.pth"],
        "weights of another architecture",
    ),
    "corrupt weights": (["kd/small", NO_TEACHER_TRAINING, "teacher.checkpoint={place}/cut off"], "not a readable"),
    "other class count": (
        ["kd/small", NO_TEACHER_TRAINING, "teacher.checkpoint={place}/seven"],
        "it tells 7 classes apart, the data has 10",
    ),
    "other channel count": (
        ["kd/small", NO_TEACHER_TRAINING, "teacher.checkpoint={place}/finished/teacher", "data.channels=3"],
        "it takes 1 channels, the data has 3",
    ),
    "student of another class count": (
        ["kd/small", "student.checkpoint={place}/seven"],
        "student.checkpoint",
    ),
    "missing cache": (
        ["kd/small", NO_TEACHER_TRAINING, "teacher.checkpoint={place}/finished/teacher", "teacher.cache={place}/empty"],
        "empty",
    ),
    # methods
    "dhkd unknown head": (["dhkd/small", "method_args.auxiliary_head=cubic"], "'method_args.auxiliary_head' = 'cubic'"),
    "nd_loss negative weight": (["nd_loss/small", "method_args.nd_weight=-1"], "'method_args.nd_weight' = -1"),
    "ssld pool without folder": (["ssld/small", "method_args.pool={name: image_folder}"], "pool.root: required"),
    "old classes all": (["margin_preserving/small", "old_classes=10"], "allowed are 1 to 9 of the 10 classes"),
    "fold outside": (["kd_oct/small", "protocol.fold=9"], "fold"),
    # folders
    "another run's folder": (["kd/small", "--output", "{place}/finished"], "holds a finished run"),
    "foreign folder": (["kd/small", "--output", "{place}/other files"], "holds other files and no run"),
    "output is a file": (["kd/small", "--output", "{place}/text.pth"], "is a file"),
    "resume another config": (
        ["kd/small", "--output", "{place}/finished", "--resume"],
        "cannot resume with another config",
    ),
}


def test_table_is_as_long_as_promised():
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_one_message_exit_2_and_nothing_trained(name, place, tmp_path, capsys, monkeypatch):
    arguments, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    code = main(["train", *(text.replace("{place}", str(place)) for text in arguments), "--cpu", "--quiet"])
    output = capsys.readouterr()
    assert code == 2, output.err
    assert output.err.startswith("error: ")
    assert message in output.err.replace(str(place), "{place}")
    assert output.err.count("\n") == 1, "one line"
    assert len(output.err) < 700
    assert "Traceback" not in output.err
    assert not list(tmp_path.iterdir()), "no run directory may be left behind"
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


COMMANDS = {
    "report of no run": (["report", "{place}/empty"], "empty"),
    "eval of no run": (["eval", "{place}/nowhere"], "no such folder"),
    "cache of a teacher to be trained": (["cache", "kd/small", "{place}/cache"], "needs a teacher with weights"),
    "list of an unknown domain": (["list", "--domain", "poetry"], "poetry"),
    "show of an unknown method": (["show", "khd"], "'khd' is not installed"),
    "compare with no seeds": (["compare", "kd/small", "--seeds", "0"], "seeds"),
    "compare with a bad arm": (
        ["compare", "kd/small", "compare={bad: {method_args.alpha: 2}}"],
        "'method_args.alpha' = 2",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands_answer_bad_input_alike(name, place, tmp_path, capsys, monkeypatch):
    arguments, message = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    code = main([text.replace("{place}", str(place)) for text in arguments])
    output = capsys.readouterr()
    assert code == 2, output.err
    assert output.err.startswith("error: ")
    assert message in output.err.replace(str(place), "{place}")
    assert not list(tmp_path.iterdir())


def test_corrupt_checkpoint_names_the_older_good_one(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["train", "kd/small", *SHORT, "train.epochs=3", "train.checkpoint_every=1", "--output", str(folder)]
    arguments += ["--cpu", "--quiet"]
    assert main(arguments) == 0
    (folder / "metrics.json").unlink()  # as if it had been cut before its end
    (folder / "stages.json").write_text("{}")
    checkpoints = sorted((folder / "checkpoints" / "student").glob("step-*"))
    assert len(checkpoints) == 2
    weights = checkpoints[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"{checkpoints[-1]}: model.safetensors is corrupt" in error
    assert f"{checkpoints[0].name} is good" in error
    shutil.rmtree(checkpoints[-1])
    assert main([*arguments, "--resume"]) == 0
