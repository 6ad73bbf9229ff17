"""KD++: the feature term's values and gradients, class means, mixed labels, and the distiller in a plain loop."""

import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kd_classification.data import Batch
from kd_classification.methods.nd_loss import ND, centers_for, class_means, nd_loss, norm_deficit
from kd_classification.models import penultimate
from kdcore.errors import InputError
from kdcore.losses import dist, dkd, soft_target_kl

S = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
T = torch.tensor([[6.0, 8.0], [0.0, 0.5]], dtype=torch.float64)
C = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def gradient(student, teacher, centers):
    student = student.clone().requires_grad_()
    (result,) = torch.autograd.grad(nd_loss(student, teacher, centers), student)
    return result


def rows(seed, batch=5, width=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(3)]


def resnet(seed, last=16):
    return copy.deepcopy(made(seed, last))


@functools.cache
def made(seed, last):
    """A small network on 3 classes, its batch norms past their first statistics so that features are alive in eval."""
    torch.manual_seed(seed)
    args = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, last], "stem_width": 4, "zero_init_last": False}
    model = timm.create_model("resnet18", num_classes=3, in_chans=1, **args)
    for _ in range(10):
        model.train()(torch.randn(32, 1, 32, 32))
    return model


def batch(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 3
    return Batch(torch.randn(size, 1, 32, 32, generator=generator), labels, torch.arange(size))


# ---------------------------------------------------------------- the feature term


def test_values_and_gradient_by_hand():
    torch.testing.assert_close(nd_loss(S, T, C, reduction="none"), torch.tensor([0.7, 1 - 0.5**0.5]).double())
    assert nd_loss(S, T, C).item() == pytest.approx(0.4964466094, abs=1e-10)
    expected = torch.tensor([[-0.05, 0.0], [-0.3535533906, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient(S, T, C), expected, atol=1e-10, rtol=0)


def test_the_loss_is_zero_on_the_ray_of_the_centre_beyond_the_teachers_norm():
    direction = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    for a in (2.0, 3.0, 50.0):
        assert nd_loss(a * direction, teacher, 7 * direction).item() == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(gradient(a * direction, teacher, direction), torch.zeros_like(teacher))
    for a in (0.0, 0.5, 1.9):
        assert nd_loss(a * direction, teacher, direction).item() == pytest.approx(1 - a / 2)


def test_at_equal_norms_the_gradient_is_that_of_the_students_norm():
    student, teacher = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[5.0, 0.0]]).double()
    e, unit = torch.tensor([[1.0, 0.0]]).double(), student / 5
    tangential = -(e - (e * unit).sum() * unit) / 5
    torch.testing.assert_close(gradient(student, teacher, e), tangential)


@given(st.integers(0, 10_000), st.floats(0.05, 20))
@settings(max_examples=60, deadline=None)
def test_bounds_and_relation_to_the_cosine(seed, scale):
    student, teacher, centers = rows(seed)
    student = scale * student
    loss = nd_loss(student, teacher, centers, reduction="none")
    cosine = F.cosine_similarity(student, centers, dim=1)
    assert ((loss >= -1e-12) & (loss <= 2 + 1e-12)).all()
    longer = student.norm(dim=1) >= teacher.norm(dim=1)
    torch.testing.assert_close(loss[longer], 1 - cosine[longer])
    shorter, sign = ~longer, cosine.sign()
    # between 1 - cos and 1: pulled towards 1 by the missing norm
    assert (sign * (loss - (1 - cosine)) > 0)[shorter].all()
    assert (sign * (1 - loss) > 0)[shorter].all()


@given(st.integers(0, 10_000), st.floats(1, 30))
@settings(max_examples=60, deadline=None)
def test_beyond_the_teachers_norm_only_the_direction_counts(seed, scale):
    student, teacher, centers = rows(seed)
    student = student * (1.01 * teacher.norm(dim=1) / student.norm(dim=1))[:, None]
    torch.testing.assert_close(nd_loss(scale * student, teacher, centers), nd_loss(student, teacher, centers))
    along = (gradient(student, teacher, centers) * student).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)


