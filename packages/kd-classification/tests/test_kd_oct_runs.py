"""Runs of kd_oct: from end to end, resumed, refused; its configs; what the method claims."""

import copy
import json
import re

import numpy as np
import pytest
import timm
import torch
from torch import nn

from kd_classification import metrics as m
from kd_classification.data import DataConfig, load_data
from kd_classification.engine.averaging import recompute_statistics
from kd_classification.engine.folds import make_plan
from kd_classification.grouped import textures
from kd_classification.methods.kd_oct import (
    KDOCT,
    METHOD,
    FocalTeacher,
    fold_data,
)
from kdcore import checkpoint
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import load_run, train

TINY = "{layers: [1, 1, 1, 1], channels: [4, 4, 4, 4], stem_width: 4}"
SHRUNK = [
    f"teacher.args={TINY}",
    f"student.args={TINY}",
    "teacher.train.epochs=3",
    "train.epochs=2",
    "method_args.swa_start=1",
    "teacher.augment={}",
    "data.augment={}",
]


def small(*overrides: str):
    return load_config("kd_oct/small", [*SHRUNK, *overrides])


def tiny_network(seed: int = 0, **arguments) -> nn.Module:
    torch.manual_seed(seed)
    arguments = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4], "stem_width": 4, "in_chans": 1, **arguments}
    return timm.create_model("resnet18", num_classes=3, **arguments)


# ---------------------------------------------------------------- runs


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))


def test_run_from_end_to_end(tmp_path, cache):
    method, config = small()
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    expected = {"student/sensitivity", "student/specificity", "student/rarest_recall", "teacher_tta/accuracy"}
    assert expected | {"student/accuracy", "teacher/accuracy", "agreement", "teacher/is_average"} <= metrics.keys()
    assert metrics["shared_patients"] == 0
    assert metrics["student/sensitivity"] == pytest.approx(metrics["student/balanced_accuracy"])
    _, _, artefacts = load_run(tmp_path / "run")
    data, plan = fold_data(config, artefacts["folds"])
    assert plan == make_plan(textures(config.data), config.protocol)
    stock = timm.create_model(f"local-dir:{artefacts['student']}", pretrained=True)
    logits, labels = m.predict(stock, data.test)
    assert m.classification_metrics(logits, labels)["accuracy"] == pytest.approx(metrics["student/accuracy"])
    selection = json.loads((artefacts["teacher"] / "selection.json").read_text())
    assert selection["averaged_epochs"] == 2
    assert selection["chosen"] == min(selection["validation_loss"], key=selection["validation_loss"].get)
    assert len(METHOD.predict(config, artefacts, 4)) == 4


def test_teacher_weights_of_the_average(tmp_path, cache):
    method, config = small("method_args.teacher_weights=swa", "method_args.alpha=0", "train.epochs=1")
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert metrics["teacher/is_average"] == 1.0
    data, _ = fold_data(config, tmp_path / "run" / "folds.json")
    network = timm.create_model(f"local-dir:{tmp_path / 'run' / 'teacher'}", pretrained=True)
    before = copy.deepcopy(network.state_dict())
    budget = config.teacher.train
    recompute_statistics(network, data.train.loader(budget.batch_size, seed=config.seed, train=True))
    for name, value in network.state_dict().items():  # the statistics that were saved belong to the averaged weights
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


class Cut(Exception):
    pass


def test_resumed_teacher_is_the_uncut_one(tmp_path, cache, monkeypatch):
    method, config = small(
        "teacher.train.epochs=4",
        "teacher.train.checkpoint_every=5",
        "method_args.teacher_weights=swa",
        "method_args.freeze_epochs=1",
        "method_args.alpha=0",
        "train.epochs=1",
    )
    train(method, config, tmp_path / "whole", quiet=True, cpu=True)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "other cache"))
    loss = FocalTeacher.loss

    def cut(self, batch, player="student"):
        if self.progress.epoch == 3 and int(self.average.n_averaged) == 2:
            raise Cut
        return loss(self, batch, player)

    monkeypatch.setattr(FocalTeacher, "loss", cut)
    with pytest.raises(Cut):
        train(method, config, tmp_path / "cut", quiet=True, cpu=True)
    found = checkpoint.latest(tmp_path / "cut" / "checkpoints" / "teacher")
    assert found is not None
    saved = checkpoint.load(found)
    assert saved.step == 45  # of 16 a epoch: inside epoch 2, with one epoch averaged
    assert int(saved.model["average.n_averaged"]) == 1
    monkeypatch.setattr(FocalTeacher, "loss", loss)
    train(method, config, tmp_path / "cut", resume=True, quiet=True, cpu=True)
    for name in ("teacher", "student"):
        left, right = (tmp_path / run / name / "model.safetensors" for run in ("whole", "cut"))
        assert left.read_bytes() == right.read_bytes()
    assert (tmp_path / "whole" / "folds.json").read_text() == (tmp_path / "cut" / "folds.json").read_text()


