"""KD++ as a run: its configs, the class means, resume, bad input, and what the term does to the features."""

import statistics

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from kd_classification.data import load_data
from kd_classification.methods.nd_loss import ND, feature_statistics, load_centers
from kd_classification.models import feature_width, penultimate
from kdcore.config import read_yaml
from kdcore.errors import InputError, RunFailed
from kdcore.gpu import module_fingerprint
from kdcore.method import arm_config, find_config, load_config
from kdcore.run import train

TINY = ["data.per_class=4", "teacher.train.epochs=2", "train.epochs=3", "method_args.warmup_epochs=2"]
TINY += ["teacher.args.channels=[8,8,8,32]", "teacher.args.stem_width=8"]


def test_small_config_has_equal_widths_and_its_arms_are_valid():
    values = read_yaml(find_config("nd_loss/small"))
    assert set(values["compare"]) == {"ce", "kd", "cosine", "norm"}
    for overrides in ({}, *values["compare"].values()):
        method, config = arm_config(values, overrides)
        assert method.key == "nd_loss"
    _, config = load_config("nd_loss/small")
    widths = [
        feature_width(timm.create_model(model.name, num_classes=10, in_chans=1, **model.args))
        for model in (config.teacher, config.student)
    ]
    assert widths[0] == widths[1]


def test_paper_config_is_valid_and_its_networks_exist():
    values = read_yaml(find_config("nd_loss/paper"))
    for overrides in ({}, *values["compare"].values()):
        arm_config(values, overrides)
    _, config = load_config("nd_loss/paper")
    assert (config.method_args.distillation_weight, config.method_args.nd_weight) == (2.5, 1.0)
    networks = [timm.create_model(model.name, pretrained=False) for model in (config.teacher, config.student)]
    assert [feature_width(network) for network in networks] == [512, 512]
    assert config.teacher.name.partition(".")[2] == "tv_in1k"
    assert config.teacher.name in timm.list_pretrained("resnet34.*")


def run(folder, *overrides, **options):
    method, config = load_config("nd_loss/small", [*TINY, *overrides])
    return config, train(method, config, folder, quiet=True, cpu=True, **options)


def test_a_run_ends_with_a_stock_timm_student_and_the_teachers_class_means(tmp_path):
    config, metrics = run(tmp_path / "run")
    student = timm.create_model(
        "resnet18",
        num_classes=10,
        in_chans=1,
        **config.student.args,
        checkpoint_path=str(tmp_path / "run/student/model.safetensors"),
    )
    data = load_data(config.data, config.seed)
    teacher = timm.create_model(f"local-dir:{tmp_path / 'run/teacher'}", pretrained=True).eval()
    with torch.no_grad():
        features, _ = penultimate(teacher, data.train_plain.loader(1000).__iter__().__next__().images)
    centers = load_file(tmp_path / "run/centers.safetensors")["centers"]
    for k in range(10):
        torch.testing.assert_close(centers[k], features[data.train.labels == k].mean(0))
    statistics = feature_statistics(student, data.test, centers)
    assert metrics["feature_norm"] == pytest.approx(statistics["feature_norm"])
    assert metrics["feature_cosine"] == pytest.approx(statistics["feature_cosine"])
    assert -1 <= metrics["feature_cosine"] <= 1
    assert metrics["teacher_feature_norm"] > 0


def test_a_narrow_student_with_mixup_ships_without_projector(tmp_path):
    narrow = "student.args.channels=[4,8,16,24]"
    mixed = ["data.augment.mixup=0.8", "data.augment.smoothing=0.1", "method_args.mixed_smoothing=batch"]
    _, metrics = run(tmp_path, narrow, *mixed, "train.epochs=1", "method_args.augmented_centers=true")
    names = load_file(tmp_path / "student/model.safetensors")
    assert not any("projector" in name or "centers" in name for name in names)
    assert "feature_norm" in metrics
    assert "feature_cosine" not in metrics


