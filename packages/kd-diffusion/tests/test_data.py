"""Sources, the split, attributes measured on images, prompts that say them, and batches."""

import gzip
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kd_diffusion.attributes import (
    NUMBER_WORDS,
    TILTS,
    WEIGHTS,
    AttributeRule,
    attributes,
    digit_prompts,
    measure,
    sentence,
)
from kd_diffusion.data import DataConfig, Samples, load_data, loader
from kd_diffusion.worlds.mixture import MixtureConfig
from kdcore.config import parse
from kdcore.data import set_epoch
from kdcore.errors import InputError


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig(), 0)


def stroke(slope, width=1.0, size=16):
    """An image (1, 1, size, size) in [-1, 1] of one stroke that moves `slope` pixels to the right per pixel upwards."""
    y = torch.arange(size, dtype=torch.float64)[:, None]
    x = torch.arange(size, dtype=torch.float64)[None]
    middle = (size - 1) / 2
    distance = (x - middle) + slope * (y - middle)
    return ((1 - (distance.abs() - width / 2)).clamp(0, 1) * 2 - 1).float()[None, None]


# ---------------------------------------------------------------- sources


def test_digits_are_scaled_and_split_by_class(digits):
    train, held_out = digits.train, digits.held_out
    assert train.pixels.shape[1:] == (1, 8, 8)
    assert train.pixels.dtype == torch.float32
    assert len(train) + len(held_out) == 1797
    assert float(train.pixels.min()) == -1
    assert float(train.pixels.max()) == 1
    share = torch.bincount(held_out.labels) / (torch.bincount(held_out.labels) + torch.bincount(train.labels))
    assert bool(((share - 0.2).abs() < 0.01).all())
    assert (digits.class_names, digits.channels, digits.image_size) == ([str(i) for i in range(10)], 1, 8)


def test_the_split_and_the_prompts_follow_from_the_seed(digits):
    again, other = load_data(DataConfig(), 0), load_data(DataConfig(), 1)
    assert torch.equal(again.train.pixels, digits.train.pixels)
    assert again.train.prompts == digits.train.prompts
    assert not torch.equal(other.held_out.pixels, digits.held_out.pixels)


def test_no_image_is_on_both_sides(digits):
    rows = {tuple(image.flatten().tolist()) for image in load_data(DataConfig(), 0).train.pixels}
    both = sum(tuple(image.flatten().tolist()) in rows for image in digits.held_out.pixels)
    whole = torch.cat([digits.train.pixels, digits.held_out.pixels]).flatten(1)
    assert both <= len(whole) - len(whole.unique(dim=0))  # scikit-learn's set itself repeats images, or not


def test_digits_at_twice_the_size_keep_their_ink(digits):
    large = load_data(DataConfig(image_size=16), 0)
    assert large.train.pixels.shape[1:] == (1, 16, 16)
    ratio = measure(large.train.pixels)[0] / measure(digits.train.pixels)[0]
    assert float((ratio - 1).abs().mean()) < 0.05


def write_idx(folder, prefix, images, labels, packed):
    for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
        name = f"{prefix}-{kind}"
        (folder / f"{name}.gz").write_bytes(gzip.compress(content)) if packed else (folder / name).write_bytes(content)


def test_mnist_reads_every_pair_of_idx_files(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28))
    labels = np.arange(60) % 10
    write_idx(tmp_path, "train", images[:40], labels[:40], packed=False)
    write_idx(tmp_path, "t10k", images[40:], labels[40:], packed=True)
    data = load_data(DataConfig(name="mnist", root=str(tmp_path), image_size=28, held_out=0), 0)
    assert len(data.train) == 60
    assert len(data.held_out) == 0
    assert torch.allclose(data.train.pixels[:, 0], torch.from_numpy(images).float() / 127.5 - 1, atol=1e-6)
    assert torch.equal(data.train.labels, torch.from_numpy(labels))
    assert load_data(DataConfig(name="mnist", root=str(tmp_path)), 0).train.pixels.shape[1:] == (1, 14, 14)


def test_real_mnist():
    if not os.environ.get("KD_DATA"):
        pytest.skip("KD_DATA is not set: the real MNIST files are not here")
    data = load_data(DataConfig(name="mnist"), 0)
    assert len(data.train) + len(data.held_out) == 10_000
    assert data.train.pixels.shape[1:] == (1, 14, 14)
    assert -1 <= float(data.train.pixels.min()) < float(data.train.pixels.max()) <= 1


