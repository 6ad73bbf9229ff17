"""Sources, splits and preprocessing of kd_classification.data."""

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_classification.data import DataConfig, load_data
from kd_classification.transforms import make_mixup
from kdcore.errors import InputError


def write_idx(path, array, *, zipped=False):
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if zipped else content)


def images(count=12, size=10, channels=None, seed=0):
    shape = (count, size, size) if channels is None else (count, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def idx_folder(tmp_path):
    for prefix, count in (("train", 12), ("t10k", 6)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", images(count))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 3, zipped=True)
    return tmp_path


@pytest.fixture
def image_root(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i, pixels in enumerate(images(count, 20, 3, seed=len(part) + len(name))):
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def config(**values):
    return DataConfig.model_validate(values)


def test_digits_are_whole_and_normalised():
    data = load_data(config(name="digits"))
    assert (len(data.train), len(data.test), data.num_classes) == (899, 898, 10)
    pixels = torch.cat([b.images for b in data.train.loader(256)])
    assert pixels.shape == (899, 1, 8, 8)
    assert abs(float(pixels.mean())) < 0.02
    assert abs(float(pixels.std()) - 1) < 0.02


def test_split_is_stratified_disjoint_and_the_same_for_every_seed():
    first, second = load_data(config(name="digits"), seed=0), load_data(config(name="digits"), seed=5)
    assert torch.equal(first.test.labels, second.test.labels)
    rows = {r.numpy().tobytes() for r in first.train.split.images} & {
        r.numpy().tobytes() for r in first.test.split.images
    }
    assert not rows
    counts = torch.bincount(first.test.labels) - torch.bincount(first.train.labels)
    assert counts.abs().max() <= 1


def test_per_class_and_validation_depend_on_the_seed_only():
    wanted = config(name="digits", per_class=7, validation=0.2)
    a, b, c = load_data(wanted, seed=1), load_data(wanted, seed=1), load_data(wanted, seed=2)
    assert torch.bincount(a.train.labels).tolist() == [7] * 10
    assert torch.equal(a.train.split.images, b.train.split.images)
    assert not torch.equal(a.train.split.images, c.train.split.images)
    assert a.validation is not None
    assert len(a.validation) == 179


def test_resized_and_widened(tmp_path):
    data = load_data(config(name="digits", image_size=16, channels=3))
    batch = next(iter(data.test.loader(4)))
    assert batch.images.shape == (4, 3, 16, 16)
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])
    assert len(data.mean) == 3


def test_idx_pairs(idx_folder):
    data = load_data(config(name="idx", root=str(idx_folder), mean=[0.0], std=[1.0]))
    assert (len(data.train), len(data.test), data.num_classes, data.image_size) == (12, 6, 3, 10)
    assert data.train.labels.tolist() == [i % 3 for i in range(12)]
    torch.testing.assert_close(data.train[3][0], torch.from_numpy(images(12)[3:4] / 255).float())


def test_single_idx_pair_is_split(idx_folder):
    for file in idx_folder.glob("train-*"):
        file.unlink()
    data = load_data(config(name="idx", root=str(idx_folder), test_fraction=0.5))
    assert (len(data.train), len(data.test)) == (3, 3)


def test_mnist_files_of_the_real_set():
    folder = os.environ.get("KD_DATA")
    if folder is None:
        pytest.skip("KD_DATA is not set: the real MNIST files are not here")
    data = load_data(config(name="idx", root="$KD_DATA/mnist", test_fraction=0.2))
    assert (len(data.train), len(data.test), data.image_size, data.num_classes) == (8000, 2000, 28, 10)
    assert torch.bincount(data.test.labels).min() > 150


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_npz(tmp_path, channels):
    arrays = {"train_images": images(12, 9, channels), "train_labels": np.arange(12) % 4}
    np.savez(tmp_path / "a.npz", **arrays, test_images=images(5, 9, channels, 1), test_labels=np.arange(5)[:, None] % 4)
    data = load_data(config(name="npz", root=str(tmp_path / "a.npz")))
    assert (len(data.train), len(data.test), data.num_classes, data.channels) == (12, 5, 4, channels or 1)
    pixels = torch.cat([b.images for b in data.train.loader(12)])
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(data.channels), atol=1e-4, rtol=0)


