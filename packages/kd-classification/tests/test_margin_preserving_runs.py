"""Margin preserving training as runs: configs, stages, resume, cache, and the mechanism on the small config."""

import json
import math

import pytest
import timm
import torch
from safetensors.torch import load_file

from kd_classification import runs
from kd_classification.data import load_data
from kd_classification.integrations.timm_task import as_timm_task
from kd_classification.methods import margin_preserving as mp
from kdcore import run as kdrun
from kdcore.config import read_yaml
from kdcore.errors import InputError
from kdcore.method import arm_config, find_config, load_config

NETWORK = "{layers: [1, 1, 1, 1], channels: [4, 4, 8, 8], stem_width: 4}"
TINY = ["data.per_class=10", *(f"{role}.args={NETWORK}" for role in ("old", "teacher", "student"))]
TINY += ["old.train.epochs=2", "teacher.train.epochs=2", "train.epochs=2", "train.checkpoint_every=1"]


def tiny(*overrides):
    return load_config("margin_preserving/small", [*TINY, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["old_classes=0"], r"'old_classes.*' = 0: should be greater than or equal to 1"),
        (["method_args.bias=-1"], r"'method_args.bias' = -1: should be greater than or equal to 0"),
        (["method_args.form=mse"], r"'method_args.form' = 'mse': allowed: 'kl', 'lm' or 'labels'"),
        (["method_args.bais=1"], r"unknown key 'method_args.bais'; did you mean 'bias'\?"),
        (["old.train=null"], r"'old' has no weights"),
    ],
)
def test_messages_about_the_config(overrides, message):
    with pytest.raises(InputError, match=message):
        tiny(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["old_classes=10"], r"old_classes = 10: allowed are 1 to 9"),
        (["data.augment.mixup=0.2"], r"data.augment: mixup and cutmix must be 0"),
        (["old.cache=somewhere"], r"old.cache: not supported"),
        (["old.name=resnet19"], r"old.name = 'resnet19': not a timm model"),
        (["old.args={layers: 3}"], r"old.args = \{'layers': 3\}: timm refuses them"),
    ],
)
def test_messages_before_anything_trains(tmp_path, overrides, message):
    method, config = tiny(*overrides)
    with pytest.raises(InputError, match=message):
        kdrun.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert not (tmp_path / "run").exists()


def weights(folder):
    return load_file(folder / "student" / "model.safetensors")


def test_a_run_from_end_to_end(tmp_path):
    method, config = tiny("data.validation=0.2")
    metrics = kdrun.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert list(json.loads((tmp_path / "run" / "stages.json").read_text())) == ["old", "teacher", "student"]
    gain = metrics["positive_flip_rate"] - metrics["negative_flip_rate"]
    assert metrics["accuracy_old"] - metrics["old/accuracy"] == pytest.approx(gain, abs=1e-12)
    counts = torch.tensor(metrics["confusion_matrix"]).double()
    both = (counts[:5].sum() * metrics["accuracy_old"] + counts[5:].sum() * metrics["accuracy_new"]) / counts.sum()
    assert both.item() == pytest.approx(metrics["student/accuracy"], abs=1e-9)
    assert {"margin", "teacher/negative_flip_rate", "validation/negative_flip_rate"} <= set(metrics)
    assert all(math.isfinite(v) for v in metrics.values() if isinstance(v, float))

    student = timm.create_model(f"local-dir:{tmp_path / 'run' / 'student'}", pretrained=True).eval()
    file = tmp_path / "run" / "student" / "model.safetensors"
    plain = timm.create_model("resnet18", num_classes=10, in_chans=1, checkpoint_path=str(file), **config.student.args)
    images = load_data(config.data).test
    some = torch.stack([images[k][0] for k in range(4)])
    torch.testing.assert_close(student(some), plain.eval()(some))
    old = timm.create_model(f"local-dir:{tmp_path / 'run' / 'old'}", pretrained=True)
    assert (student.num_classes, old.num_classes) == (10, 5)
    assert kdrun.evaluate(tmp_path / "run") == metrics


def test_old_classes_by_name_end_to_end(tmp_path):
    method, config = tiny("old_classes=[7, 3, 8]", "method_args.references=2", "method_args.warmup_epochs=1")
    metrics = kdrun.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert list(json.loads((tmp_path / "run" / "stages.json").read_text())) == ["old", "teacher", "teacher2", "student"]
    references = [load_file(tmp_path / "run" / name / "model.safetensors") for name in ("teacher", "teacher2")]
    assert not torch.equal(references[0]["conv1.weight"], references[1]["conv1.weight"])
    order = ["7", "3", "8", "0", "1", "2", "4", "5", "6", "9"]
    assert metrics["class_names"] == order
    for name, classes in (("student", order), ("old", order[:3])):
        assert json.loads((tmp_path / "run" / name / "config.json").read_text())["label_names"] == classes
    # the report's samples tell the same class names as the data does
    _, _, artefacts = kdrun.load_run(tmp_path / "run")
    data = load_data(config.data)
    for sample in method.predict(config, artefacts, 6):
        alike = [k for k in range(len(data.test)) if (runs.picture(data.test, k) == sample["image"]).all()]
        assert sample["truth"] in {data.class_names[int(data.test.labels[k])] for k in alike}


