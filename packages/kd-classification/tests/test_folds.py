"""Patient-disjoint folds, and the sources that know patients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_classification.data import Data, DataConfig, Images
from kd_classification.engine.folds import FoldPlan, ProtocolConfig, make_plan, shared_groups, units_of
from kd_classification.grouped import textures
from kd_classification.methods.kd_oct import class_weights
from kd_classification.sources import Source, Split
from kdcore.errors import InputError

# ---------------------------------------------------------------- folds


def grouped_source(sizes: list[tuple[int, int]]) -> Source:
    """One patient for each (images, label)."""
    labels = np.repeat([label for _, label in sizes], [count for count, _ in sizes])
    groups = np.repeat([f"p{i:03d}" for i in range(len(sizes))], [count for count, _ in sizes])
    images = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    split = Split(labels.astype(np.int64), images, channels=1, groups=groups)
    return Source(split, None, ["a", "b"], 4, 1, [0.5], [0.5])


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=24, max_size=40), st.integers(2, 4), st.integers(0, 99))
def test_folds_are_disjoint_and_cover_every_patient(counts, folds, seed):
    source = grouped_source([(count, index % 2) for index, count in enumerate(counts)])
    protocol = ProtocolConfig(folds=folds, seed=seed)
    plan = make_plan(source, protocol)
    assert plan == make_plan(source, protocol)
    everyone = set(source.train.groups)
    tested = []
    for fold in range(folds):
        train, test, validation = plan.apply(source, fold)
        patients = [set(split.groups) for split in (train, validation, test)]
        assert shared_groups(train, validation, test) == 0
        assert set().union(*patients) == everyone
        assert sum(map(len, patients)) == len(everyone)
        assert len(train.labels) + len(validation.labels) + len(test.labels) == len(source.train.labels)
        tested += sorted(patients[2])
    assert sorted(tested) == sorted(everyone)


def test_folds_are_stratified_and_do_not_depend_on_the_order_of_the_rows():
    source = grouped_source([(3, 0)] * 30 + [(3, 1)] * 10)
    plan = make_plan(source, ProtocolConfig())
    for fold in range(5):
        train, test, validation = plan.apply(source, fold)
        for split, ones in ((test, 2), (train, 6), (validation, 2)):
            assert len({g for g, y in zip(split.groups, split.labels, strict=True) if y == 1}) == pytest.approx(
                ones, abs=1
            )
    order = torch.randperm(len(source.train.labels), generator=torch.Generator().manual_seed(0))
    shuffled = Source(source.train.subset(order), None, source.class_names, 4, 1, [0.5], [0.5])
    assert make_plan(shuffled, ProtocolConfig()) == plan


def test_a_split_by_images_tears_patients_apart(tmp_path):
    source = textures(DataConfig(name="textures"))
    for kind, torn in (("patients", False), ("images", True)):
        plan = make_plan(source, ProtocolConfig(split=kind, folds=2))
        train, test, validation = plan.apply(source, 0)
        assert (shared_groups(train, validation, test) > 0) is torn
        assert shared_groups(train, validation, test) <= len(set(source.train.groups))
        plan.write(tmp_path / "folds.json")
        assert FoldPlan.read(tmp_path / "folds.json") == plan


def test_a_split_by_images_lets_identity_pass_for_skill():
    """Labels drawn at random for each patient: all there is to learn is who it is."""
    generator = np.random.default_rng(0)
    patients, count, side = 80, 5, 8
    looks = generator.uniform(50, 200, (patients, 1, 1, side, side))
    images = np.clip(looks + generator.normal(0, 20, (patients, count, 1, side, side)), 0, 255).astype(np.uint8)
    labels = np.repeat(generator.permutation(patients) % 2, count).astype(np.int64)
    groups = np.repeat([f"p{i:02d}" for i in range(patients)], count)
    pixels = torch.from_numpy(images.reshape(-1, 1, side, side))
    source = Source(Split(labels, pixels, channels=1, groups=groups), None, ["a", "b"], side, 1, [0.5], [0.5])
    accuracy = {}
    for kind in ("patients", "images"):
        plan, right = make_plan(source, ProtocolConfig(split=kind)), 0
        for fold in range(5):
            train, test, _ = plan.apply(source, fold)
            assert train.images is not None
            assert test.images is not None
            nearest = torch.cdist(test.images.flatten(1).float(), train.images.flatten(1).float()).argmin(1)
            right += int((train.labels[nearest.numpy()] == test.labels).sum())
        accuracy[kind] = right / len(labels)
    three_sigma = 3 * 0.5 / patients**0.5  # a patient's images stand or fall together
    assert abs(accuracy["patients"] - 0.5) < three_sigma, accuracy
    assert accuracy["images"] > 0.5 + three_sigma, accuracy


def test_a_test_part_of_the_source_stays_the_test_part():
    source = grouped_source([(2, 0), (2, 1)] * 10)
    held = grouped_source([(2, 0), (2, 1)]).train
    source = Source(source.train, held, source.class_names, 4, 1, [0.5], [0.5])
    train, test, validation = make_plan(source, ProtocolConfig()).apply(source, 3)
    assert test is held
    assert len(set(train.groups)) == 16
    assert len(set(validation.groups)) == 4


def test_fold_errors(tmp_path):
    source = grouped_source([(2, 0)] * 10 + [(2, 1)] * 3)
    with pytest.raises(InputError, match=r"protocol.folds = 5: class 'b' has only 3 patients"):
        make_plan(source, ProtocolConfig())
    with pytest.raises(InputError, match=r"this source knows no patients; use data.name = 'csv'"):
        units_of(Split(source.train.labels, source.train.images), "patients")
    plan = make_plan(source, ProtocolConfig(folds=3))
    with pytest.raises(InputError, match="'p013' is in no part"):
        plan.apply(grouped_source([(2, 0)] * 10 + [(2, 1)] * 4), 0)
    (tmp_path / "folds.json").write_text("{")
    with pytest.raises(InputError, match=r"folds .*folds.json: not a readable plan"):
        FoldPlan.read(tmp_path / "folds.json")


def test_class_without_training_images():
    split = grouped_source([(2, 0)] * 4).train
    images = Images(split, torch.from_numpy(split.labels), None, (torch.zeros(1), torch.ones(1)))
    data = Data(images, images, images, ["a", "b"], DataConfig(), 4, 1, [0.5], [0.5])
    with pytest.raises(InputError, match="class 'b' has no training image in this fold"):
        class_weights(data)
