"""Networks and data of several modalities: one timm encoder each, features fused behind a mask, one shared trunk.

    u = concat_j( m_j h_j(x_j) ),   z = classifier(trunk(u))

A modality is dropped by zeroing what its encoder says, not its image; an input that is not there at all counts as
dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate
from torch.utils.data import DataLoader, Dataset

from kd_classification.data import Data, DataConfig, Images, load_data
from kdcore.checkpoint import load_weights
from kdcore.config import Config
from kdcore.data import seeded, seeded_loader
from kdcore.errors import InputError

View = Literal["whole", "rows", "columns", "gradient", "blur"]


class ModalityConfig(Config):
    """One modality: a folder of its own with the same file names as the others, or a view of the images of `data`."""

    name: str = Field(description="its name", pattern=r"^[A-Za-z0-9_]+$")
    root: str | None = Field(None, description="its own root, as data.root; None: that of `data`")
    channels: Literal[1, 3] | None = Field(None, description="1 or 3; None: as `data`")
    view: View = Field(
        "whole", description="of in-memory images: all, some rows or columns, gradient magnitude, blurred"
    )
    part: tuple[float, float] = Field((0.0, 1.0), description="rows and columns: from and to, shares of the side")


class MultiBatch(NamedTuple):
    """images: modality -> (B, C, H, W) float; labels (B,) int64; index (B,)."""

    images: dict[str, Tensor]
    labels: Tensor
    index: Tensor


class MultiImages(Dataset[Any]):
    """The same samples in several modalities, in one order; augmented alike."""

    def __init__(self, parts: Mapping[str, Images]):
        self.parts = dict(parts)
        first = next(iter(self.parts.values()))
        self.labels = first.labels
        if all(images.transform is None for images in self.parts.values()):
            self.__getitems__ = self._batch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int, int]:
        # one crop, one rotation for all modalities of a sample
        seed, images = int(torch.randint(2**31, ())), {}
        for name, part in self.parts.items():
            with seeded(seed):
                images[name] = part[index][0]
        return images, int(self.labels[index]), index

    def _batch(self, indices: Sequence[int]) -> MultiBatch:
        index = torch.as_tensor(indices)
        images = {name: images._batch(indices).images for name, images in self.parts.items()}
        return MultiBatch(images, self.labels[index], index)

    def loader(self, batch_size: int, *, seed: int = 0, train: bool = False, num_workers: int = 0) -> DataLoader[Any]:
        """As `Images.loader`: a seeded order without the incomplete last batch (train), or all in order."""
        size = min(batch_size, len(self)) if train else batch_size
        return seeded_loader(
            self, size, seed=seed, shuffle=train, drop_last=train, num_workers=num_workers, collate=collate
        )


def collate(items: Any) -> MultiBatch:
    if isinstance(items, MultiBatch):
        return items
    images, labels, index = zip(*items, strict=True)
    stacked = {name: torch.stack([sample[name] for sample in images]) for name in images[0]}
    return MultiBatch(stacked, torch.tensor(labels), torch.tensor(index))


@dataclass(frozen=True)
class MultiData:
    """The splits in every modality; `data` is that of the first one."""

    train: MultiImages
    test: MultiImages
    validation: MultiImages | None
    channels: dict[str, int]
    data: Data


def load_modalities(config: DataConfig, modalities: Sequence[ModalityConfig], seed: int) -> MultiData:
    """Raises InputError where modalities do not hold the same samples under the same file names."""
    names = [modality.name for modality in modalities]
    if len(names) < 2 or len(set(names)) != len(names):
        raise InputError(f"modalities: {names}; allowed: two or more of different names")
    loaded: dict[str, Data] = {}
    for modality in modalities:
        update = {"root": modality.root or config.root, "channels": modality.channels or config.channels}
        loaded[modality.name] = load_data(config.model_copy(update=update), seed)
    first = loaded[names[0]]
    for name, data in loaded.items():
        _check_same(names[0], first, name, data)

    def part(which: str) -> MultiImages | None:
        if getattr(first, which) is None:
            return None
        return MultiImages({m.name: viewed(getattr(loaded[m.name], which), m) for m in modalities})

    train, test = part("train"), part("test")
    assert train is not None
    assert test is not None
    return MultiData(train, test, part("validation"), {name: d.channels for name, d in loaded.items()}, first)


def _check_same(first_name: str, first: Data, name: str, data: Data) -> None:
    for which in ("train", "test"):
        a, b = getattr(first, which), getattr(data, which)
        names = [[path.stem for path in images.split.paths] for images in (a, b)]
        if not torch.equal(a.labels, b.labels) or names[0] != names[1]:
            raise InputError(
                f"modalities: '{name}' does not hold the {which} samples of '{first_name}'; allowed: the same classes "
                "and file names in each"
            )


def viewed(images: Images, modality: ModalityConfig) -> Images:
    """The modality's view of in-memory images, resized to their own size."""
    if modality.view == "whole":
        return images
    pixels = images.split.images
    if pixels is None or images.transform is not None:
        raise InputError(
            f"modalities.{modality.name}.view = '{modality.view}': only for images in memory, without augmentation"
        )
    size = pixels.shape[-2:]
    values = _view(pixels.float(), modality)
    values = interpolate(values, size, mode="bilinear", antialias=True) if values.shape[-2:] != size else values
    split = type(images.split)(images.split.labels, values.round().clamp(0, 255).byte(), [], images.split.channels)
    return Images(split, images.labels, None, (images.mean, images.std))


