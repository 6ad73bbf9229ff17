"""Augmentation by torchvision: RandAugment with a fixed magnitude, erasing by area, what cannot be combined."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from kd_classification.data import AugmentConfig, DataConfig, load_data
from kd_classification.transforms import RandomOperations, training_transform
from kdcore.errors import InputError

ALL = ["brightness", "contrast", "saturation", "sharpness", "rotate", "translate"]


def picture(values) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype=np.uint8))


def test_operations_at_a_known_magnitude():
    ramp = np.arange(64).reshape(8, 8)
    half = RandomOperations(AugmentConfig(operations=ALL, magnitude=15, operation_angle=180))
    flat = picture(np.full((8, 8), 100))
    assert np.all(np.asarray(half.apply("brightness", flat, 1)) == 150)
    assert np.all(np.asarray(half.apply("brightness", flat, -1)) == 50)
    assert np.array_equal(half.apply("rotate", picture(ramp), 1), np.rot90(ramp))
    quarter = RandomOperations(AugmentConfig(operations=ALL, magnitude=25))
    moved = np.asarray(quarter.apply("translate", picture(ramp), 1))
    assert np.array_equal(moved[2:, 2:], ramp[:-2, :-2])
    assert not moved[:2].any()
    nothing = RandomOperations(AugmentConfig(operations=ALL, magnitude=0))
    for name in ALL:
        assert np.array_equal(nothing.apply(name, picture(ramp), 1), ramp), name


def test_operations_are_drawn_without_repetition(monkeypatch):
    operations = RandomOperations(AugmentConfig(operations=ALL, operations_drawn=3))
    drawn: list[str] = []
    monkeypatch.setattr(operations, "apply", lambda name, image, sign: drawn.append(name) or image)
    for _ in range(200):
        operations(None)
    assert all(len(set(drawn[i : i + 3])) == 3 for i in range(0, 600, 3))
    assert set(drawn) == set(ALL)


def test_erasing_takes_the_given_area():
    augment = AugmentConfig(erasing=1.0, erasing_area=(0.25, 0.25))
    transform = training_transform(augment, 40, 1, [0.0], [1.0])
    assert transform is not None
    torch.manual_seed(0)
    shares = [float((transform(picture(np.full((40, 40), 255))) == 0).float().mean()) for _ in range(20)]
    assert shares == pytest.approx([0.25] * 20, abs=0.03)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"auto_augment": "rand-m9-n2", "rotation": 10}, "augment.auto_augment: a policy of timm"),
        ({"operations": ["rotate"]}, "augment.operations_drawn = 2: cannot draw 2 different ones of 1"),
    ],
)
def test_combinations_that_cannot_be(augment, message):
    with pytest.raises(InputError, match=message):
        load_data(DataConfig(name="textures", augment=augment))


def test_augmentation_is_a_function_of_seed_and_epoch():
    augment = {"operations": ALL, "rotation": 10, "shear": 5, "zoom": [0.9, 1.1], "blur": 0.5, "posterize": 0.5}
    data = load_data(DataConfig(name="textures", per_class=8, augment=augment))
    first, second = ([b.images for b in data.train.loader(8, seed=3, train=True)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = next(iter(data.train.loader(8, seed=4, train=True))).images
    assert not torch.equal(first[0], other)


def test_images_of_a_group_stay_together():
    data = load_data(DataConfig(name="textures", validation=0.2))
    groups = [set(images.split.groups) for images in (data.train, data.validation, data.test)]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 192


@pytest.mark.parametrize("extra", [{}, {"rotation": 1e-3}], ids=["timm", "torchvision"])
def test_resized_crops_are_filled_as_asked(extra):
    image = np.random.default_rng(0).integers(0, 256, (16, 16)).astype("uint8")
    found = []
    for interpolation in ("bilinear", "bicubic"):
        augment = AugmentConfig(crop="resized", scale=(0.5, 0.5), interpolation=interpolation, **extra)
        transform = training_transform(augment, 16, 1, [0.0], [1.0])
        random.seed(0), torch.manual_seed(0)
        found.append(transform(Image.fromarray(image)))
    assert (found[0] - found[1]).abs().max() > 0.05
