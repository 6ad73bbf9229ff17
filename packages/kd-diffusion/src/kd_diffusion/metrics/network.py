"""A small classifier whose penultimate layer is the feature space in which images without Inception are compared.

Inception features mean little for 8x8 digits, and its weights are a download; a classifier of the data's own labels
trains in seconds. Distances in its features compare runs on one data set, never with published FID numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_diffusion.metrics._sets import check_finite, labels_of
from kdcore.checkpoint import load_weights
from kdcore.data import seeded
from kdcore.errors import InputError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MIN_SIZE = 8


class FeatureNet(nn.Module):
    """Four convolutions, their mean over the image as features (N, width), and a linear classifier.

    There is no normalisation layer: one of the batch would make features depend on the training mode, one of the image
    would hide wrong contrast. Images of 16 pixels and more are halved by the first convolution.

    Args: channels, image_size, num_classes: of the images, which are (N, channels, image_size, image_size) in [-1, 1].
    """

    def __init__(self, channels: int, image_size: int, num_classes: int, width: int = 64):
        super().__init__()
        for name, value, least in (
            ("channels", channels, 1),
            ("image_size", image_size, MIN_SIZE),
            ("num_classes", num_classes, 2),
            ("width", width, 2),
        ):
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name}: given {value!r}, allowed: an integer >= {least}")
        self.config = {"channels": channels, "image_size": image_size, "num_classes": num_classes, "width": width}
        sizes = [(channels, width // 2, 2 if image_size >= 16 else 1), (width // 2, width, 2)]
        sizes += [(width, width, 1), (width, width, 2)]
        convolutions = [nn.Conv2d(i, o, 3, stride=stride, padding=1) for i, o, stride in sizes]
        self.classifier = nn.Linear(width, num_classes)
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)  # pyright: ignore[reportArgumentType]
        self.convolutions = nn.ModuleList(convolutions)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [-1, 1] -> (N, width). InputError for images of another shape."""
        expected = (self.config["channels"], self.config["image_size"], self.config["image_size"])
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise InputError(f"pixels: given {tuple(pixels.shape)}, allowed: (N, {', '.join(map(str, expected))})")
        for convolution in self.convolutions:
            pixels = F.relu(convolution(pixels))
        return pixels.mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [-1, 1] -> logits (N, num_classes)."""
        return self.classifier(self.features(pixels))


def train_features(
    pixels: Tensor,
    labels: Tensor,
    num_classes: int,
    seed: int = 0,
    *,
    steps: int = 400,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    device: torch.device | str | None = None,
) -> FeatureNet:
    """A FeatureNet trained on pixels (N, C, S, S) in [-1, 1] with labels (N,); the same one for the same arguments.

    AdamW with a one-cycle learning rate and shifts by up to one pixel, then `scale_features`. The caller's random state
    stays as it was. Returns it frozen, in eval mode, on `device` (None: that of the pixels).
    Raises: InputError on shapes, labels, steps and batch_size.
    """
    check_finite("pixels", pixels)
    if pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3]:
        raise InputError(f"pixels: given {tuple(pixels.shape)}, allowed: (N, C, S, S)")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}: given {value}, allowed: >= 1")
    labels = labels_of("labels", labels, len(pixels)).long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"labels: given {low} to {high}, allowed: 0 to num_classes - 1 = {num_classes - 1}")
    device = pixels.device if device is None else torch.device(device)
    with seeded(seed):
        net = FeatureNet(pixels.shape[1], pixels.shape[2], num_classes).to(device)
        optimiser = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            index = torch.randint(len(pixels), (min(batch_size, len(pixels)),))
            images = _shifted(pixels[index.to(pixels.device)].float()).to(device)
            loss = F.cross_entropy(net(images), labels[index.to(labels.device)].to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    net.eval().requires_grad_(False)
    scale_features(net, pixels)
    return net


@torch.no_grad()
def scale_features(net: FeatureNet, pixels: Tensor) -> None:
    """Scales the features, in place, to a mean square of 1 over pixels (N, C, H, W); the logits stay as they are.

    Distances then do not depend on how far training went on to blow the features up, and the kernel of
    `kernel_distance` gets values of the size it was made for.
    """
    rms = embed(net, pixels).features.square().mean().sqrt()
    if rms > 0:
        for parameter in net.convolutions[-1].parameters():  # ReLU and mean pass a positive factor through
            parameter.div_(rms)
        net.classifier.weight.mul_(rms)


def _shifted(pixels: Tensor) -> Tensor:
    """The whole batch moved by -1, 0 or 1 pixels each way; the border is repeated."""
    top, left = torch.randint(3, (2,)).tolist()
    height, width = pixels.shape[2:]
    return F.pad(pixels, (1, 1, 1, 1), mode="replicate")[:, :, top : top + height, left : left + width]


class Embedded(NamedTuple):
    """features (N, F) and logits (N, K), float32."""

    features: Tensor
    logits: Tensor


@torch.no_grad()
def embed(net: FeatureNet, pixels: Tensor, *, batch_size: int = 512) -> Embedded:
    """Features and logits of pixels (N, C, H, W), N > 0, `batch_size` at a time, on the network's device."""
    check_finite("pixels", pixels)
    device = net.classifier.weight.device
    features = torch.cat([net.features(part.to(device).float()) for part in pixels.split(batch_size)])
    return Embedded(features, net.classifier(features))


def save_features(net: FeatureNet, folder: Path | str) -> None:
    """Writes model.safetensors and config.json into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(net.config, indent=2) + "\n")


def load_features(folder: Path | str) -> FeatureNet:
    """What `save_features` wrote, frozen and in eval mode on the CPU. InputError names the file that is not right."""
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        net = FeatureNet(**config)
    except FileNotFoundError:
        raise InputError(f"features {folder / CONFIG}: no such file") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"features {folder / CONFIG}: not the config of a feature network ({error})") from None
    try:
        net.load_state_dict(load_weights(folder / WEIGHTS))
    except RuntimeError:
        raise InputError(f"features {folder / WEIGHTS}: weights of another network than {CONFIG} says") from None
    return net.eval().requires_grad_(False)
