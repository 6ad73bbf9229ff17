"""The feature network of the metrics, the metrics of images by name, FID with Inception, rates and timing."""

from __future__ import annotations

import math
import time
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from kd_diffusion import metrics
from kd_diffusion.metrics import (
    FeatureNet,
    attribute_rates,
    class_accuracy,
    embed,
    frechet_distance,
    generation_metrics,
    load_features,
    save_features,
    seconds_per_sample,
    torchmetrics_fid,
    train_features,
)
from kd_diffusion.metrics.network import scale_features
from kdcore.errors import InputError
from kdcore.report.text import direction


def normal(seed: int, rows: int, columns: int, *, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels and labels, held-out pixels and labels."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    labels = torch.tensor(labels)[order]
    return pixels[:1200], labels[:1200], pixels[1200:], labels[1200:]


@pytest.fixture(scope="module")
def quick_net(digits) -> FeatureNet:
    return train_features(digits[0], digits[1], 10, steps=60)


# ---------------------------------------------------------------- feature network


@pytest.mark.slow
def test_features_tell_held_out_digits_apart_after_seconds_of_training(digits):
    pixels, labels, held_out, held_out_labels = digits
    net = train_features(pixels, labels, 10)
    assert class_accuracy(embed(net, held_out).logits, held_out_labels) > 0.95
    assert sum(p.numel() for p in net.parameters()) < 150_000


def test_training_is_a_function_of_the_seed_and_leaves_the_callers_random_state(digits):
    train = partial(train_features, digits[0][:64], digits[1][:64], 10, steps=3, batch_size=16)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    again, other = train(seed=1), train(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert not first.training
    assert not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (1, 28), (3, 32), (3, 15)])
def test_sizes_and_channels(channels, size):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(20, channels, size, size, generator=generator) * 2 - 1
    net = train_features(pixels, torch.arange(20) % 4, 4, steps=2, batch_size=8)
    found = embed(net, pixels, batch_size=7)
    assert found.features.shape == (20, 64)
    assert torch.allclose(found.logits, net(pixels), atol=1e-5)
    with pytest.raises(InputError, match=f"pixels: given .*, allowed: .N, {channels}, {size}, {size}"):
        net(pixels[:, :, 1:])


def test_features_are_scaled_to_one_and_logits_stay(digits):
    net, pixels = FeatureNet(1, 8, 10), digits[0]
    torch.nn.init.normal_(net.classifier.bias)
    before = embed(net, pixels)
    scale_features(net, pixels)
    after = embed(net, pixels)
    assert float(after.features.square().mean()) == pytest.approx(1, rel=1e-4)
    assert torch.allclose(after.logits, before.logits, atol=1e-4)
    ratio = before.features.norm() / after.features.norm()
    assert torch.allclose(after.features * ratio, before.features, rtol=1e-3, atol=1e-4)
    trained = train_features(pixels, digits[1], 10, steps=5)
    assert float(embed(trained, pixels).features.square().mean()) == pytest.approx(1, rel=1e-4)


def test_saved_features_load_as_they_were(tmp_path, quick_net, digits):
    save_features(quick_net, tmp_path / "net")
    net = load_features(tmp_path / "net")
    assert torch.equal(net(digits[2]), quick_net(digits[2]))
    assert {path.name for path in (tmp_path / "net").iterdir()} == {"model.safetensors", "config.json"}


