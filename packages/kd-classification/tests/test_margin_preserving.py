"""Margin preserving training: the paper's terms by number, gradients, old and new classes, a run from end to end."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file
from torch import nn

from kd_classification import runs
from kd_classification.data import Batch, DataConfig, load_data
from kd_classification.methods import margin_preserving as mp
from kdcore import run as kdrun
from kdcore.config import read_yaml
from kdcore.errors import InputError
from kdcore.method import arm_config, find_config, load_config


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


Z, Y, K_OLD = tensor([[2, 0, 1], [0.5, 1.5, -1]]), torch.tensor([0, 2]), 2
R_OLD, R_NEW = tensor([[1, -1], [0, 2]]), tensor([[3, 0, 1], [0, 1, 2]])


class Fixed(nn.Module):
    """A classifier with given logits, whatever the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, images):
        return self.logits


def distiller(z=Z, old=R_OLD, new=R_NEW, **arguments):
    return mp.MarginPreserving(Fixed(old), Fixed(new), Fixed(z), num_old=K_OLD, **arguments)


def batch(labels=Y):
    return Batch(torch.zeros(len(labels), 1, 8, 8), labels, torch.arange(len(labels)))


def values(terms):
    return {name: weight * term.item() for name, (weight, term) in terms.items()}


# ---------------------------------------------------------------- the objective


def test_numbers_of_the_kl_form():
    terms = distiller().loss(batch())
    assert values(terms) == pytest.approx(
        {"ce": 1.6606765676, "old": 0.0024305745, "reference": 0.1805411359}, abs=1e-9
    )
    assert terms.total().item() == pytest.approx(1.8436482780, abs=1e-9)


def test_numbers_of_the_lm_form():
    terms = distiller(form="lm").loss(batch())
    assert values(terms) == pytest.approx({"ce": 1.6606765676, "old": 0.625, "reference": 2.1}, abs=1e-9)
    assert terms.total().item() == pytest.approx(4.3856765676, abs=1e-9)


def test_no_bias_is_cross_entropy():
    value = mp.margin_calibrated_cross_entropy(Z, Y, K_OLD, 0.0)
    assert value.item() == pytest.approx(1.6395724981, abs=1e-9)
    assert value.item() == F.cross_entropy(Z, Y).item()


def test_the_bias_is_outside_the_distillation_and_the_logits_stay():
    z = Z.clone()
    biased = mp.margin_calibrated(z, K_OLD, 4.0)
    assert torch.equal(z, Z)
    assert (biased - z).tolist() == [[0, 0, 4], [0, 0, 4]]
    with_bias, without = values(distiller().loss(batch())), values(distiller(bias=0.0).loss(batch()))
    assert with_bias["old"] == without["old"]
    assert with_bias["reference"] == without["reference"]
    assert with_bias["ce"] != without["ce"]


def test_the_old_branch_is_a_softmax_over_the_old_classes():
    weights = tensor([6.0, 1.0])  # the old model is right on sample 0, and cannot be on a new class
    p, q = torch.softmax(R_OLD / 5, 1), torch.softmax(Z[:, :K_OLD] / 5, 1)
    expected = (weights * (p * (p / q).log()).sum(1)).mean()
    assert mp.focal_term(Z, R_OLD, Y).item() == pytest.approx(expected.item(), abs=1e-15)
    sliced_late = (weights * (p * (p / torch.softmax(Z / 5, 1)[:, :K_OLD]).log()).sum(1)).mean()
    assert abs(expected - sliced_late) > 0.1


@pytest.mark.parametrize("form", ["kl", "lm"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 5.0), (0.0, 1.0), (3.0, 0.0)])
def test_a_student_that_equals_its_references_gets_nothing_from_them(form, alpha, beta):
    model = distiller(R_NEW, R_NEW[:, :K_OLD], R_NEW, form=form, alpha=alpha, beta=beta, bias=0.0)
    terms = model.loss(batch())
    (terms["old"][1] + terms["reference"][1]).backward()
    assert abs(values(terms)["old"]) < 1e-15
    assert abs(values(terms)["reference"]) < 1e-15
    assert model.student.logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize("reference", [R_OLD, R_NEW])
def test_shift_and_temperature(reference):
    shifted = reference + tensor([[3.0], [-1.0]])
    kl, lm = (mp.focal_term(Z, reference, Y, form) for form in ("kl", "lm"))
    assert mp.focal_term(Z, shifted, Y, "kl").item() == pytest.approx(kl.item(), abs=1e-14)
    assert abs(mp.focal_term(Z, shifted, Y, "lm") - lm) > 0.1
    ratio = mp.focal_term(Z, reference, Y, tau=5e4) / mp.focal_term(Z, reference, Y, tau=5e3)
    assert ratio.item() == pytest.approx(0.01, rel=1e-3)  # 1 / tau^2: nothing compensates it