@given(st.integers(0, 10_000), st.floats(0.01, 0.99), st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_below_the_teachers_norm_the_gradient_is_constant_along_the_centre(seed, scale, other):
    student, teacher, centers = rows(seed)
    norms = teacher.norm(dim=1)
    student = student * (scale * norms / student.norm(dim=1))[:, None]
    unit = F.normalize(centers, dim=1)
    torch.testing.assert_close((gradient(student, teacher, centers) * unit).sum(dim=1), -1 / (len(student) * norms))
    torch.testing.assert_close(nd_loss(student, teacher, other * centers), nd_loss(student, teacher, centers))


def test_the_teachers_scale_matters_below_its_norm():
    student, teacher, centers = rows(3)
    student = student * (0.1 * teacher.norm(dim=1) / student.norm(dim=1))[:, None]
    before = 1 - nd_loss(student, teacher, centers, reduction="none")
    after = 1 - nd_loss(student, 2 * teacher, 2 * centers, reduction="none")
    torch.testing.assert_close(after, before / 2)


def test_gradcheck_in_both_branches():
    student, teacher, centers = rows(1)
    for factor in (0.3, 3.0):
        inputs = (student * (factor * teacher.norm(dim=1) / student.norm(dim=1))[:, None]).requires_grad_()
        assert torch.autograd.gradcheck(lambda s: nd_loss(s, teacher, centers), inputs)
        assert torch.autograd.gradcheck(lambda s: norm_deficit(s, teacher), inputs)


def test_dead_features_give_a_finite_loss_and_gradient():
    zero, one = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    for student, teacher, loss in ((zero, zero, 1.0), (zero, one, 1.0), (one, zero, 0.0)):
        assert nd_loss(student, teacher, one).item() == pytest.approx(loss)
        assert gradient(student, teacher, one).isfinite().all()
    assert norm_deficit(zero, zero).item() == 0
    assert norm_deficit(zero, one).item() == 1


def test_neither_teacher_nor_centres_get_a_gradient():
    student, teacher, centers = (x.requires_grad_() for x in rows(2))
    (nd_loss(student, teacher, centers) + norm_deficit(student, teacher)).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert centers.grad is None


def test_half_precision_is_computed_in_float32():
    student, teacher, centers = (x.bfloat16() for x in rows(4))
    loss = nd_loss(student, teacher, centers)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nd_loss(student.float(), teacher.float(), centers.float()))


def test_norm_deficit_is_nd_along_the_students_own_direction():
    student, teacher, _ = rows(5, batch=40)
    torch.testing.assert_close(norm_deficit(student, teacher), nd_loss(student, teacher, student))


def test_shapes_that_differ_are_named():
    with pytest.raises(InputError, match=r"teacher.*\(2, 3\).*one shape \(B, D\)"):
        nd_loss(S, torch.zeros(2, 3), C)
    with pytest.raises(InputError, match=r"one shape \(B, D\)"):
        norm_deficit(S[0], T[0])


def test_detector_features_of_the_same_proposals():
    """Box-head features (R, D) and 4 classes with background, gathered by the proposals' labels."""
    student, teacher, _ = rows(6, batch=7, width=8)
    centers, labels = rows(7, batch=4, width=8)[0], torch.tensor([0, 3, 3, 1, 2, 0, 3])
    loss = nd_loss(student, teacher, centers_for(labels, centers), reduction="none")
    for r, label in enumerate(labels):
        larger = max(student[r].norm(), teacher[r].norm())
        assert loss[r].item() == pytest.approx(
            (1 - student[r] @ centers[label] / centers[label].norm() / larger).item()
        )


# ---------------------------------------------------------------- class means and mixed labels