def test_cifar_in_torchvisions_layout(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = {part: images(count, 32, 3, seed=count) for part, count in (("train", 6), ("test", 4))}
    content = {
        part: {"data": array.transpose(0, 3, 1, 2).reshape(len(array), -1), "fine_labels": list(range(len(array)))}
        for part, array in pixels.items()
    }
    content["meta"] = {"fine_label_names": [f"class {i}" for i in range(100)]}
    sums = {}
    for name, entry in content.items():
        (folder / name).write_bytes(pickle.dumps(entry))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    with pytest.raises(InputError, match="torchvision finds no cifar100"):  # files of another content are not opened
        load_data(config(name="cifar100", root=str(tmp_path)))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    data = load_data(config(name="cifar100", root=str(tmp_path), mean=[0.0], std=[1.0]))
    assert (len(data.train), len(data.test), data.num_classes, data.channels) == (6, 4, 100, 3)
    wanted = torch.from_numpy(pixels["train"][2]).permute(2, 0, 1) / 255
    torch.testing.assert_close(data.train[2][0], wanted)
    assert data.train.labels.tolist() == list(range(6))


def test_mnist_in_torchvisions_layout(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 10), ("t10k", 5)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images(count, 28))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count))
    data = load_data(config(name="mnist", root=str(tmp_path)))
    assert (len(data.train), len(data.test), data.num_classes, data.image_size) == (10, 5, 10, 28)
    assert data.class_names[3] == "3 - three"


def test_image_folder_with_train_and_val(image_root):
    data = load_data(config(name="image_folder", root=str(image_root), image_size=16))
    assert data.class_names == ["cat", "dog"]
    assert (len(data.train), len(data.test)) == (8, 4)
    batch = next(iter(data.train.loader(8)))
    assert batch.images.shape == (8, 3, 16, 16)
    assert batch.labels.tolist() == [0] * 4 + [1] * 4


def test_crop_pct_keeps_the_centre_of_test_images(tmp_path):
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[8:24, 8:24] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    plain = {"name": "image_folder", "root": str(tmp_path), "image_size": 16, "mean": [0.0], "std": [1.0]}
    whole, centre = (load_data(config(**plain, crop_pct=share)).test[0][0] for share in (1.0, 0.5))
    assert float(whole.mean()) == pytest.approx(0.25, abs=0.05)
    torch.testing.assert_close(centre, torch.ones(3, 16, 16))


def test_image_folder_without_parts_is_split(image_root):
    data = load_data(config(name="image_folder", root=str(image_root / "train"), image_size=16, test_fraction=0.5))
    assert (len(data.train), len(data.test)) == (4, 4)


def test_environment_variable_in_root(image_root, monkeypatch):
    monkeypatch.setenv("PICTURES", str(image_root))
    assert len(load_data(config(name="image_folder", root="$PICTURES/train", image_size=16)).train) == 4


def test_augmented_images_depend_on_seed_epoch_and_index_alone(image_root):
    from kdcore.data import set_epoch

    wanted = config(name="image_folder", root=str(image_root), image_size=16, augment={"crop": "resized", "hflip": 0.5})
    data = load_data(wanted)

    def epoch(number, workers=0):
        loader = data.train.loader(4, seed=3, train=True, num_workers=workers)
        set_epoch(loader, number)
        return {int(i): image for b in loader for i, image in zip(b.index, b.images)}

    first, again, later = epoch(0), epoch(0, workers=2), epoch(1)
    assert all(torch.equal(first[i], again[i]) for i in first)
    assert not all(torch.equal(first[i], later[i]) for i in first)
    plain = next(iter(data.train_plain.loader(8))).images
    assert torch.equal(plain, next(iter(data.train_plain.loader(8))).images)


def test_mixup_mixes_images_and_labels_alike():
    from kd_classification.data import AugmentConfig

    mixup = make_mixup(AugmentConfig(mixup=1.0), 4)
    np.random.seed(0)
    pixels, labels = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 4, 4).clone(), torch.arange(8) % 4
    mixed, soft = mixup(pixels, labels)
    assert soft.shape == (8, 4)
    torch.testing.assert_close(soft.sum(1), torch.ones(8))
    lam = (mixed[0, 0, 0, 0] - 7) / (0 - 7)
    torch.testing.assert_close(soft[0, 0], lam)
    assert make_mixup(AugmentConfig(), 4) is None


def test_subset_and_relabelled():
    data = load_data(config(name="digits"))
    part = data.train.subset(torch.tensor([5, 2]))
    assert torch.equal(part[0][0], data.train[5][0])
    assert part.labels.tolist() == data.train.labels[[5, 2]].tolist()
    renamed = part.relabelled(torch.tensor([1, 0]))
    assert [renamed[0][1], renamed[1][1]] == [1, 0]
    assert torch.equal(renamed[1][0], part[1][0])


def test_label_outside_the_classes(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        train_images=images(4),
        train_labels=np.array([0, 1, 2, 1]),
        test_images=images(2),
        test_labels=np.array([0, 7]),
    )
    with pytest.raises(InputError, match=r"label 7 in the test part is outside the 3 classes \(0 to 2\)"):
        load_data(config(name="npz", root=str(tmp_path / "a.npz")))


def test_files_are_never_unpickled(tmp_path):
    path = Path(tmp_path / "evil.npz")
    np.savez(path, train_images=np.array([{"a": 1}], dtype=object), train_labels=np.array([0]))
    with pytest.raises(InputError, match=r"not a readable npz file"):
        load_data(config(name="npz", root=str(path)))