def test_focal_weights_choose_the_samples():
    rows = [mp.focal_term(Z[i : i + 1], R_OLD[i : i + 1], Y[i : i + 1], alpha=1.0, beta=0.0) for i in range(2)]
    assert mp.focal_term(Z, R_OLD, Y, alpha=1.0, beta=0.0).item() == pytest.approx(sum(rows).item() / 2, abs=1e-15)
    only_right = mp.focal_term(Z, R_OLD, Y, alpha=0.0, beta=1.0)
    assert only_right.item() == pytest.approx(rows[0].item() / 2, abs=1e-15)


logits = hnp.arrays(np.float64, (4, 5), elements=st.floats(-6, 6))


@given(z=logits, bias=st.floats(0, 8), labels=st.lists(st.integers(0, 4), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_gradient_of_the_calibrated_cross_entropy(z, bias, labels):
    z, labels = torch.from_numpy(z).requires_grad_(), torch.tensor(labels)
    (gradient,) = torch.autograd.grad(mp.margin_calibrated_cross_entropy(z, labels, 3, bias), z)
    expected = (torch.softmax(mp.margin_calibrated(z.detach(), 3, bias), 1) - F.one_hot(labels, 5)) / 4
    torch.testing.assert_close(gradient, expected, atol=1e-14, rtol=0)
    assert gradient.sum(1).abs().max() < 1e-14


@given(z=logits, bias=st.floats(0, 6), more=st.floats(0.01, 2))
@settings(max_examples=50, deadline=None)
def test_a_larger_bias_pushes_new_logits_of_old_images_down_harder(z, bias, more):
    z, labels = torch.from_numpy(z).requires_grad_(), torch.tensor([0, 1, 2, 0])
    gradients = [
        torch.autograd.grad(mp.margin_calibrated_cross_entropy(z, labels, 3, b), z)[0][:, 3:]
        for b in (bias, bias + more)
    ]
    assert (gradients[1] > gradients[0]).all()


def test_the_optimum_has_new_logits_lower_by_the_bias():
    """For class probabilities p the minimiser of E[L_D] is log p with the new classes lowered by b (E8)."""
    p = tensor([0.4, 0.1, 0.2, 0.3])
    z = (p.log() - 4.0 * (torch.arange(4) >= 2)).repeat(4, 1).requires_grad_()
    losses = torch.stack(
        [mp.margin_calibrated_cross_entropy(z[y : y + 1], torch.tensor([y]), 2, 4.0) for y in range(4)]
    )
    (gradient,) = torch.autograd.grad((p * losses).sum(), z)
    assert gradient.sum(0).abs().max() < 1e-15


def test_where_gradients_go():
    model = distiller()
    terms = model.loss(batch())
    terms["old"][1].backward()
    assert (model.student.logits.grad[:, K_OLD:] == 0).all()
    assert (model.student.logits.grad[:, :K_OLD] != 0).any()
    terms = model.loss(batch())
    terms.total().backward()
    for frozen in (model.old, model.teacher):
        assert frozen.logits.requires_grad is False
        assert frozen.logits.grad is None
        assert not frozen.training
    assert model.train().student.training
    assert not model.old.training
    assert not model.old_logits(batch()).requires_grad
    assert model.deployed() is model.student
    assert set(model.checkpoint_state()) == {"student.logits"}


@pytest.mark.parametrize("form", ["kl", "lm", "labels"])
@pytest.mark.parametrize("reference", [R_OLD, R_NEW])
def test_gradcheck(form, reference):
    z = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: mp.focal_term(z, reference, Y, form), z)
    assert torch.autograd.gradcheck(lambda z: mp.margin_calibrated_cross_entropy(z, Y, K_OLD, 4.0), z)


# ---------------------------------------------------------------- the methods it is compared with


def arm(name):
    """The arguments that an arm of the small config gives to the distiller."""
    values = read_yaml(find_config("margin_preserving/small"))
    _, config = arm_config(values, values["compare"][name])
    return config.method_args.model_dump(exclude={"references"}), config.method_args.references


def test_arms():
    ce = F.cross_entropy(Z, Y).item()
    kl, lm = mp.focal_term(Z, R_OLD, Y).item(), mp.focal_term(Z, R_OLD, Y, "lm").item()
    per_sample = F.cross_entropy(Z, Y, reduction="none")
    expected = {
        "ce": {"ce": ce},
        "pct_kl": {"ce": ce, "old": kl},
        "pct_lm": {"ce": ce, "old": 0.4 * lm},
        "pct_naive": {"ce": ce, "old": per_sample[0].item() / 2},  # only sample 0 is right by the old model
        "bias_only": {"ce": 1.6606765676},
        "no_bias": {"ce": ce, "old": 0.0024305745, "reference": 0.1805411359},
    }
    for name, terms in expected.items():
        assert values(distiller(**arm(name)[0]).loss(batch())) == pytest.approx(terms, abs=1e-9), name
    p, q = torch.softmax(R_NEW / 5, 1), torch.softmax(Z / 5, 1)
    plain = 25 * (p * (p / q).log()).sum(1).mean().item()
    assert values(distiller(**arm("kd")[0]).loss(batch())) == pytest.approx({"ce": ce, "reference": plain}, abs=1e-9)


def test_elodi_matches_the_mean_of_the_references_after_its_warm_up():
    arguments, references = arm("elodi")
    assert references > 1
    members = [R_NEW, R_NEW + 1.0, R_NEW * 0.5]
    model = distiller(**arguments)
    model.teacher = mp.freeze(mp.MeanLogits([Fixed(r) for r in members]))
    assert list(model.loss(batch())) == ["ce"]
    model.progress.epoch = 6
    mean = sum(members) / 3
    expected = {
        "ce": F.cross_entropy(Z, Y).item(),
        "old": 0.6 * 0.5 * (Z[:, :K_OLD] - R_OLD).square().mean().item(),
        "reference": 0.4 * 0.5 * (Z - mean).square().mean().item(),
    }
    assert values(model.loss(batch())) == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------- old and new classes


def test_classes_by_count_and_by_name():
    data = load_data(DataConfig(per_class=5))
    full, known = mp.split_classes(data, 4)
    assert torch.equal(full.train.labels, data.train.labels)
    assert known.class_names == ["0", "1", "2", "3"]
    assert len(known.train) == 20
    assert known.test.labels.unique().tolist() == [0, 1, 2, 3]

    full, known = mp.split_classes(data, ["7", "3"])
    assert full.class_names == ["7", "3", "0", "1", "2", "4", "5", "6", "8", "9"]
    assert known.class_names == ["7", "3"]
    for part in ("train", "test"):
        before, after = getattr(data, part), getattr(full, part)
        assert [full.class_names[k] for k in after.labels] == [data.class_names[k] for k in before.labels]
    sevens = known.train.labels == 0
    original = data.train[int(torch.nonzero(data.train.labels == 7)[0])][0]
    assert torch.equal(known.train[int(torch.nonzero(sevens)[0])][0], original)


def test_validation_images_follow():
    full, known = mp.split_classes(load_data(DataConfig(validation=0.2)), ["9", "0"])
    assert known.validation.labels.unique().tolist() == [0, 1]
    assert len(full.validation) > len(known.validation) > 0
    assert mp.split_classes(load_data(DataConfig()), 5)[1].validation is None


@pytest.mark.parametrize(
    ("old_classes", "message"),
    [
        (10, r"old_classes = 10: allowed are 1 to 9 of the 10 classes"),
        ([], r"old_classes = \[\]: allowed are 1 to 9"),
        (["3", "3"], r"old_classes = \['3', '3'\]: a class is named twice"),
        (["3", "x"], r"old_classes: no class 'x'"),
    ],
)
def test_messages_about_classes(old_classes, message):
    with pytest.raises(InputError, match=message):
        mp.split_classes(load_data(DataConfig(per_class=2)), old_classes)


def test_flip_metrics():
    """Old-class images 0-3 repeat the flips of kdcore's test; images 4 and 5 are of the new class 2."""
    old = F.one_hot(torch.tensor([0, 1, 1, 0, 0, 1]), 2).double()
    new = 2.0 * F.one_hot(torch.tensor([0, 0, 1, 2, 2, 1]), 3).double()
    result = mp.flip_metrics(old, new, torch.tensor([0, 1, 0, 0, 2, 2]))
    assert result["negative_flip_rate"] == 0.5
    assert result["relative_negative_flip_rate"] == pytest.approx(8 / 9, abs=1e-12)
    assert result["positive_flip_rate"] == 0.0
    assert result["accuracy_old"] == 0.25
    assert result["accuracy_new"] == 0.5
    assert result["margin"] == pytest.approx((2 + 2 + 2 - 2) / 4)
    assert "accuracy_new" not in mp.flip_metrics(old[:4], new[:4], torch.tensor([0, 1, 0, 0]))


# ---------------------------------------------------------------- configs and runs

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
        alike = [k for k in range(len(data.test)) if (runs._picture(data.test, k) == sample["image"]).all()]
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