def _view(pixels: Tensor, modality: ModalityConfig) -> Tensor:
    height, width = pixels.shape[-2:]
    if modality.view == "gradient":
        vertical, horizontal = torch.gradient(pixels, dim=(2, 3))
        return (vertical.square() + horizontal.square()).sqrt()
    if modality.view == "blur":
        return avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False)
    side = height if modality.view == "rows" else width
    start, stop = (round(share * side) for share in modality.part)
    if not 0 <= start < stop <= side:
        raise InputError(
            f"modalities.{modality.name}.part = {modality.part}: allowed: shares of {side} pixels, from < to"
        )
    return pixels[:, :, start:stop] if modality.view == "rows" else pixels[:, :, :, start:stop]


# ---------------------------------------------------------------- masks


def combinations(count: int) -> Tensor:
    """Every mask of `count` modalities but the empty one, bool (2^count - 1, count); the last keeps all.

    >>> combinations(2).int().tolist()
    [[1, 0], [0, 1], [1, 1]]
    """
    codes = torch.arange(1, 2**count)
    return (codes[:, None] >> torch.arange(count)) & 1 == 1


def codes_of(masks: Tensor) -> Tensor:
    """Row numbers in `combinations` of masks (B, M) bool: int64 (B,)."""
    return (masks.long() << torch.arange(masks.shape[1], device=masks.device)).sum(dim=1) - 1


def draw_masks(batch: int, count: int, device: Any) -> Tensor:
    """Masks (batch, count), each uniform over all combinations but the empty one."""
    return combinations(count).to(device)[torch.randint(2**count - 1, (batch,), device=device)]


def mask_name(mask: Tensor) -> str:
    """'101' for a mask (M,) that keeps the first and the third modality."""
    return "".join(str(int(kept)) for kept in mask)


# ---------------------------------------------------------------- networks


class Output(NamedTuple):
    """fused (B, C, H, W) after the mask; maps: the last stage's (B, D, H', W'); logits (B, K)."""

    fused: Tensor
    maps: Tensor
    logits: Tensor