def image_folder(root, names=("cat", "red_fox"), count=4):
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((12, 20, 3), 40 * label + index, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def test_an_image_folder_is_read_when_it_is_asked_for(tmp_path):
    root = image_folder(tmp_path / "images")
    data = load_data(DataConfig(name="imagefolder", root=str(root), image_size=8, held_out=0.25), 0)
    assert data.class_names == ["cat", "red_fox"]
    assert set(data.train.prompts) == {"a photo of a cat", "a photo of a red fox"}
    assert len(data.held_out) == 2
    batch = next(iter(loader(Samples(data.train), 3, 0)))
    assert batch["pixels"].shape == (3, 3, 8, 8)
    values = (batch["pixels"][:, 0, 0, 0] + 1) * 127.5
    assert torch.equal((values.round() / 40).long(), batch["class_labels"])
    data.train.paths[0].write_bytes(b"no image")
    with pytest.raises(InputError, match=rf"image .*{data.train.paths[0].name}: cannot be read"):
        data.train.read([0])


def test_prompts_alone_have_no_images(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a bold zero\n\n  naïve façade \n", encoding="utf-8")
    data = load_data(DataConfig(name="prompts", root=str(file), held_out=0), 0)
    assert data.train.prompts == ["a bold zero", "naïve façade"]
    assert not data.train.has_images
    with pytest.raises(InputError, match="prompts alone"):
        data.train.read([0])


def test_points_of_a_mixture_know_their_mode():
    data = load_data(DataConfig(name="mixture", size=500, mixture=MixtureConfig(layout="ring", modes=4)), 3)
    assert data.train.pixels.shape[1:] == (2, 1, 1)
    assert torch.equal(data.mixture.assign(data.train.pixels.flatten(1)), data.train.labels)
    assert data.num_classes == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "digit"}, r"'name' = 'digit': allowed: .*digits"),
        ({"name": "digits", "image_size": 12}, "image_size 12; allowed for digits: 8, 16, 32"),
        ({"name": "mnist", "image_size": 64}, "image_size 64; allowed for mnist: 4 to 28"),
        ({"name": "imagefolder", "image_size": 32}, "needs root for name: imagefolder"),
        ({"name": "imagefolder", "root": "x"}, "needs image_size"),
        ({"name": "prompts", "root": "x", "image_size": 8}, "name: prompts has no images"),
        ({"held_out": 1.0}, "'held_out' = 1.0"),
        ({"imagesize": 8}, "did you mean 'image_size'"),
        ({"name": "mixture", "mixture": {"side": 2, "weights": [1, 2]}}, "4 positive numbers"),
    ],
)
def test_bad_configs_are_refused_by_name(values, message):
    with pytest.raises(InputError, match=message):
        parse(DataConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "mnist", "root": "{}/none"}, "data.root = .*none: no such folder"),
        ({"name": "mnist", "root": "{}"}, "no pair .*-images-idx3-ubyte"),
        ({"name": "mnist", "root": "$KD_NOT_SET/mnist"}, "environment variable is not set"),
        ({"name": "imagefolder", "root": "{}/none", "image_size": 8}, "data.root = .*none: no such folder"),
        ({"name": "imagefolder", "root": "{}", "image_size": 8}, "not a folder of class folders"),
        ({"name": "prompts", "root": "{}/none.txt"}, "not a readable UTF-8 text file"),
        ({"name": "prompts", "root": "{}/empty.txt"}, "no prompt in it"),
        ({"name": "prompts", "root": "{}/latin.txt"}, "not a readable UTF-8 text file"),
    ],
)
def test_missing_and_empty_files_are_named(values, message, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"fa\xe7ade")
    with pytest.raises(InputError, match=message):
        load_data(DataConfig(**{**values, "root": values["root"].format(tmp_path)}), 0)


def test_a_cut_idx_file_is_named(tmp_path):
    write_idx(tmp_path, "t10k", np.zeros((4, 28, 28)), np.zeros(4), packed=False)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte: not an IDX file"):
        load_data(DataConfig(name="mnist", root=str(tmp_path)), 0)


# ---------------------------------------------------------------- attributes and prompts


@given(st.floats(-0.8, 0.8))
def test_slant_is_the_slope_of_a_stroke(slope):
    found = float(measure(stroke(slope, size=32))[1])
    assert abs(found - slope) < 0.1  # the stroke is cut off by the border
    assert float(measure(stroke(slope, size=32).flip(-1))[1]) == pytest.approx(-found, abs=1e-9)


def test_ink_grows_with_the_stroke_and_blank_images_have_none():
    inks = [float(measure(stroke(0.2, width))[0]) for width in (1, 2, 3)]
    assert inks == sorted(inks)
    ink, slant = measure(torch.full((2, 3, 8, 8), -1.0))
    assert ink.tolist() == slant.tolist() == [0, 0]


def test_words_are_thirds_of_the_class():
    slopes, widths = torch.linspace(-0.5, 0.5, 9).tolist(), [1.0, 2.0, 3.0]
    pixels = torch.cat([stroke(slope, width) for slope in slopes for width in widths])
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    found = attributes(pixels, labels, AttributeRule.fit(pixels, labels, 1))
    tilt = found.tilt.view(9, 3)
    assert [TILTS[i] for i in tilt[:, 0]] == ["left"] * 3 + ["upright"] * 3 + ["right"] * 3
    assert torch.bincount(found.weight).tolist() == [9, 9, 9]
    assert [WEIGHTS[i] for i in found.weight.view(9, 3)[4]] == ["thin", "medium", "bold"]


