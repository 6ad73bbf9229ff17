"""DistillNearest: similarity scores and weights in numbers, invariances, who learns from what, whole runs."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_classification.data import Batch, load_data
from kd_classification.engine.few_labels import Pair, plain, split_target
from kd_classification.engine.similarity import (
    average_ranks,
    cka,
    h_score,
    knn_accuracy,
    leep,
    nce,
    parc,
    row_distances,
    rsa,
    similarity_scores,
    spearman,
)
from kd_classification.methods.distill_nearest import (
    DistillNearestConfig,
    DistillWeighted,
    Sources,
    chosen_sources,
    source_data,
    source_loss,
    source_weights,
)
from kd_classification.models import load_model, penultimate
from kd_classification.testing import stock_classifier
from kdcore.config import read_yaml
from kdcore.errors import InputError
from kdcore.method import arm_config, find_config, load_config
from kdcore.run import train

NET = "{name: resnet18, args: {layers: [1, 1, 1, 1], channels: [4, 4, 4, 8], stem_width: 4}, train: {epochs: 1}"
TINY = [f"sources=[{NET}, label: low, classes: [[0], [1], [2]]}}, {NET}, label: parity, classes: [[0, 2], [1, 3]]}}]"]
TINY += ["train.epochs=1", "unlabelled=100", "student.args.channels=[4,4,4,8]"]

FEATURES = torch.tensor([[1.0, 0, 2], [2, 0, 2], [0, 3, 1], [0, 2, 0]])
LABELS = torch.tensor([0, 0, 1, 1])


def problem(seed: int, n: int = 12, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64), torch.arange(n) % 3


# ---------------------------------------------------------------- scores


def test_parc_and_cka_by_hand():
    distances = row_distances(FEATURES.double())
    upper = distances[*torch.triu_indices(4, 4, offset=1)].tolist()
    assert upper == pytest.approx([0.15188, 1.83444, 1.99931, 1.99968, 1.86722, 0.14566], abs=5e-6)
    assert parc(FEATURES, LABELS) == pytest.approx(0.8280786712, abs=1e-9)
    assert cka(FEATURES, LABELS) == pytest.approx(0.9810807923, abs=1e-9)


@given(seed=st.integers(0, 300))
def test_parc_does_not_see_names_order_and_units(seed):
    f, y = problem(seed)
    value = parc(f, y)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
    assert parc(f, (y + 1) % 3 * 7) == pytest.approx(value, abs=1e-9)
    assert parc(f[order], y[order]) == pytest.approx(value, abs=1e-9)
    assert parc(f * torch.tensor([1.0, 2, 0.5, 3, 9]) - 4, y) == pytest.approx(value, abs=1e-9)
    assert -1 <= value <= 1
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).double())[0]
    assert cka(3 * f @ rotation, y) == pytest.approx(cka(f, y), abs=1e-9)


def test_labels_as_features_are_perfect_and_noise_is_nothing():
    y = torch.arange(12) % 4
    assert parc(F.one_hot(y).double(), y) == pytest.approx(1.0, abs=1e-12)
    unbalanced = torch.tensor([0] * 6 + [1] * 3 + [2] * 2)
    assert parc(F.one_hot(unbalanced).double(), unbalanced) < 1
    f, y = problem(0, n=30)
    values = [parc(f, y[torch.randperm(30, generator=torch.Generator().manual_seed(s))]) for s in range(50)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(50)


def test_repeated_images_stay_tied_and_constant_columns_are_dropped():
    f, y = problem(1)
    repeated = torch.cat([f, f])
    distances = row_distances(repeated)
    assert torch.equal(distances[:12, :12], distances[12:, 12:])
    constant = torch.cat([f, torch.ones(12, 1).double()], dim=1)
    assert parc(constant, y) == pytest.approx(parc(f, y), abs=1e-12)
    with pytest.raises(InputError, match="do not vary"):
        parc(torch.ones(6, 3), torch.arange(6) % 2)
    with pytest.raises(InputError, match="of one class"):
        parc(f, torch.zeros(12, dtype=torch.int64))


@given(seed=st.integers(0, 200))
def test_spearman_is_that_of_scipy(seed):
    from scipy.stats import rankdata, spearmanr

    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, 4, 20).astype(float), generator.normal(size=20)
    assert average_ranks(torch.from_numpy(x)).tolist() == rankdata(x).tolist()
    assert spearman(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)


def test_further_scores():
    f, y = problem(2)
    assert rsa(f, 2 * f + 1) == pytest.approx(1.0)
    assert rsa(f, torch.randn(12, 3, generator=torch.Generator().manual_seed(0))) < 0.9
    one_hot = F.one_hot(y).double()
    assert h_score(one_hot, y) == pytest.approx(2.0), "three classes explain two dimensions wholly"
    assert 0 < h_score(f, y) < 5
    assert knn_accuracy(one_hot + 0.01 * f[:, :3], y) == 1.0
    assert knn_accuracy(torch.tensor([[0.0], [0.1], [5.0], [5.1]]), torch.tensor([0, 1, 2, 2])) == 0.5
    sure = torch.eye(3).double()[y]
    assert leep(sure, y) == pytest.approx(0.0)
    assert nce(sure, y) == pytest.approx(0.0)
    blind = torch.full((12, 4), 0.25).double()
    assert leep(blind, y) == pytest.approx(-math.log(3))
    assert nce(blind, y) == pytest.approx(-math.log(3))
    q = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]).double()
    labels = torch.tensor([0, 0, 1])
    joint = torch.stack([q[:2].sum(0), q[2]]) / 3  # P(y, z)
    conditional = joint / joint.sum(0)
    wanted = sum(math.log(float(conditional[labels[i]] @ q[i])) for i in range(3)) / 3
    assert leep(q, labels) == pytest.approx(wanted)
    assert set(similarity_scores(f, q.repeat(4, 1), y)) == {"parc", "cka", "h_score", "knn", "leep", "nce"}
    with pytest.raises(InputError, match="n >= 3"):
        parc(f[:2], y[:2])


def test_parc_of_principal_components():
    f, y = problem(3, n=15, width=8)
    centred = f - f.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    # PARC sees the signs, which are free: here as scikit-learn fixes them, the largest entry of an axis positive
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    reduced = parc(f, y, components=3)
    assert reduced == pytest.approx(parc(centred @ axes.T, y), abs=1e-9)
    assert reduced != pytest.approx(parc(f, y), abs=1e-3)
    q = torch.full((15, 2), 0.5)
    scores, plain = similarity_scores(f, q, y, components=3), similarity_scores(f, q, y)
    assert scores == {**plain, "parc": reduced}


# ---------------------------------------------------------------- weights


def test_weights_by_hand():
    scores = {"a": 0.4, "b": 0.1, "c": -0.2, "d": 0.3}
    wanted = {
        1: (0.5, 0.125, 0, 0.375),
        2: (0.6153846, 0.0384615, 0, 0.3461538),
        9: (0.9301560, 0.0000036, 0, 0.0698405),
        0: (0.25, 0.25, 0.25, 0.25),
    }
    for power, weights in wanted.items():
        assert list(source_weights(scores, power).values()) == pytest.approx(weights, abs=1e-7)
    assert source_weights(scores, 500.0)["a"] == pytest.approx(1.0)
    with pytest.warns(UserWarning, match="count alike"):
        assert source_weights({"a": -1.0, "b": 0.0}, 9.0) == {"a": 0.5, "b": 0.5}


@given(scores=st.lists(st.floats(-1, 1), min_size=1, max_size=6), scale=st.floats(0.01, 100))
def test_weights_are_shares_of_scores_in_any_unit(scores, scale):
    named = {str(i): e for i, e in enumerate([*scores, 0.5])}
    weights = source_weights(named, 3.0)
    assert sum(weights.values()) == pytest.approx(1.0)
    scaled = source_weights({name: scale * e for name, e in named.items()}, 3.0)
    assert list(scaled.values()) == pytest.approx(list(weights.values()), abs=1e-9)
    ranked = sorted(named, key=lambda name: named[name])
    assert all(weights[a] <= weights[b] + 1e-12 for a, b in pairwise(ranked))


def test_which_sources_teach():
    scores = {"a": 0.4, "b": 0.1, "c": -0.2}
    assert chosen_sources(scores, DistillNearestConfig()) == {"a": 1.0}
    assert chosen_sources(scores, DistillNearestConfig(select="farthest")) == {"c": 1.0}
    assert chosen_sources(scores, DistillNearestConfig(select=["b"])) == {"b": 1.0}
    assert chosen_sources(scores, DistillNearestConfig(select="weighted", power=9)) == {"a": 1.0}
    assert set(chosen_sources(scores, DistillNearestConfig(select="weighted", power=1))) == {"a", "b"}
    assert chosen_sources(scores, DistillNearestConfig(supervised=1.0)) == {}


# ---------------------------------------------------------------- losses


def student() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=4, in_chans=1, layers=(1, 1, 1, 1), channels=(4, 4, 4, 8))


def source(classes: int, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes))


def pair() -> Pair:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 1, 8, 8, generator=generator)
    index = torch.arange(5)
    return Pair(
        Batch(images[:5], torch.tensor([0, 1, 2, 3, 0]), index), Batch(images[5:], -torch.ones(5).long(), index)
    )


def test_loss_at_the_sources_own_answer_is_its_entropy():
    z = torch.randn(4, 6, dtype=torch.float64)
    logits = (z / 2).clone().requires_grad_()
    loss = source_loss(logits, z, 2.0)
    q = (z / 2).softmax(1)
    assert loss.item() == pytest.approx(float(-(q * q.log()).sum(1).mean()))
    loss.backward()
    assert logits.grad.abs().max() < 1e-12
    target = torch.randn(4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: source_loss(x, target), torch.randn_like(target).requires_grad_())
    with pytest.raises(InputError, match="the source's classes"):
        source_loss(z, z[:, :3])


@pytest.mark.parametrize("supervised", [0.0, 1.0])
def test_each_head_learns_its_own_term(supervised):
    distiller = DistillWeighted(student(), {"a": (1.0, source(3), 3)}, supervised=supervised).train()
    distiller.loss(pair()).total().backward()
    own, other = distiller.student.fc.weight.grad, distiller.heads["a"].weight.grad
    silent, heard = (own, other) if supervised == 0 else (other, own)
    assert silent is None or not silent.any()
    assert heard.abs().sum() > 0


def test_sources_are_frozen_in_eval_mode_and_may_have_other_classes():
    distiller = DistillWeighted(student(), {"a": (0.7, source(3), 3), "b": (0.3, source(7), 7)}).train()
    terms = distiller.loss(pair())
    terms.total().backward()
    for network in distiller.sources.values():
        assert not network.training
        assert all(p.grad is None for p in network.parameters())
        assert not network[1].num_batches_tracked.any()
    weights = {name: weight for name, (weight, _) in terms.items()}
    assert weights == {"labels": 0.8, "a": pytest.approx(0.14), "b": pytest.approx(0.06)}
    wrong = DistillWeighted(student(), {"a": (1.0, source(3), 4)})
    with pytest.raises(InputError, match="the source's classes"):
        wrong.loss(pair())


def test_one_source_of_weight_one_is_distilling_from_it():
    """DistillWeighted with a = 1 against lambda L_sup + (1 - lambda) L_s, written out, in value and gradient."""
    distiller, batch = DistillWeighted(student(), {"a": (1.0, source(3), 3)}, supervised=0.7).double().eval(), pair()
    batch = Pair(*(part._replace(images=part.images.double()) for part in batch))
    network, head = distiller.student, distiller.heads["a"]
    images = torch.cat([batch.labelled.images, batch.unlabelled.images])
    features = network.forward_head(network.forward_features(images), pre_logits=True)
    with torch.no_grad():
        q = distiller.sources["a"](batch.unlabelled.images).softmax(1)
    taught = -(q * head(features[5:]).log_softmax(1)).sum(1).mean()
    expected = 0.7 * F.cross_entropy(network.fc(features[:5]), batch.labelled.labels) + 0.3 * taught
    found = distiller.loss(batch).total()
    torch.testing.assert_close(found, expected)
    parameters = [*network.parameters(), *head.parameters()]
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_labelled_and_unlabelled_images_go_through_in_one_pass():
    distiller = DistillWeighted(student(), {"a": (1.0, source(3), 3)}, distill_on="all").train()
    batch = pair()
    terms = distiller.loss(batch)
    assert int(distiller.student.bn1.num_batches_tracked) == 1
    network, images = distiller.sources["a"], torch.cat([batch.labelled.images, batch.unlabelled.images])
    features = distiller.student.forward_head(distiller.student.forward_features(images), pre_logits=True)
    torch.testing.assert_close(terms["a"][1], source_loss(distiller.heads["a"](features), network(images)))
    some = DistillWeighted(distiller.student, {"a": (1.0, network, 3)}).train()
    some.heads.load_state_dict(distiller.heads.state_dict())
    wanted = source_loss(some.heads["a"](features[5:]), network(images[5:]))
    torch.testing.assert_close(some.loss(batch)["a"][1], wanted)


# ---------------------------------------------------------------- data and runs


def test_parts_of_the_target_are_disjoint_and_sources_get_the_rest():
    _, config = load_config("distill_nearest/small")
    data = load_data(config.data, config.seed)
    parts = split_target(data, config.labelled, config.unlabelled, config.seed)
    assert torch.bincount(parts.labelled.labels).tolist() == [4] * 10
    assert (len(parts.unlabelled), int(parts.unlabelled.labels.max())) == (400, -1)
    assert sum(len(part) for part in parts) == len(data.train)
    pixels = [tuple(part.split.images.flatten(1).float().sum(1).tolist()) for part in parts]
    assert sum(sum(values) for values in pixels) == float(data.train.split.images.float().sum())
    loops = next(s for s in config.sources if s.label == "loops")
    task = source_data(loops, data, parts.rest)
    assert (task.num_classes, len(task.train)) == (2, len(parts.rest))
    assert task.class_names == ["0+6+8+9", "1+2+3+4+5+7"]
    low = source_data(config.sources[0], data, parts.rest)
    assert set(low.train.labels.tolist()) == {0, 1, 2, 3, 4}
    turned = source_data(next(s for s in config.sources if s.label == "turned"), data, parts.rest)
    assert torch.equal(turned.train.split.images, parts.rest.split.images.rot90(1, (2, 3)))
    noise = source_data(next(s for s in config.sources if s.label == "noise"), data, parts.rest)
    assert sorted(noise.train.labels.tolist()) == sorted(parts.rest.labels.tolist())
    assert float((noise.train.labels == parts.rest.labels).double().mean()) < 0.3


def run(folder, *overrides):
    method, config = load_config("distill_nearest/small", [*TINY, *overrides])
    return method, config, train(method, config, folder, quiet=True, cpu=True)


def test_a_run_scores_chooses_and_ships_a_stock_network(tmp_path):
    method, config, metrics = run(tmp_path / "run")
    record = json.loads((tmp_path / "run/scores.json").read_text())
    best = max(record["scores"], key=lambda name: record["scores"][name]["parc"])
    assert record["weights"] == {best: 1.0}
    assert metrics[f"weight/{best}"] == 1.0
    assert metrics["parc/low"] == record["scores"]["low"]["parc"]
    student_ = timm.create_model(f"local-dir:{tmp_path / 'run/student'}", pretrained=True).eval()
    data = load_data(config.data, config.seed)
    with torch.no_grad():
        answers = torch.cat([student_(b.images).argmax(1) for b in data.test.loader(512)])
    assert float((answers == data.test.labels).double().mean()) == pytest.approx(metrics["student/accuracy"])
    assert len(method.predict(config, {"student": tmp_path / "run/student"}, 2)) == 2
    # a saved source, of other classes than the target's, and nothing left over for training one
    saved = f"sources=[{{name: resnet18, label: saved, checkpoint: {tmp_path / 'run/source-low'}}}]"
    _, _, again = run(tmp_path / "again", saved, "unlabelled=null")
    assert again["parc/saved"] == pytest.approx(record["scores"]["low"]["parc"])


def test_rsa_scores_against_a_network_of_the_target(tmp_path):
    budget = "{epochs: 1, batch_size: 20, optimizer: {name: adam, lr: 0.005}}"
    network = f"{{name: resnet18, args: {{layers: [1, 1, 1, 1], channels: [4, 4, 4, 8]}}, train: {budget}}}"
    _, config, metrics = run(tmp_path / "run", "method_args.score=rsa", f"reference={network}")
    record = json.loads((tmp_path / "run/scores.json").read_text())
    best = max(record["scores"], key=lambda name: record["scores"][name]["rsa"])
    assert record["weights"] == {best: 1.0}
    assert metrics[f"rsa/{best}"] == record["scores"][best]["rsa"]
    # the same numbers from the saved networks
    parts = split_target(load_data(config.data, config.seed), config.labelled, config.unlabelled, config.seed)
    images = next(iter(plain(parts.labelled, load_data(config.data, config.seed)).loader(512))).images
    reference, source = (load_model(tmp_path / "run" / name).eval() for name in ("reference", f"source-{best}"))
    with torch.no_grad():
        expected = rsa(*(penultimate(net, images)[0] for net in (source, reference)))
    assert record["scores"][best]["rsa"] == pytest.approx(expected, abs=1e-6)
    # one's own features are the most alike
    own = f"sources=[{{name: resnet18, label: own, checkpoint: {tmp_path / 'run/reference'}}}]"
    _, _, again = run(tmp_path / "again", "method_args.score=rsa", f"reference={network}", own)
    assert again["rsa/own"] == pytest.approx(1.0)


@pytest.mark.slow
def test_the_best_suited_source_is_found_and_noise_is_not(tmp_path):
    """Sources of digit tasks score above one with meaningless labels."""
    _, config = load_config("distill_nearest/small", ["method_args.select=weighted"])
    keep = [s for s in config.sources if s.label in ("low_digits", "parity", "noise")]
    config = config.model_copy(update={"sources": keep, "train": config.train.model_copy(update={"epochs": 1})})
    from kdcore.method import get

    metrics = train(get("distill_nearest"), config, tmp_path / "run", quiet=True, cpu=True)
    assert metrics["parc/noise"] < min(metrics["parc/low_digits"], metrics["parc/parity"])
    assert metrics["weight/noise"] < 0.05


@pytest.mark.slow
def test_the_student_loads_where_kd_cannot_be_imported(tmp_path):
    run(tmp_path / "run", "method_args.supervised=1.0")
    opened = stock_classifier(tmp_path / "run/student", (1, 16, 16))
    assert opened == ([2, 10], "ResNet", ["Linear"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_args.select=[other]", "method_args.select"),
        ("method_args.score=rsa", r"method_args\.score = 'rsa': needs `reference`"),
        (f"sources=[{NET}, label: a, classes: [[0], [0]]}}]", "disjoint groups"),
        (f"sources=[{NET}, label: a}}, {NET}, label: a}}]", "not all different"),
        (f"sources=[{NET}, label: a, cache: answers}}]", r"sources\.a\.cache: not for this method"),
        ("reference={name: resnet18, train: {epochs: 1}, cache: answers}", r"reference\.cache: not for this method"),
        ("unlabelled=null", "left over"),
        ("unlabelled=100000", "left without a label"),
        ("labelled=500", "class '0' has"),
        ("data.augment.mixup=0.5", "mixup"),
        ("sources=[]", "sources"),
    ],
)
def test_bad_input_is_named_before_anything_trains(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_the_environment(monkeypatch):
    _, config = load_config("distill_nearest/small", [*TINY])
    entry = config.sources[0].model_copy(update={"train": None, "checkpoint": "$KD_NO_SUCH_FOLDER/x"})
    monkeypatch.delenv("KD_NO_SUCH_FOLDER", raising=False)
    data = load_data(config.data)
    with pytest.raises(InputError, match="environment variable is not set"):
        Sources(config, data, split_target(data, config.labelled, config.unlabelled, config.seed)).create(entry)


def test_configs_say_what_they_are():
    for name in ("small", "paper"):
        values = read_yaml(find_config(f"distill_nearest/{name}"))
        assert {"ce", "equal"} <= set(values["compare"])
        for overrides in ({}, *values["compare"].values()):
            arm_config(values, overrides)
    _, paper = load_config("distill_nearest/paper")
    assert len(paper.sources) == 14
    assert all(timm.is_model(s.name) for s in paper.sources)
    assert Path(find_config("distill_nearest/paper")).read_text().count("not confirmed") > 10
