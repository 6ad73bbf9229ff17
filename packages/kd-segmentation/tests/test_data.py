"""Split files, texture mosaics, pictures and metrics."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_segmentation import metrics, pictures, shifts, splits, textures
from kdcore.errors import InputError


@given(st.integers(2, 60), st.fractions(Fraction(1, 60), Fraction(59, 60)), st.integers(0, 5))
def test_a_split_is_a_partition(count, share, seed):
    names = [f"n{i}" for i in range(count)]
    labelled, unlabelled = splits.split(names, share, seed)
    assert sorted(labelled + unlabelled) == sorted(names)
    assert labelled
    assert unlabelled
    splits.check_disjoint(labelled, unlabelled)
    assert splits.split(names, share, seed) == (labelled, unlabelled)


def test_split_files(tmp_path, capsys):
    for index in range(8):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{index}.png").touch()
    arguments = [str(tmp_path / "images"), "--share", "1/4", "--output", str(tmp_path / "out")]
    assert splits.main(arguments) == 0
    found = [(tmp_path / "out" / f"{name}.txt").read_text().split() for name in ("labelled", "unlabelled")]
    assert [len(lines) for lines in found] == [2, 6]
    assert sorted(found[0] + found[1]) == [str(index) for index in range(8)]
    assert splits.main([str(tmp_path / "absent"), *arguments[1:]]) == 2
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(InputError, match="between 0 and 1"):
        splits.split(["a", "b"], 2.0)
    with pytest.raises(InputError, match=r"overlaps the labelled split: a\.png and 1 more"):
        splits.check_disjoint(["a.png", "b.png"], ["b.png", "c.png", "a.png"])


@pytest.mark.parametrize("kind", shifts.CORRUPTIONS)
def test_a_shift_depends_on_the_picture_and_the_generator_alone(kind):
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    before = image.copy()
    first, again, other = (shifts.corrupt(image, kind, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == np.uint8
    assert first.shape == image.shape
    assert (image == before).all()
    assert (first == again).all()
    assert (first != other).any()
    assert (first != image).mean() > 0.5


def test_fog_hides_what_is_far_and_dusk_darkens():
    image = np.random.default_rng(0).integers(0, 256, (40, 16, 3), dtype=np.uint8)
    fog, dusk = (shifts.corrupt(image, kind, np.random.default_rng(0)).astype(float) for kind in ("fog", "dusk"))
    assert fog[:10].std() < fog[-10:].std() < image.std()
    assert fog[:10].mean() > fog[-10:].mean() > image.mean()
    assert dusk.mean() < 0.7 * image.mean()


def test_a_fixed_shift_is_a_function_of_the_images_name():
    from kd_segmentation.integrations.datasets import RandomShift

    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)

    def shown(shift, path="a/x.png"):
        return shift.transform({"img": image.copy(), "img_path": path})["img"]

    fixed, free = RandomShift(1.0, ["colour"], fixed=True), RandomShift(1.0, ["noise"])
    assert (shown(fixed) == shown(fixed, "b/x.png")).all()
    assert (shown(fixed) != shown(fixed, "b/y.png")).any()
    assert (shown(free) != shown(free)).any()
    assert (shown(RandomShift(0.0)) == image).all()
    for wrong in ({"prob": 2.0}, {"kinds": ["snow"]}, {"kinds": []}):
        with pytest.raises(InputError, match=r"RandomShift.*illumination, blur, noise, colour, fog, dusk"):
            RandomShift(**wrong)


def test_mosaics_are_exact_and_shifts_keep_their_masks(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(textures, "SIZES", {"train": 3, "val": 2, "broad": 6})
    root = textures.write(tmp_path / "a", size=32)
    for split in textures.splits():
        images = sorted((root / "img_dir" / split).iterdir())
        masks = sorted((root / "ann_dir" / split).iterdir())
        assert [path.name for path in images] == [path.name for path in masks]
        assert len(images) == {"train": 3, "broad": 6}.get(split, 2)
    read = lambda *parts: np.asarray(Image.open(root.joinpath(*parts)))  # noqa: E731
    for shift in textures.SHIFTS:
        assert (read("ann_dir", f"val_{shift}", "0000.png") == read("ann_dir", "val", "0000.png")).all()
        assert (read("img_dir", f"val_{shift}", "0000.png") != read("img_dir", "val", "0000.png")).any()
    broad = np.stack([read("ann_dir", "broad", f"{index:04d}.png") for index in range(6)])
    assert set(np.unique(broad)) <= {*range(len(textures.CLASSES)), 255}
    assert 0.1 < (broad == 255).mean() < 0.9  # other photographs are no class
    again = textures.write(tmp_path / "b", size=32)
    assert (
        np.asarray(Image.open(again / "img_dir" / "train" / "0001.png")) == read("img_dir", "train", "0001.png")
    ).all()
    before = (root / "img_dir" / "train" / "0000.png").stat().st_mtime_ns
    textures.write(root, size=32)
    assert (root / "img_dir" / "train" / "0000.png").stat().st_mtime_ns == before


def test_a_broad_split_of_another_size_begins_with_the_same_pictures(tmp_path, monkeypatch):
    from kd_segmentation.integrations.datasets import TextureMosaicDataset

    monkeypatch.setattr(textures, "SIZES", {"train": 1, "val": 1, "broad": 2})
    monkeypatch.setenv("KD_CACHE", str(tmp_path))
    few, more = (TextureMosaicDataset(split="broad", size=32, broad=number, pipeline=[]) for number in (None, 3))
    assert (len(few), len(more)) == (2, 3)
    for index in range(2):
        first, second = (Path(dataset.get_data_info(index)["img_path"]).read_bytes() for dataset in (few, more))
        assert first == second
    with pytest.raises(InputError, match="broad = 0: expected a number of images above 0"):
        TextureMosaicDataset(split="broad", broad=0)


def test_a_texture_lies_where_its_mask_says():
    flat = [np.full((40, 40, 3), (index + 1) / 10, np.float32) for index in range(len(textures.CLASSES))]
    image, mask = textures.mosaic(np.random.default_rng(3), flat, 24)
    for index in np.unique(mask):
        values = image[mask == index].astype(float) / 255
        level = (index + 1) / 10  # times a gain of at most 1.2 and a tint of at most 1.08
        assert (values >= level * 0.8 * 0.92 - 0.01).all()
        assert (values <= level * 1.2 * 1.08 + 0.01).all()


def test_pictures():
    labels = np.array([[0, 1], [255, 1]])
    palette = [(10, 20, 30), (200, 0, 0)]
    assert pictures.colours(labels, palette).tolist() == [
        [[10, 20, 30], [200, 0, 0]],
        [[255, 255, 255], [200, 0, 0]],
    ]
    image = np.full((2, 2, 3), 100, np.uint8)
    assert pictures.overlay(image, labels, palette, 1.0)[1, 0].tolist() == [100, 100, 100]
    columns = pictures.row(image, labels, {"student": np.array([[0, 0], [0, 1]])}, palette)
    errors = columns["student's errors"]
    assert [errors[0, 1].tolist() == [220, 30, 30], errors[1, 0].tolist() == [220, 30, 30]] == [True, False]
    assert pictures.strip(columns).shape == (2, 4 * 2 + 3 * 2, 3)
    with pytest.raises(ValueError, match="labels: 7 has no colour, the palette has 2"):
        pictures.colours(np.array([[7]]), palette)


def test_metrics_of_a_confusion_matrix():
    truth = torch.tensor([[0, 0, 1, 255]])
    predicted = torch.tensor([[0, 1, 1, 2]])
    counts = metrics.confusion(predicted, truth, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    found = metrics.summary(counts, ["a", "b", "c"])
    assert found["mIoU"] == pytest.approx(0.5)  # class c occurs on neither side
    assert found["pixel_accuracy"] == pytest.approx(2 / 3)
    assert found["class_accuracy"] == pytest.approx(0.75)
    assert set(found) == {"mIoU", "pixel_accuracy", "class_accuracy", "iou/a", "iou/b"}