class Trunk(nn.Module):
    """The last two stages of a timm ResNet, pooling and classifier: fused maps -> (last maps, logits)."""

    def __init__(self, name: str, args: Mapping[str, Any], num_classes: int, inputs: int):
        super().__init__()
        import timm

        network = timm.create_model(name, num_classes=num_classes, **args)
        first = network.layer3[0]
        convolutions = [first.conv1, *(m for m in first.downsample.modules() if isinstance(m, nn.Conv2d))]
        if convolutions[0].in_channels != inputs:
            for old in convolutions:
                new = nn.Conv2d(
                    inputs, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None
                )
                nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
                parent, _, child = _path(first, old).rpartition(".")
                setattr(first.get_submodule(parent), child, new)
        self.layer3, self.layer4 = network.layer3, network.layer4
        self.global_pool, self.fc = network.global_pool, network.fc

    def forward(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.layer4(self.layer3(fused))
        return maps, self.fc(self.global_pool(maps))


def _path(module: nn.Module, part: nn.Module) -> str:
    return next(name for name, found in module.named_modules() if found is part)


class MultiModalNet(nn.Module):
    """One encoder a modality (a timm ResNet up to its second stage), fusion by concatenation or sum, a shared trunk.

    `channels`: modality -> input channels, in the order of the masks' columns. `args`: of timm's factory.
    """

    def __init__(
        self,
        name: str,
        channels: Mapping[str, int],
        num_classes: int,
        *,
        args: Mapping[str, Any] | None = None,
        fusion: Literal["concat", "add"] = "concat",
        pretrained: bool = False,
    ):
        super().__init__()
        import timm

        self.settings = {
            "name": name,
            "channels": dict(channels),
            "num_classes": num_classes,
            "args": dict(args or {}),
            "fusion": fusion,
        }
        self.modalities, self.fusion, self.num_classes = list(channels), fusion, num_classes
        common = {**(args or {}), "pretrained": pretrained, "features_only": True, "out_indices": (2,)}
        try:
            self.encoders = nn.ModuleDict(
                {m: timm.create_model(name, in_chans=count, **common) for m, count in channels.items()}
            )
            self.width = next(iter(self.encoders.values())).feature_info.channels()[0]
            self.trunk = self.new_trunk()
        except (AttributeError, TypeError, ValueError, RuntimeError, AssertionError, KeyError, IndexError) as error:
            raise InputError(f"'{name}' with {dict(args or {})}: not a timm ResNet of four stages ({error})") from None

    def new_trunk(self) -> Trunk:
        """One more trunk of the same form, freshly initialised."""
        inputs = self.width * (len(self.modalities) if self.fusion == "concat" else 1)
        return Trunk(self.settings["name"], self.settings["args"], self.num_classes, inputs)

    def fuse(self, images: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """u (B, C, H, W); mask (B, M) or (M,), None keeps all. Modalities that `images` lacks are zeros."""
        encoded = {name: self.encoders[name](images[name])[0] for name in self.modalities if name in images}
        if not encoded:
            raise InputError(f"images: of {sorted(images)}; allowed: some of {self.modalities}")
        like = next(iter(encoded.values()))
        parts = [encoded.get(name, torch.zeros_like(like)) for name in self.modalities]
        if mask is not None:
            columns = mask.to(like.dtype).expand(len(like), -1).unbind(dim=1)
            parts = [part * column[:, None, None, None] for part, column in zip(parts, columns, strict=True)]
        return torch.cat(parts, dim=1) if self.fusion == "concat" else torch.stack(parts).sum(dim=0)

    def outputs(self, images: Mapping[str, Tensor], mask: Tensor | None = None) -> Output:
        fused = self.fuse(images, mask)
        return Output(fused, *self.trunk(fused))

    def forward(self, images: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """Logits (B, K)."""
        return self.outputs(images, mask).logits


def save_multimodal(network: MultiModalNet, folder: Path, class_names: Sequence[str]) -> None:
    """model.safetensors and config.json; and encoders/<modality>.safetensors, the state dict of the stock timm network

    timm.create_model(name, features_only=True, out_indices=(2,), in_chans=channels, **args).
    """
    (folder / "encoders").mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / "model.safetensors")
    for name, encoder in network.encoders.items():
        state = {key: value.contiguous() for key, value in encoder.state_dict().items()}
        save_file(state, folder / "encoders" / f"{name}.safetensors")
    record = {**network.settings, "class_names": list(class_names)}
    (folder / "config.json").write_text(json.dumps(record, indent=2), encoding="utf-8")


def load_multimodal(folder: Path, *, field: str = "model") -> MultiModalNet:
    """What `save_multimodal` wrote. Raises InputError on a broken folder."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        record.pop("class_names", None)
        network = MultiModalNet(**record)
        network.load_state_dict(load_weights(folder / "model.safetensors"))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{field}.checkpoint = {folder}: not a multimodal network ({error})") from None
    return network


@torch.no_grad()
def predict_masked(network: MultiModalNet, images: MultiImages, mask: Tensor) -> Tensor:
    """Logits (N, K) on the CPU, in eval mode, with the modalities of mask (M,)."""
    device, was_training = next(network.parameters()).device, network.training
    network.eval()
    mask = mask.to(device)
    logits = []
    for batch in images.loader(512):
        moved = {name: values.to(device) for name, values in batch.images.items()}
        logits.append(network(moved, mask).float().cpu())
    network.train(was_training)
    return torch.cat(logits)


def mean_accuracy(network: MultiModalNet, images: MultiImages, masks: Tensor | None = None) -> float:
    """Accuracy averaged over masks, by default over all combinations."""
    masks = combinations(len(network.modalities)) if masks is None else masks
    hits = [(predict_masked(network, images, mask).argmax(1) == images.labels).double().mean() for mask in masks]
    return float(torch.stack(hits).mean())
