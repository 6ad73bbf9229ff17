"""KD++: the feature term's values and gradients, the class means, the stages, and what it does to features."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from kd_classification.data import Batch, load_data
from kd_classification.methods.nd_loss import (
    ND,
    centers_for,
    class_means,
    feature_statistics,
    load_centers,
    nd_loss,
    norm_deficit,
)
from kd_classification.models import feature_width, penultimate
from kdcore.config import read_yaml
from kdcore.errors import InputError, RunFailed
from kdcore.losses import dist, dkd, soft_target_kl
from kdcore.method import arm_config, find_config, load_config
from kdcore.run import train

S = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
T = torch.tensor([[6.0, 8.0], [0.0, 0.5]], dtype=torch.float64)
C = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
TINY = ["data.per_class=4", "teacher.train.epochs=2", "train.epochs=3", "method_args.warmup_epochs=2"]
TINY += ["teacher.args.channels=[8,8,8,32]", "teacher.args.stem_width=8"]


def gradient(student, teacher, centers):
    student = student.clone().requires_grad_()
    (result,) = torch.autograd.grad(nd_loss(student, teacher, centers), student)
    return result


def rows(seed, batch=5, width=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(3)]


def resnet(seed, last=16):
    """A small network on 3 classes, its batch norms past their first statistics so that features are alive in eval."""
    torch.manual_seed(seed)
    args = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, last], "stem_width": 4, "zero_init_last": False}
    model = timm.create_model("resnet18", num_classes=3, in_chans=1, **args)
    for _ in range(20):
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


# ---------------------------------------------------------------- the configs and a run


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
    teacher = resnet(0)
    from kdcore.gpu import module_fingerprint

    path = tmp_path / "centers.safetensors"
    save_file({"centers": torch.ones(3, 16)}, path, metadata={"teacher": module_fingerprint(teacher)})
    assert load_centers(path, copy.deepcopy(teacher)).shape == (3, 16)
    with pytest.raises(InputError, match="another teacher"):
        load_centers(path, resnet(1))
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


# ---------------------------------------------------------------- what the term does to the features


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    """Metrics of the small config's arms on 8 seeds."""
    values = read_yaml(find_config("nd_loss/small"))
    arms = {"nd_loss": {}, "kd": values["compare"]["kd"], "cosine": values["compare"]["cosine"]}
    result = {arm: [] for arm in arms}
    for seed in range(8):
        for arm, overrides in arms.items():
            method, config = arm_config(values, {**overrides, "seed": seed})
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
def test_the_term_adds_accuracy_to_kd_on_average(evidence):
    differences = [a["student/accuracy"] - b["student/accuracy"] for a, b in zip(evidence["nd_loss"], evidence["kd"])]
    assert math.fsum(differences) > 0