def test_broken_saved_features_are_named(tmp_path, quick_net):
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_features(tmp_path)
    save_features(quick_net, tmp_path)
    config = (tmp_path / "config.json").read_text()
    for wrong in ("{", config.replace("64", '"x"'), config.replace('"width"', '"depth"'), "[1]"):
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(InputError, match=r"config\.json: not the config"):
            load_features(tmp_path)
    (tmp_path / "config.json").write_text(config.replace("64", "32"))
    with pytest.raises(InputError, match="weights of another network"):
        load_features(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable"):
        load_features(tmp_path)


# ---------------------------------------------------------------- by name


def test_generation_metrics_order_real_noisy_and_collapsed_samples(quick_net, digits):
    pixels, _, held_out, held_out_labels = digits
    noise = normal(0, len(held_out), 64).view(-1, 1, 8, 8).float()
    real = generation_metrics(quick_net, held_out, held_out_labels, pixels)
    noisy = generation_metrics(quick_net, held_out + 0.7 * noise, held_out_labels, pixels)
    names = {"frechet", "precision", "recall", "density", "coverage", "mmd", "accuracy"}
    assert real.keys() == names
    assert all(direction(name) != 0 for name in names)
    for name in names - {"recall"}:  # noise blows the balls of recall up
        assert direction(name) * (real[name] - noisy[name]) > 0, name
    one_class = held_out_labels == 3
    collapsed = generation_metrics(quick_net, held_out[one_class], None, pixels)
    assert "accuracy" not in collapsed
    assert collapsed["precision"] > 0.5
    assert all(collapsed[name] < real[name] for name in ("recall", "coverage"))
    assert all(collapsed[name] > real[name] for name in ("frechet", "mmd"))


def test_generation_metrics_refuse_what_cannot_be_compared(quick_net, digits):
    pixels, labels = digits[0][:20], digits[1][:20]
    broken = pixels.clone()
    broken[4, 0, 2, 2] = math.inf
    for arguments, message in (
        ((broken, labels, pixels), "samples: 1 of 20 samples hold NaN or infinity"),
        ((pixels, labels[:19], pixels), r"labels: given \(19,\)"),
        ((pixels, labels + 5, pixels), "labels: given .* allowed: 0 to 9"),
        ((pixels.repeat(1, 3, 1, 1), labels, pixels), "pixels: given .20, 3, 8, 8., allowed: .N, 1, 8, 8."),
        ((pixels[:5], labels[:5], pixels), "k: given 5 with 5 samples"),
        ((pixels.byte(), labels, pixels), "samples: given .*uint8"),
    ):
        with pytest.raises(InputError, match=message):
            generation_metrics(quick_net, *arguments)


def test_rates_and_accuracy_are_shares():
    pixels = torch.linspace(-1, 1, 8).view(8, 1, 1, 1).expand(8, 1, 2, 2)
    rates = attribute_rates(
        pixels, {"bright": lambda x: x.mean((1, 2, 3)) > 0, "dark": lambda x: x.amax((1, 2, 3)) < -0.9}
    )
    assert rates == {"bright": 0.5, "dark": 0.125}
    assert class_accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


def test_seconds_per_sample_is_the_median_of_the_calls_after_the_warm_up(monkeypatch):
    clock = [0.0]
    durations = iter([100.0, 2.0, 50.0, 4.0, 3.0, 1.0])
    asked = []

    def draw(count):
        asked.append(count)
        clock[0] += next(durations)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert seconds_per_sample(draw, 10) == pytest.approx(0.3)
    assert asked == [10] * 6


def test_seconds_of_a_real_wait():
    found = seconds_per_sample(lambda count: time.sleep(0.002 * count), 5, repeats=3)
    assert 0.002 <= found < 0.02


# ---------------------------------------------------------------- Inception


def test_frechet_agrees_with_torchmetrics_on_a_network_of_its_own(quick_net, digits):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = 64

        def forward(self, pixels):
            return quick_net.features(pixels)

    peer = FrechetInceptionDistance(Features(), normalize=True, input_img_size=(1, 8, 8)).set_dtype(torch.float64)
    noisy = digits[0] + 0.3 * normal(0, 1200, 64).view(-1, 1, 8, 8).float()
    peer.update(digits[0], real=True)
    peer.update(noisy, real=False)
    ours = frechet_distance(embed(quick_net, noisy).features, embed(quick_net, digits[0]).features)
    assert ours == pytest.approx(float(peer.compute()), rel=1e-3)  # it keeps moments in float32
    assert ours > 0.01


def test_fid_without_torch_fidelity_says_so(monkeypatch):
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    x = torch.zeros(4, 1, 8, 8)
    with pytest.raises(InputError, match="needs the package torch-fidelity"):
        torchmetrics_fid(x, x)


def test_fid_refuses_bad_arguments(tmp_path):
    x = torch.zeros(4, 1, 8, 8)
    torch.save({"a": partial(print)}, tmp_path / "code.pth")
    for call, message in (
        (lambda: torchmetrics_fid(x, x, feature=100), "feature: given 100"),
        (lambda: torchmetrics_fid(x[:, 0], x), "samples: given .4, 8, 8."),
        (lambda: torchmetrics_fid(x, x[:1]), "reference: given 1 samples"),
        (lambda: torchmetrics_fid(x, x.expand(-1, 2, -1, -1)), "reference: given .4, 2, 8, 8."),
        (lambda: torchmetrics_fid(x, x, weights=tmp_path / "none.pth"), r"none\.pth: no such file"),
        (
            lambda: torchmetrics_fid(x, x, weights=tmp_path / "code.pth"),
            r"code\.pth: not a checkpoint of plain tensors",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_everything_is_exported():
    assert all(hasattr(metrics, name) for name in metrics.__all__)
