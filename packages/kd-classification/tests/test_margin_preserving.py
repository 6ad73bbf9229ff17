"""Margin preserving training: the paper's terms by number, gradients, the arms, old and new classes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from kd_classification.data import Batch, DataConfig, load_data
from kd_classification.methods import margin_preserving as mp
from kdcore.config import read_yaml
from kdcore.errors import InputError
from kdcore.method import arm_config, find_config


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


def test_messages_about_arguments():
    with pytest.raises(InputError, match=r"num_old = 2: the old model gives 3 logits"):
        distiller(old=R_NEW).loss(batch())
    with pytest.raises(InputError, match=r"form = 'mse': allowed are 'kl', 'lm', 'labels'"):
        mp.focal_term(Z, R_OLD, Y, "mse")
    with pytest.raises(ValueError, match=r"labels has dtype torch.float64; it must hold integer class ids"):
        distiller().loss(batch(tensor([[1, 0, 0], [0, 0, 1]])))  # what mixup makes of labels


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