@given(st.integers(0, 10_000), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_class_means_do_not_depend_on_the_batch_size(seed, size):
    generator = torch.Generator().manual_seed(seed)
    features = 100 + torch.randn(40, 3, generator=generator, dtype=torch.float64)
    labels = torch.randperm(40, generator=generator) % 4
    means = class_means(zip(features.split(size), labels.split(size)), "abcd")
    for k in range(4):
        torch.testing.assert_close(means[k], features[labels == k].mean(0), atol=1e-12, rtol=0)


def test_class_means_name_the_class_that_has_none():
    pairs = [(torch.ones(2, 3), torch.tensor([0, 2]))]
    with pytest.raises(InputError, match="class 'dog' has no training images"):
        class_means(pairs, ["cat", "dog", "emu"])
    with pytest.raises(InputError, match="class 'cat' is zero"):
        class_means([(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))], ["cat", "dog"])


def test_one_hot_probabilities_give_the_class_means():
    centers, labels = rows(8, batch=4)[0], torch.tensor([3, 0, 1])
    one_hot = F.one_hot(labels, 4).double()
    for over in ("classes", "batch"):
        torch.testing.assert_close(centers_for(one_hot, centers, over=over), centers[labels])


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 0.5))
@settings(max_examples=40, deadline=None)
def test_mixed_centres_follow_the_mixed_labels(seed, lam, smoothing):
    """Both readings of smoothing against their loops over images: timm's labels in, mixed centres out."""
    generator = torch.Generator().manual_seed(seed)
    centers, classes = rows(seed, batch=5)[0], 5
    y = torch.randint(classes, (6,), generator=generator)
    off = smoothing / classes
    smooth = F.one_hot(y, classes) * (1 - smoothing) + off
    labels = lam * smooth + (1 - lam) * smooth.flip(0)

    def of_class(i):
        return (1 - smoothing) * centers[y[i]] + off * centers.sum(0)

    def of_batch(i):
        return (1 - smoothing) * centers[y[i]] + off * sum(centers[j] for j in y)

    for over, own in (("classes", of_class), ("batch", of_batch)):
        expected = torch.stack([lam * own(i) + (1 - lam) * own(5 - i) for i in range(6)])
        torch.testing.assert_close(centers_for(labels, centers, smoothing=smoothing, over=over), expected)


def test_labels_of_another_kind_are_named():
    with pytest.raises(InputError, match=r"\(3, 7\).*\(B, 4\)"):
        centers_for(torch.ones(3, 7), torch.ones(4, 2))
    with pytest.raises(InputError, match="integers"):
        centers_for(torch.ones(3), torch.ones(4, 2))


# ---------------------------------------------------------------- the distiller


def distiller(*, last=16, **arguments):
    centers = torch.rand(3, 16, generator=torch.Generator().manual_seed(5))
    return ND(resnet(1), resnet(0, last), centers, **arguments)


def test_a_plain_loop_trains_it():
    network = distiller(warmup_epochs=0)
    loss = network.loss(batch()).total()
    loss.backward()
    assert network.projector is None
    assert all(p.grad is None for p in network.teacher.parameters())
    assert all(p.grad is not None for p in network.student.parameters())
    assert network.deployed() is network.student
    assert not any(name.startswith(("teacher", "centers")) for name in network.checkpoint_state())


def test_without_feature_term_and_warm_up_it_is_kd_with_cross_entropy():
    network = distiller(nd_weight=0, warmup_epochs=0, distillation_weight=3, temperature=2).eval()
    data = batch()
    logits, teacher_logits = network.student(data.images), network.teacher(data.images)
    expected = F.cross_entropy(logits, data.labels) + 3 * soft_target_kl(logits, teacher_logits, 2.0)
    terms = network.loss(data)
    assert list(terms) == ["ce", "kd"]
    torch.testing.assert_close(terms.total(), expected)


def test_the_warm_up_starts_at_exactly_zero_and_leaves_the_feature_term_alone():
    network = distiller(warmup_epochs=4, distillation_weight=2)
    seen = []
    for epoch in (0, 1, 2, 4, 9):
        network.progress.epoch = epoch
        terms = network.loss(batch())
        assert terms["nd"][0] == 2.0
        seen.append(terms["kd"][0])
    assert seen == [0, 0.5, 1.0, 2.0, 2.0]
    network.progress.epoch = 0
    terms = network.eval().loss(batch())
    torch.testing.assert_close(terms.total(), terms["ce"][1] + 2 * terms["nd"][1])