def test_a_run_that_was_cut_resumes_to_the_same_student(tmp_path, monkeypatch):
    run(tmp_path / "whole", "train.checkpoint_every=1")
    original = ND.epoch_end

    def cut(self):
        original(self)
        if self.progress.epoch == 1:
            raise RunFailed("cut")

    monkeypatch.setattr(ND, "epoch_end", cut)
    with pytest.raises(RunFailed, match="cut"):
        run(tmp_path / "cut", "train.checkpoint_every=1")
    monkeypatch.setattr(ND, "epoch_end", original)
    before = (tmp_path / "cut/centers.safetensors").stat().st_mtime_ns
    run(tmp_path / "cut", "train.checkpoint_every=1", resume=True)
    assert (tmp_path / "cut/centers.safetensors").stat().st_mtime_ns == before
    whole, resumed = (load_file(tmp_path / name / "student/model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_class_means_of_another_teacher_are_refused(tmp_path):
    teacher, other = (timm.create_model("resnet10t", num_classes=3, in_chans=1) for _ in range(2))
    path = tmp_path / "centers.safetensors"
    save_file({"centers": torch.ones(3, 16)}, path, metadata={"teacher": module_fingerprint(teacher)})
    assert load_centers(path, teacher).shape == (3, 16)
    with pytest.raises(InputError, match="another teacher"):
        load_centers(path, other)
    save_file({"means": torch.ones(3, 16)}, path)
    with pytest.raises(InputError, match="no tensor 'centers'"):
        load_centers(path, teacher)
    path.write_bytes(b"broken")
    with pytest.raises(InputError, match="safetensors"):
        load_centers(path, teacher)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_args.form=direction", "method_args.form"),
        ("method_args.nd_weight=-1", "method_args.nd_weight"),
        ("teacher.cache=logits", "teacher.cache"),
    ],
)
def test_bad_input_is_named_before_anything_trains(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_dkd_with_mixup_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"dkd.*data\.augment\.mixup"):
        run(tmp_path / "run", "method_args.distillation=dkd", "data.augment.cutmix=1.0")


def test_a_class_without_training_images_is_named(tmp_path):
    images, labels = np.zeros((8, 16, 16), np.uint8), np.array([0, 2] * 4)
    np.savez(tmp_path / "gap.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    source = ["data.name=npz", f"data.root={tmp_path / 'gap.npz'}", "data.per_class=null"]
    with pytest.raises(InputError, match="class '1' has no training images"):
        run(tmp_path / "run", *source)


# ---------------------------------------------------------------- what the term does to the features


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    """Arm -> metrics of the small config on each of 4 seeds."""
    values = read_yaml(find_config("nd_loss/small"))
    result = {}
    for arm in ("nd_loss", "ce", "kd", "cosine"):
        result[arm] = []
        for seed in range(4):
            method, config = arm_config(values, {**values["compare"].get(arm, {}), "seed": seed})
            folder = tmp_path_factory.mktemp(f"{arm}-{seed}")
            result[arm].append(train(method, config, folder, quiet=True, cpu=True))
    return result


@pytest.mark.slow
def test_the_term_raises_the_norm_and_both_raise_the_cosine_on_every_seed(evidence):
    def of(arm, metric):
        return [metrics[metric] for metrics in evidence[arm]]

    for other in ("kd", "cosine"):
        assert all(a > b for a, b in zip(of("nd_loss", "feature_norm"), of(other, "feature_norm")))
    for arm in ("nd_loss", "cosine"):
        assert all(a > b for a, b in zip(of(arm, "feature_cosine"), of("kd", "feature_cosine")))


@pytest.mark.slow
def test_the_sum_beats_cross_entropy_beyond_noise(evidence):
    """Paired by seed, two standard errors. The gain over plain KD is smaller than the noise of this many digits."""
    pairs = zip(evidence["nd_loss"], evidence["ce"])
    gains = [a["student/accuracy"] - b["student/accuracy"] for a, b in pairs]
    assert statistics.mean(gains) > 2 * statistics.stdev(gains) / len(gains) ** 0.5