def test_student_epoch_leaves_the_teacher_alone():
    teacher, student = tiny_network(1), tiny_network(2)
    before = copy.deepcopy(teacher.state_dict())
    distiller = KDOCT(teacher, student)
    distiller.train()
    optimizer = torch.optim.AdamW(distiller.players()[0].module.parameters(), lr=1e-2)
    data = load_data(DataConfig(name="textures"))
    for images in data.train.loader(128, train=True):
        optimizer.zero_grad()
        distiller.loss(images).total().backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert any(parameter.grad is not None for parameter in student.parameters())


# ---------------------------------------------------------------- configs and bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["protocol.fold=2"], "has no fold 2: folds = 2"),
        (["method_args.alpha=0", "method_args.beta=0"], "alpha and beta are both 0"),
        (["method_args.teacher_weights=swa", "method_args.swa_start=null"], "needs swa_start"),
        (["method_args.focal_form=paprika"], "allowed: 'paper' or 'release'"),
        (["protocol.splits=2"], "unknown key 'protocol.splits'; did you mean 'split'?"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(InputError, match=re.escape(message)):
        small(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.cache=somewhere"], "teacher.cache"),
        (["teacher.augment.mixup=0.4"], "teacher.augment.mixup"),
        (["data.validation=0.2"], "data.validation = 0.2"),
        (["data.name=digits"], "this source knows no patients"),
        (["protocol.folds=100"], "protocol.folds = 100: class 'brick' has only 64 patients"),
        (["method_args.teacher_weights=swa", "method_args.swa_start=3"], "teacher.train.epochs > swa_start = 3"),
        (["teacher.train.ema={}"], "teacher.train.ema"),
        (["data.augment.operations=[rotate]"], "cannot draw 2 different ones of 1"),
    ],
)
def test_run_errors(overrides, message, tmp_path, cache):
    method, config = small(*overrides)
    with pytest.raises(InputError, match=message):
        train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert not (tmp_path / "run").exists()


def test_configs():
    method, config = load_config("kd_oct/small")
    assert method is METHOD
    assert (config.protocol.seed, config.method_args.temperature) == (43, 4.0)
    _, paper = load_config("kd_oct/paper")
    assert paper.method_args.focal_form == "release"
    assert (paper.protocol.folds, paper.protocol.seed) == (5, 43)
    sizes = []
    for model in (paper.teacher, paper.student):
        with torch.device("meta"):
            network = timm.create_model(model.name, num_classes=3, **model.args)
        sizes.append(sum(parameter.numel() for parameter in network.parameters()) / 1e6)
    assert sizes == pytest.approx([196.4, 7.7], abs=0.1)
    assert {"ce", "kd"} <= set(config.compare)


def test_paper_pipeline_on_a_table_of_files(tmp_path, monkeypatch):
    from PIL import Image

    root = tmp_path / "NEH_UT_2021RetinalOCTDataset"
    generator, lines = np.random.default_rng(0), ["Directory,Patient ID,Class,Label"]
    for patient in range(21):
        label = ("NORMAL", "DRUSEN", "CNV")[patient % 3]
        folder = root / "Normal" / f"{patient}"
        folder.mkdir(parents=True)
        for index in range(2):
            Image.fromarray(generator.integers(0, 255, (40, 60), dtype=np.uint8)).save(folder / f"{index}.png")
            eye = label if index == 0 else "other"
            lines.append(f"NOrmal/{patient}/{index}.png,{patient},{eye},{label}")
    (tmp_path / "data_information.csv").write_text("\n".join(lines))
    monkeypatch.setenv("NEH_OCT", str(tmp_path))
    _, config = load_config("kd_oct/paper", ["data.image_size=48"])
    data, _ = fold_data(config, tmp_path / "folds.json")
    assert data.class_names == ["NORMAL", "DRUSEN", "CNV"]
    assert len(data.train) + len(data.validation) + len(data.test) == 21  # one of two scans agrees with its eye
    for images in (data.train, data.augmented(config.teacher.augment).train, data.test):
        read = next(iter(images.loader(4, train=False)))
        assert read.images.shape == (4, 3, 48, 48)
        assert torch.isfinite(read.images).all()
    assert not torch.equal(data.train[0][0], data.train[0][0])  # augmented
    assert torch.equal(data.test[0][0], data.test[0][0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,label\na.png,x\n", "no column 'patient'"),
        ("image,label,patient\na.png,,1\n", "line 2: column 'label' is empty"),
        ("image,label,patient\na.png,x,1\n", "line 2: no image file"),
        ("image,label,patient\n", "it has no rows"),
    ],
)
def test_table_errors(content, message, tmp_path):
    (tmp_path / "table.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        load_data(DataConfig(name="csv", root=str(tmp_path), table={"file": "table.csv"}))


def test_table_label_outside_the_classes(tmp_path):
    (tmp_path / "table.csv").write_text("image,label,patient\na.png,CNVV,1\n")
    with pytest.raises(InputError, match=r"line 2: 'label' = 'CNVV' is no class; did you mean 'CNV'\?"):
        load_data(DataConfig(name="csv", root=str(tmp_path), table={"file": "table.csv", "classes": ["CNV", "NORMAL"]}))