def test_words_of_the_digits_are_balanced_in_every_class(digits):
    found = attributes(digits.train.pixels, digits.train.labels, digits.rule)
    for label in range(10):
        for values in (found.weight, found.tilt):
            counts = torch.bincount(values[digits.train.labels == label], minlength=3)
            assert int(counts.max() - counts.min()) <= 0.12 * int(counts.sum())  # equal inks fall on one side


def test_prompts_say_what_is_measured(digits):
    for part in (digits.train, digits.held_out):
        found = attributes(part.pixels, part.labels, digits.rule)
        for row, prompt in enumerate(part.prompts):
            words = set(prompt.replace(",", "").split())
            named = words & set(NUMBER_WORDS)
            assert named <= {NUMBER_WORDS[part.labels[row]]}
            assert words & {"thin", "bold"} <= {WEIGHTS[found.weight[row]]}
            assert words & set(TILTS) <= {TILTS[found.tilt[row]]}
            assert named or words & set(TILTS)
    texts = digits.train.prompts
    without_digit = sum(not set(text.replace(",", "").split()) & set(NUMBER_WORDS) for text in texts)
    assert 0.1 < without_digit / len(texts) < 0.2
    assert len(set(texts)) > 100


def test_sentences_are_english():
    assert sentence("eight", None, "upright", 2) == "an upright eight"
    assert sentence("eight", None, None, 0) == "an eight"
    assert sentence("one", None, "left", 0) == "a one, tilted left"
    assert sentence(None, "bold", "right", 3) == "a bold digit, tilted right"
    every = {
        sentence(digit, weight, tilt, form)
        for digit in (None, *NUMBER_WORDS)
        for weight in (None, "thin", "bold")
        for tilt in (None, *TILTS)
        for form in range(4)
    }
    assert all(text == text.strip() and "  " not in text and ",," not in text for text in every)


def test_prompts_follow_from_the_generator(digits):
    found = attributes(digits.train.pixels, digits.train.labels, digits.rule)
    first, second, third = (
        digit_prompts(found, digits.train.labels, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert first == second != third


def test_attributes_refuse_what_does_not_fit(digits):
    pixels, labels = digits.train.pixels[:4], digits.train.labels[:4]
    with pytest.raises(InputError, match=r"labels: shape \(3,\) for 4 images"):
        attributes(pixels, labels[:3], digits.rule)
    with pytest.raises(InputError, match="allowed: 0 to 9"):
        attributes(pixels, labels + 10, digits.rule)
    with pytest.raises(InputError, match=r"pixels: shape \(8, 8\)"):
        measure(torch.zeros(8, 8))
    with pytest.raises(InputError, match="class 1 has no image"):
        AttributeRule.fit(pixels, torch.zeros(4, dtype=torch.int64), 2)


# ---------------------------------------------------------------- batches


def test_batches_are_of_one_size_and_in_an_order_of_the_seed(digits):
    batches = loader(Samples(digits.train), 100, seed=5)
    first = [batch["class_labels"] for batch in batches]
    assert len(first) == len(digits.train) // 100
    assert all(len(labels) == 100 for labels in first)
    assert torch.equal(first[0], next(iter(loader(Samples(digits.train), 100, seed=5)))["class_labels"])
    set_epoch(batches, 1)
    assert not torch.equal(first[0], next(iter(batches))["class_labels"])
    assert not torch.equal(first[0], next(iter(loader(Samples(digits.train), 100, seed=6)))["class_labels"])


def test_every_column_of_a_batch_is_of_the_same_samples(digits):
    count = len(digits.train)
    tokens = {"input_ids": torch.arange(count)[:, None].expand(-1, 3)}
    samples = Samples(digits.train, x=digits.train.pixels * 2, tokens=tokens)
    batch = next(iter(loader(samples, 64, seed=1)))
    places = batch["input_ids"][:, 0]
    assert set(batch) == {"x", "input_ids", "class_labels"}
    assert torch.equal(batch["x"], digits.train.pixels[places] * 2)
    assert torch.equal(batch["class_labels"], digits.train.labels[places])


def test_an_item_is_a_sample_without_the_batch(digits):
    samples = Samples(digits.train)
    item = samples[3]
    assert item["pixels"].shape == (1, 8, 8)
    assert torch.equal(item["pixels"], digits.train.pixels[3])
    stacked = torch.utils.data.default_collate([samples[i] for i in range(2)])
    assert torch.equal(stacked["pixels"], digits.train.pixels[:2])
    in_order = loader(samples, 1000, shuffle=False)
    assert sum(len(batch["pixels"]) for batch in in_order) == len(samples)


def test_columns_must_fit(digits):
    with pytest.raises(InputError, match="input_ids: 2 rows for"):
        Samples(digits.train, tokens={"input_ids": torch.zeros(2, 4, dtype=torch.int64)})
