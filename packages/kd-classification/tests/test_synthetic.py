"""Synthetic sets: decoding, files, first images, differentiable augmentation, experts' trajectories, fresh networks."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from kd_classification.data import Images
from kd_classification.engine import convnet
from kd_classification.engine.diff_augment import OPERATIONS, DiffAugment, cutmix, flip, rotate, scale
from kd_classification.engine.experts import (
    ExpertTraining,
    Trajectory,
    as_parameters,
    check_stateless,
    flat_parameters,
    load_parameters,
    open_pool,
    step_lengths,
)
from kd_classification.engine.fresh import accuracy, train_network
from kd_classification.engine.real_images import RealImages, cluster, herd, initial_pixels
from kd_classification.engine.synthetic import (
    LearnableImages,
    Preprocessing,
    SyntheticSet,
    Whitening,
    decode,
    decoded_labels,
    encode,
)
from kd_classification.sources import Split
from kdcore.config import OptimizerConfig, TrainConfig
from kdcore.errors import InputError

NAMES = ["cat", "dog", "owl"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saved_set(folder, factor=2, whitening=None, rate=None, side=8) -> SyntheticSet:
    images = torch.rand(6, 3, side, side, generator=generator()) * 1.4 - 0.2
    labels = torch.arange(3).repeat_interleave(2)
    preprocessing = Preprocessing([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], whitening)
    made = SyntheticSet(images, labels, NAMES, preprocessing, factor=factor, rate=rate)
    folder.mkdir(exist_ok=True)
    made.save(folder, made_by="test")
    return made


# ---------------------------------------------------------------- decoding


def test_decode_in_numbers():
    image = torch.arange(16.0, dtype=torch.float64).view(1, 1, 4, 4)
    decoded = decode(image, 2)
    expected = [[2, 2.25, 2.75, 3], [3, 3.25, 3.75, 4], [5, 5.25, 5.75, 6], [6, 6.25, 6.75, 7]]
    torch.testing.assert_close(decoded[1, 0], torch.tensor(expected, dtype=torch.float64))
    assert decode(image, 1) is image


def test_decode_is_tile_major_with_labels():
    images = torch.cat([torch.full((1, 1, 4, 4), 10.0), torch.full((1, 1, 4, 4), 20.0)])
    images[:, :, :2, 2:] += 1  # tile (0, 1)
    images[:, :, 2:, :2] += 2  # tile (1, 0)
    assert decode(images, 2)[:, 0, 0, 0].tolist() == [10, 20, 11, 21, 12, 22, 10, 20]
    assert decoded_labels(torch.tensor([3, 5]), 2).tolist() == [3, 5] * 4


def test_decode_pads_what_does_not_divide():
    decoded = decode(torch.zeros(2, 1, 5, 5), 2)
    assert decoded.shape == (8, 1, 5, 5)
    assert decoded[0].max() == 0
    assert decoded[-1].max() > 0.2, "the last tile reaches into the padding of 1/2"


@given(st.integers(0, 100), st.sampled_from([1, 2, 4]))
def test_encode_then_decode_keeps_constant_images(seed, factor):
    values = torch.rand(2 * factor**2, generator=generator(seed))
    images = values.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    stored = encode(images, factor)
    assert stored.shape == (2, 3, 8, 8)
    torch.testing.assert_close(decode(stored, factor), images)


def test_decode_is_linear_and_differentiable():
    x, y = torch.randn(2, 2, 1, 4, 4, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(decode(2 * x - 3 * y, 2), 2 * decode(x, 2) - 3 * decode(y, 2))
    assert torch.autograd.gradcheck(lambda z: decode(z, 2), (x.requires_grad_(),))


# ---------------------------------------------------------------- files


def test_set_comes_back_and_decodes_on_read(tmp_path):
    made = saved_set(tmp_path / "set", rate=0.03)
    again = SyntheticSet.load(tmp_path / "set")
    assert (len(again), again.factor, again.rate, again.class_names) == (24, 2, 0.03, NAMES)
    torch.testing.assert_close(again.images, made.images, rtol=0, atol=0)
    inputs, labels = again.tensors()
    for index in (0, 7, 23):
        image, label = again[index]
        torch.testing.assert_close(image, inputs[index])
        assert label == int(labels[index])
    torch.testing.assert_close(inputs[:6, 0], (decode(made.images, 2)[:6, 0] - 0.4) / 0.2)
    loader = torch.utils.data.DataLoader(again, batch_size=24)
    torch.testing.assert_close(next(iter(loader))[0], inputs)
    with pytest.raises(IndexError):
        again[24]


def test_whitening_is_kept(tmp_path):
    pixels = torch.rand(300, 3, 4, 4, generator=generator())
    whitening = Whitening.fit(pixels, eps=1e-4)
    preprocessing = Preprocessing([0.0] * 3, [1.0] * 3, whitening)
    inputs = preprocessing.inputs(pixels)
    covariance = torch.cov(inputs.flatten(1).T)
    torch.testing.assert_close(covariance, torch.eye(48), atol=5e-3, rtol=0)
    torch.testing.assert_close(preprocessing.pixels(inputs), pixels, atol=1e-4, rtol=0)
    made = saved_set(tmp_path / "set", factor=1, whitening=whitening, side=4)
    torch.testing.assert_close(SyntheticSet.load(tmp_path / "set").tensors()[0], made.tensors()[0])


def test_broken_sets_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.*no such file"):
        SyntheticSet.load(tmp_path / "nowhere")
    saved_set(tmp_path / "set")
    meta = tmp_path / "set" / "synthetic.json"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps({**content, "format": 9}))
    with pytest.raises(InputError, match="format 9"):
        SyntheticSet.load(tmp_path / "set")
    meta.write_text("{}")
    with pytest.raises(InputError, match="not a saved set"):
        SyntheticSet.load(tmp_path / "set")


STOCK = """
import sys
class Wall:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("kdcore", "kd_classification"):
            raise ImportError(name)