@pytest.mark.parametrize("kind", ["kd", "dkd", "dist", "hard"])
def test_each_distillation_is_the_named_loss_at_its_own_temperature(kind):
    network = distiller(distillation=kind, warmup_epochs=0, dkd_alpha=0.8, dkd_beta=0.5, dist_gamma=2).eval()
    data = batch()
    logits, reference = network.student(data.images), network.teacher(data.images)
    expected = {
        "kd": soft_target_kl(logits, reference, 4.0),
        "dkd": dkd(logits, reference, data.labels, alpha=0.8, beta=0.5, temperature=4.0),
        "dist": dist(logits, reference, beta=1.0, gamma=2.0, temperature=1.0),
        "hard": F.cross_entropy(logits, reference.argmax(1)),
    }[kind]
    torch.testing.assert_close(network.loss(data)[kind][1], expected)


def test_the_projector_learns_from_the_feature_term_alone():
    network = distiller(last=8, warmup_epochs=0)
    assert [type(layer) for layer in network.projector] == [nn.BatchNorm1d, nn.Dropout, nn.Linear]
    terms = network.loss(batch())
    for name, moves in (("ce", False), ("kd", False), ("nd", True)):
        found = torch.autograd.grad(
            terms[name][1], list(network.projector.parameters()), retain_graph=True, allow_unused=True
        )
        assert all((gradient is not None) == moves for gradient in found), name
    assert distiller(last=8, nd_weight=0).projector is None
    assert distiller(last=8, form="none").projector is None


def test_the_feature_term_sees_the_unclassified_feature_and_the_labels_centre():
    network = distiller(warmup_epochs=0).eval()
    data = batch()
    features, _ = penultimate(network.student, data.images)
    reference, _ = penultimate(network.teacher, data.images)
    assert (features.norm(dim=1) > 0).all()
    expected = nd_loss(features, reference, network.centers[data.labels])
    torch.testing.assert_close(network.loss(data)["nd"][1], expected)


@pytest.mark.parametrize("form", ["cosine", "norm"])
def test_ablations_take_the_place_of_the_term(form):
    network = distiller(form=form, warmup_epochs=0).eval()
    data = batch()
    features, _ = penultimate(network.student, data.images)
    reference, _ = penultimate(network.teacher, data.images)
    assert (features.norm(dim=1) < reference.norm(dim=1)).any()
    cosine = 1 - F.cosine_similarity(features, network.centers[data.labels], dim=1)
    deficit = F.relu(1 - features.norm(dim=1) / reference.norm(dim=1))
    expected = {"cosine": cosine, "norm": deficit}[form].mean()
    terms = network.loss(data)
    assert list(terms) == ["ce", "kd", form]
    torch.testing.assert_close(terms[form][1], expected)


def test_mixed_labels_go_through_every_term():
    network = distiller(warmup_epochs=0).eval()
    data = batch()
    labels = F.one_hot(data.labels, 3).float()
    hard, soft = network.loss(data), network.loss(data._replace(labels=labels))
    for name in hard:
        torch.testing.assert_close(soft[name][1], hard[name][1])
    mixed = network.loss(data._replace(labels=0.7 * labels + 0.3 * labels.flip(0)))
    assert mixed["nd"][1] != hard["nd"][1]
    with pytest.raises(InputError, match="dkd"):
        distiller(distillation="dkd", warmup_epochs=0).loss(data._replace(labels=labels))


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match=r"nd_wieght.*nd_weight"):
        distiller(nd_wieght=1)
    with pytest.raises(InputError, match=r"centers: given \(3, 9\); allowed: \(K, 16\)"):
        ND(resnet(0), resnet(1), torch.ones(3, 9))
    with pytest.raises(InputError, match="nothing to minimise"):
        distiller(ce_weight=0, form="none")