def test_a_saved_old_model_with_other_classes_is_refused(tmp_path):
    method, config = tiny()
    kdrun.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    saved = f"old.checkpoint={tmp_path / 'run' / 'old'}"
    method, config = tiny(saved, "old.train=null")
    assert kdrun.train(method, config, tmp_path / "again", quiet=True, cpu=True)["old/accuracy"] > 0
    method, config = tiny(saved, "old.train=null", "old_classes=[0, 2, 1, 3, 4]")
    with pytest.raises(InputError, match=r"its class 1 is '1', the run's is '2'; name the old classes in the order"):
        kdrun.train(method, config, tmp_path / "third", quiet=True, cpu=True)
    method, config = tiny(saved, "old.train=null", "old_classes=4")
    with pytest.raises(InputError, match=r"it tells 5 classes apart, the data has 4"):
        kdrun.train(method, config, tmp_path / "fourth", quiet=True, cpu=True)


def test_resume_in_the_student_stage(tmp_path, monkeypatch):
    method, config = tiny("method_args.warmup_epochs=1", "train.epochs=3")
    kdrun.train(method, config, tmp_path / "whole", quiet=True, cpu=True)
    loss = mp.MarginPreserving.loss

    def cut(self, batch, player="student"):
        if self.progress.step == 4:
            raise KeyboardInterrupt
        return loss(self, batch, player)

    monkeypatch.setattr(mp.MarginPreserving, "loss", cut)
    with pytest.raises(KeyboardInterrupt):
        kdrun.train(method, config, tmp_path / "cut", quiet=True, cpu=True)
    monkeypatch.undo()
    kdrun.train(method, config, tmp_path / "cut", resume=True, quiet=True, cpu=True)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_cached_reference_logits_train_the_same_student(tmp_path):
    method, config = tiny()
    kdrun.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    given = ["teacher.train=null", f"teacher.checkpoint={tmp_path / 'run' / 'teacher'}"]
    method, config = tiny(*given)
    method.cache(config, tmp_path / "cache")
    method, config = tiny(*given, f"teacher.cache={tmp_path / 'cache'}")
    kdrun.train(method, config, tmp_path / "cached", quiet=True, cpu=True)
    live, cached = weights(tmp_path / "run"), weights(tmp_path / "cached")
    for name in live:
        torch.testing.assert_close(live[name], cached[name], atol=1e-4, rtol=1e-3)


def test_the_paper_config_is_torchvisions_resnet18():
    from torchvision.models import resnet18

    _, config = load_config("margin_preserving/paper")
    assert (config.old_classes, config.method_args) == (50, mp.MarginPreservingConfig())
    assert config.train == config.old.train == config.teacher.train
    for model, classes in ((config.old, 50), (config.teacher, 100), (config.student, 100)):
        ours = timm.create_model(model.name, num_classes=classes, **model.args).eval()
        theirs = resnet18(num_classes=classes).eval()
        ours.load_state_dict(theirs.state_dict())
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours(images), theirs(images))
    values = read_yaml(find_config("margin_preserving/paper"))
    for overrides in values["compare"].values():
        arm_config(values, overrides)


def test_timms_own_training_task_takes_it():
    small = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8), "stem_width": 4, "in_chans": 1}
    old, reference, student = (timm.create_model("resnet18", num_classes=k, **small) for k in (3, 5, 5))
    model = mp.MarginPreserving(old, reference, student, num_old=3)
    result = as_timm_task(model, epochs=1, steps_per_epoch=1)(torch.randn(4, 1, 16, 16), torch.tensor([0, 4, 2, 1]))
    assert result["output"].shape == (4, 5)
    parts = result["ce"] + result["old"] + result["reference"]
    torch.testing.assert_close(result["loss"], parts)
    result["loss"].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


# ---------------------------------------------------------------- the mechanism


@pytest.mark.slow
def test_fewer_negative_flips_at_the_same_accuracy(tmp_path):
    """The paper's story on the small config, means over 8 paired seeds."""
    values = read_yaml(find_config("margin_preserving/small"))
    mean = {}
    for name in ("mpt", "ce", "no_bias", "bias_only"):
        results = []
        for seed in range(8):
            method, config = arm_config(values, {**values["compare"].get(name, {}), "seed": seed})
            results.append(kdrun.train(method, config, tmp_path / f"{name}{seed}", quiet=True, cpu=True))
        mean[name] = {key: sum(r[key] for r in results) / 8 for key in results[0] if isinstance(results[0][key], float)}
    flip, accuracy, margin = (
        {name: metrics[key] for name, metrics in mean.items()}
        for key in ("negative_flip_rate", "student/accuracy", "margin")
    )
    assert flip["mpt"] < flip["ce"], mean
    assert flip["mpt"] < flip["no_bias"], mean
    assert accuracy["mpt"] - accuracy["bias_only"] > 0.03, mean
    assert abs(accuracy["mpt"] - accuracy["ce"]) < 0.01, mean
    assert margin["mpt"] > margin["no_bias"], mean
    assert margin["bias_only"] > margin["ce"], mean