sys.meta_path.insert(0, Wall())
from safetensors.torch import load_file
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor
import torch
images = ImageFolder(sys.argv[1] + "/images", transform=ToTensor())
x, y = next(iter(torch.utils.data.DataLoader(images, batch_size=len(images))))
stored = load_file(sys.argv[1] + "/synthetic.safetensors")
assert not any(name.split(".")[0] in ("kdcore", "kd_classification") for name in sys.modules)
print(images.classes, tuple(x.shape), y.tolist(), tuple(stored["images"].shape), round(float(x.mean()), 4))
"""


@pytest.mark.slow
def test_stock_torchvision_opens_the_pictures_without_kd(tmp_path):
    made = saved_set(tmp_path / "set")
    command = [sys.executable, "-c", STOCK, str(tmp_path / "set")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels = [label for label in range(3) for _ in range(8)]
    mean = round(float(made.pictures().float().mean() / 255), 4)
    assert printed.strip() == f"{NAMES} (24, 3, 8, 8) {labels} (6, 3, 8, 8) {mean}"


# ---------------------------------------------------------------- learnable images


def test_learnable_images_by_class():
    images = LearnableImages(torch.rand(4, 1, 2, 2), torch.tensor([0, 0, 1, 1]))
    images.of_class(1).sum().backward()
    assert images.images.grad[:2].abs().max() == 0
    assert images.images.grad[2:].eq(1).all()
    with pytest.raises(InputError, match="sorted by class"):
        LearnableImages(torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))


# ---------------------------------------------------------------- real images


def real_set(count: int = 60, classes: int = 3, side: int = 4) -> RealImages:
    labels = torch.arange(count) % classes
    base = torch.rand(classes, 1, side, side, generator=generator(5))
    noise = torch.rand(count, 1, side, side, generator=generator(6))
    return RealImages(((0.7 * base[labels] + 0.3 * noise) * 255).byte(), labels, classes)


def test_samples_are_of_the_class_and_different():
    real = real_set()
    sample = real.sample(1, 12, generator())
    own = real.pixels(real.indices[1])
    found = [(own == image).flatten(1).all(1).nonzero().item() for image in sample]
    assert len(set(found)) == 12
    assert len(real.sample(1, 100, generator())) == 20
    torch.testing.assert_close(real.sample(2, 5, generator(1)), real.sample(2, 5, generator(1)))


def test_image_files_are_kept_as_they_are(tmp_path):
    normalise = (torch.tensor([0.3]).view(1, 1, 1), torch.tensor([0.2]).view(1, 1, 1))
    pixels = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)

    def transform(picture):
        return (torch.from_numpy(np.array(picture)).float()[None] / 255 - normalise[0]) / normalise[1]

    from PIL import Image

    paths = [tmp_path / f"{k}.png" for k in range(3)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image[0].numpy()).save(path)
    files = Images(Split(np.arange(3), paths=paths, channels=1), torch.arange(3), transform, normalise)
    assert torch.equal(RealImages.of(files, 3).images, pixels)


@pytest.mark.parametrize("init", ["random", "mix", "noise", "herding", "kmeans"])
def test_first_images(init):
    real = real_set()
    factor = 2 if init == "mix" else 1
    arguments = {"factor": factor, "network": lambda pixels: pixels.flatten(1)}
    pixels, labels = initial_pixels(real, init, 4, generator=generator(), **arguments)
    again, _ = initial_pixels(real, init, 4, generator=generator(), **arguments)
    assert pixels.shape == (12, 1, 4, 4)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    torch.testing.assert_close(pixels, again)
    if init in ("random", "herding", "kmeans"):
        all_real = {tuple(image.flatten().tolist()) for image in real.pixels(torch.arange(60))}
        chosen = {tuple(image.flatten().tolist()) for image in pixels}
        assert len(chosen) == 12
        assert chosen <= all_real
    LearnableImages(pixels, labels)


def test_all_and_too_few_images():
    real = real_set()
    pixels, labels = initial_pixels(real, "full", 1, generator=generator())
    assert len(pixels) == 60
    assert torch.bincount(labels).tolist() == [20] * 3
    with pytest.raises(InputError, match="needs 36 real images of each class, class 0 has 20"):
        initial_pixels(real, "mix", 4, factor=3, generator=generator())


def test_herding_follows_the_mean_and_clusters_are_found():
    features = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # mean 3.25
    assert herd(features, 2).tolist() == [2, 1]  # nearest to 3.25; then (2 + 1) / 2 is nearer than (2 + 10) / 2
    groups = torch.cat([torch.randn(20, 2, generator=generator()) + 20 * k for k in range(3)])
    chosen = cluster(groups, 3)
    assert sorted((chosen // 20).tolist()) == [0, 1, 2]
    for index in chosen.tolist():
        own = groups[index // 20 * 20 : index // 20 * 20 + 20]
        distance = (own - own.mean(0)).square().sum(1)
        assert distance.argmin() == index % 20


# ---------------------------------------------------------------- augmentation


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_the_shape_and_pass_gradients(name):
    operation, numbers = OPERATIONS[name]
    images = torch.rand(3, 2, 8, 8, generator=generator(), dtype=torch.float64, requires_grad=True)
    u = torch.rand(numbers, 3, generator=generator(2), dtype=torch.float64)
    out = operation(images, u)
    assert out.shape == images.shape
    assert torch.autograd.gradcheck(lambda x: operation(x, u), (images,))
    one_by_one = torch.cat([operation(images[k : k + 1], u[:, k : k + 1]) for k in range(3)])
    torch.testing.assert_close(out, one_by_one)
    torch.testing.assert_close(operation(images, u[:, :1]), operation(images, u[:, :1].expand(-1, 3)))


def test_operations_in_numbers():
    image = torch.arange(64.0, dtype=torch.float64).view(1, 1, 8, 8)

    def u(*values):
        return torch.tensor(values, dtype=torch.float64).view(-1, 1)

    assert torch.equal(flip(image, u(0.49)), image.flip(3))
    assert torch.equal(flip(image, u(0.5)), image)
    shifted = OPERATIONS["crop"][0](image, u(0.99, 0.0))  # one row down in the source, one column to the left
    expected = torch.zeros(8, 8, dtype=torch.float64)
    expected[:7, 1:] = image[0, 0, 1:, :7]
    assert torch.equal(shifted[0, 0], expected)
    assert torch.equal(OPERATIONS["translate"][0](image, u(0.5)), image)
    holed = OPERATIONS["cutout"][0](image + 1, u(0.5, 0.0))  # centre row 4 of 0..8, column 0: rows 2-5, columns 0-1
    assert holed.eq(0).nonzero()[:, 2:].tolist() == [[row, column] for row in range(2, 6) for column in (0, 1)]
    coloured = OPERATIONS["color"][0](image, u(0.75, 0.3, 0.5))  # brighter by 1/4, contrast times 1
    torch.testing.assert_close(coloured, image + 0.25)
    torch.testing.assert_close(rotate(image, u(0.5)), image)
    same = (1 - 1 / 1.2) / (1.2 - 1 / 1.2)
    torch.testing.assert_close(scale(image, u(same, same)), image)


def test_siamese_batches_and_layers():
    torch.manual_seed(0)
    augment = DiffAugment(["flip", "color", "crop", "cutout", "rotate"], "layered", siamese=True)
    images = torch.rand(1, 3, 8, 8)
    for _ in range(10):
        a, b = augment.alike(images.repeat(3, 1, 1, 1), images)
        torch.testing.assert_close(a, b.repeat(3, 1, 1, 1))
        names = augment.drawn()
        assert names[:2] == ["flip", "color"]
        assert names[2] in ("crop", "rotate")
        assert names[3:] == ["cutout"]
    single = DiffAugment(["flip", "color", "crop"])
    assert {len(single.drawn()) for _ in range(20)} == {1}
    assert {name for _ in range(60) for name in single.drawn()} == {"flip", "color", "crop"}
    assert torch.equal(DiffAugment([])(images), images)


def test_cutmix_shares_are_those_of_the_pixels():
    torch.manual_seed(0)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    mixed_seen = False
    for _ in range(20):
        mixed, shares = cutmix(images, torch.arange(4), 4, 1.0)
        for k in range(4):
            counts = torch.stack([(mixed[k] == c).float().mean() for c in range(4)])
            torch.testing.assert_close(counts, shares[k])
        mixed_seen |= bool((shares.max(1).values < 1).any())
    assert mixed_seen
    assert cutmix(images, torch.arange(4), 4, 0.0)[0] is images


# ---------------------------------------------------------------- the network


def test_convnet_by_timm_name():
    convnet.register()
    convnet.register()
    model = timm.create_model("dd_convnet", num_classes=7, in_chans=3, img_size=32, width=16, depth=3)
    features = model.forward_features(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, 16, 4, 4)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size) == (2, 256)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    standard = convnet.ConvNet()  # the field's: 3 blocks of width 128, 2048 features, 320 010 parameters
    assert standard.head_hidden_size == 2048
    assert sum(p.numel() for p in standard.parameters()) == 320_010
    mnist = convnet.ConvNet(in_chans=1, img_size=28)
    assert mnist(torch.rand(1, 1, 28, 28)).shape == (1, 10)
    assert mnist.head_hidden_size == 2048
    check_stateless(standard)
    with pytest.raises(InputError, match="running statistics"):
        check_stateless(convnet.ConvNet(norm="batch"))
    with pytest.raises(InputError, match="depth = 4 halves an image of 8 pixels to nothing"):
        convnet.ConvNet(img_size=8, depth=4)
    with pytest.raises(InputError, match="norm = 'layer'"):
        convnet.ConvNet(norm="layer")


# ---------------------------------------------------------------- experts


def expert(keep: str = "every", epochs: int = 3) -> ExpertTraining:
    torch.manual_seed(0)
    network = convnet.ConvNet(num_classes=3, in_chans=1, img_size=4, width=4, depth=1)
    preprocessing = Preprocessing([0.5], [0.25])
    return ExpertTraining(
        network, preprocessing, num_classes=3, augment=DiffAugment(["crop"]), epochs=epochs, keep=keep
    )


def trained_expert(folder, keep="every") -> list[torch.Tensor]:
    distiller = expert(keep)
    rows = [flat_parameters(distiller.student)]
    optimizer = torch.optim.SGD(distiller.student.parameters(), lr=0.1)
    for epoch in range(3):
        distiller.progress.epoch = epoch
        for batch in real_set().loader(20, seed=epoch):
            optimizer.zero_grad()
            distiller.loss(batch).total().backward()
            optimizer.step()
        distiller.epoch_end()
        rows.append(flat_parameters(distiller.student))
    folder.mkdir(parents=True)
    distiller.save(folder)
    return rows


def test_trajectory_is_kept_epoch_by_epoch(tmp_path):
    rows = trained_expert(tmp_path / "every")
    saved = Trajectory(tmp_path / "every")
    assert saved.epochs == [0, 1, 2, 3]
    assert torch.equal(saved.rows(0, 4), torch.stack(rows))
    assert torch.equal(saved[-1], rows[-1])
    lengths = [float((b - a).norm()) for a, b in pairwise(rows)]
    assert list(step_lengths(saved)) == pytest.approx(lengths)
    trained_expert(tmp_path / "ends", keep="ends")
    ends = Trajectory(tmp_path / "ends")
    assert ends.epochs == [0, 3]
    assert torch.equal(ends.rows(0, 2), torch.stack([rows[0], rows[-1]]))


def resident() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_rows_read_only_their_part_of_the_file(tmp_path):
    tensors = {"parameters": torch.arange(64.0)[:, None].repeat(1, 500_000), "epochs": torch.arange(64)}
    save_file(tensors, tmp_path / "trajectory.safetensors")  # 128 MB, 2 MB a row
    del tensors
    before = resident()
    saved = Trajectory(tmp_path)
    rows = saved.rows(5, 7)
    assert rows.mean(1).tolist() == [5, 6]
    assert resident() - before < 40e6


def test_flat_parameters_and_back():
    network = expert().student
    flat = flat_parameters(network)
    named = as_parameters(flat * 2, network)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(named[name], 2 * parameter)
    load_parameters(network, flat + 1)
    torch.testing.assert_close(flat_parameters(network), flat + 1)


def test_broken_pools_are_named(tmp_path):
    (tmp_path / "pool" / "000").mkdir(parents=True)
    with pytest.raises(InputError, match=r"trajectory.safetensors is missing or broken"):
        open_pool(tmp_path / "pool", expert().student)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no expert"):
        open_pool(tmp_path / "empty", expert().student)
    trained_expert(tmp_path / "good" / "000")
    with pytest.raises(InputError, match="the network has 123"):
        open_pool(tmp_path / "good", nn.Linear(40, 3))


# ---------------------------------------------------------------- fresh networks


def test_a_fresh_network_learns_the_set():
    torch.manual_seed(0)
    real = real_set()
    inputs, labels = (real.pixels(torch.arange(60)) - 0.5) / 0.25, real.labels
    train = TrainConfig(steps=60, batch_size=16, optimizer=OptimizerConfig(name="adamw", lr=1e-2))
    network = convnet.ConvNet(num_classes=3, in_chans=1, img_size=4, width=8, depth=1)
    before = accuracy(network, inputs, labels)
    trained = train_network(
        network, inputs, labels, train, num_classes=3, augment=DiffAugment(["crop"]), cutmix_probability=0.3
    )
    assert not trained.training
    assert accuracy(trained, inputs, labels) > max(0.9, before)
