"""Plain knowledge distillation: the loss, a whole run, mixup, validation, the teacher cache."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kd_classification.data import Batch, load_data
from kd_classification.methods.kd import KD
from kd_classification.runs import write_cache
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import load_run, train

SHORT = ["train.epochs=2", "teacher.train.epochs=2", "data.per_class=5", "data.image_size=8"]


class Logits(nn.Module):
    """A network that gives the logits it holds."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, images):
        return self.values


def batch(labels):
    return Batch(torch.zeros(len(labels), 1), torch.tensor(labels), torch.arange(len(labels)))


def test_loss_of_the_paper_by_hand():
    kd = KD(Logits([[2.0, 0, -2], [0, 1, 1]]), Logits([[1.0, 0, -1], [0.5, 0.5, 0]]), alpha=0.7, temperature=4.0)
    terms = kd.loss(batch([0, 1]))
    assert terms["kd"][1].item() == pytest.approx(0.2452974781, abs=1e-9)
    assert terms["ce"][1].item() == pytest.approx(0.6828130262, abs=1e-9)
    assert terms.total().item() == pytest.approx(0.3765521425, abs=1e-9)


def test_gradient_is_the_difference_of_the_softened_probabilities():
    kd = KD(Logits([[2.0, 0, -2]]), Logits([[1.0, 0, -1]]), alpha=1.0, temperature=3.0)
    kd.loss(batch([0])).total().backward()
    wanted = 3.0 * ((kd.student.values / 3).softmax(1) - (kd.teacher.values / 3).softmax(1))
    torch.testing.assert_close(kd.student.values.grad, wanted.detach())
    assert kd.teacher.values.grad is None


@given(shift=st.floats(-50, 50), temperature=st.floats(0.5, 20))
def test_soft_term_ignores_a_constant_on_the_logits(shift, temperature):
    logits = [[1.0, 0, -1], [0.5, 0.5, 0]]
    teacher = Logits([[x + shift for x in row] for row in logits])
    term = KD(teacher, Logits(logits), temperature=temperature).loss(batch([0, 1]))["kd"][1]
    assert abs(term.item()) < 1e-9


def test_alpha_zero_needs_no_teacher_forward():
    class Fails(nn.Module):
        def forward(self, images):
            raise AssertionError("the teacher was called")

    terms = KD(Fails(), Logits([[1.0, 0]]), alpha=0.0).loss(batch([0]))
    assert list(terms) == ["ce"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "kd"
    method, config = load_config("kd/small", [*SHORT, "data.validation=0.2", "train.monitor=accuracy"])
    return folder, train(method, config, folder, quiet=True, cpu=True)


def test_run_leaves_a_stock_student_and_its_metrics(run):
    folder, metrics = run
    assert {"student/accuracy", "teacher/accuracy", "agreement", "confusion_matrix"} <= set(metrics)
    assert json.loads((folder / "metrics.json").read_text())["student/accuracy"] == metrics["student/accuracy"]
    _, config, artefacts = load_run(folder)
    student = timm.create_model(f"local-dir:{artefacts['student']}", pretrained=True).eval()
    data = load_data(config.data, config.seed)
    predictions = torch.cat([student(b.images).argmax(1) for b in data.test.loader(512)])
    assert float((predictions == data.test.labels).double().mean()) == pytest.approx(metrics["student/accuracy"])
    assert sum(map(sum, metrics["confusion_matrix"])) == len(data.test)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines if line["kind"] == "eval"} == {"teacher", "student"}
    assert set(next(line for line in lines if line["stage"] == "student")["terms"]) == {"ce", "kd"}


def test_report_samples_name_truth_teacher_and_student(run):
    folder, _ = run
    method, config, artefacts = load_run(folder)
    samples = method.predict(config, artefacts, 6)
    assert len(samples) == 6
    assert {"image", "truth", "student", "teacher"} <= set(samples[0])
    assert samples[0]["image"].shape == (8, 8)
    wrong = [s["student"]["label"] != s["truth"] for s in samples]
    assert wrong[:3] == [True] * 3, "after two epochs the student errs: errors come first"


def test_same_seed_same_student(run, tmp_path):
    metrics = run[1]
    method, config = load_config("kd/small", [*SHORT, "data.validation=0.2", "train.monitor=accuracy"])
    again = train(method, config, tmp_path / "again", quiet=True, cpu=True)
    assert again["student/nll"] == metrics["student/nll"]


def test_mixup_reaches_both_networks(tmp_path):
    method, config = load_config("kd/small", [*SHORT, "data.augment.mixup=0.4"])
    metrics = train(method, config, tmp_path / "mixed", quiet=True, cpu=True)
    assert 0 <= metrics["student/accuracy"] <= 1


def test_cached_teacher_gives_the_same_student(run, tmp_path):
    folder, _ = run
    overrides = [*SHORT, "teacher.train=null", f"teacher.checkpoint={folder}/teacher"]
    method, config = load_config("kd/small", overrides)
    assert write_cache(config, tmp_path / "cache")["samples"] == 50
    live = train(method, config, tmp_path / "live", quiet=True, cpu=True)
    method, config = load_config("kd/small", [*overrides, f"teacher.cache={tmp_path}/cache"])
    cached = train(method, config, tmp_path / "cached", quiet=True, cpu=True)
    assert cached["student/nll"] == pytest.approx(live["student/nll"], rel=1e-4)


def test_cache_of_other_data_or_with_augmentation_is_refused(run, tmp_path):
    folder, _ = run
    overrides = [*SHORT, "teacher.train=null", f"teacher.checkpoint={folder}/teacher"]
    _, config = load_config("kd/small", overrides)
    write_cache(config, tmp_path / "cache")
    for extra, message in (("seed=4", "data"), ("data.augment.hflip=0.5", "only without augmentation")):
        method, config = load_config("kd/small", [*overrides, f"teacher.cache={tmp_path}/cache", extra])
        with pytest.raises(InputError, match=message):
            train(method, config, tmp_path / extra.split("=")[0], quiet=True, cpu=True)


def test_small_and_paper_configs_say_what_they_are():
    _, small = load_config("kd/small")
    _, paper = load_config("kd/paper")
    assert small.data.name == "digits"
    assert (paper.teacher.name, paper.student.name) == ("resnet34.tv_in1k", "resnet18")
    assert timm.is_model(paper.teacher.name)
    assert timm.is_model(paper.student.name)


def test_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    kd = KD(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    optimizer = torch.optim.SGD(kd.student.parameters(), lr=0.5)
    images = torch.randn(32, 1, 4, 4)
    wanted = Batch(images, kd.teacher(images).argmax(1), torch.arange(32))
    losses = []
    for _ in range(50):
        loss = kd.loss(wanted).total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert F.cross_entropy(kd.student(images), wanted.labels) < 1.0
