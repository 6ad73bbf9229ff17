"""Image transforms: timm's, chosen by `AugmentConfig`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_classification.data import AugmentConfig


def evaluation_transform(size: int, channels: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Any], Any]:
    """PIL image -> normalised tensor (C, size, size): resize the shorter side, centre crop."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(size, antialias=True),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(list(mean), list(std)),
        ]
    )


def training_transform(
    augment: AugmentConfig, size: int, channels: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Any], Any] | None:
    """timm's training transform for the config, or None when nothing in it is random."""
    random = augment.crop != "none" or augment.auto_augment or augment.color_jitter
    if not (random or augment.hflip or augment.vflip or augment.erasing):
        return None
    from timm.data import create_transform
    from torchvision import transforms

    common: dict[str, Any] = {
        "input_size": (channels, size, size),
        "is_training": True,
        "hflip": augment.hflip,
        "vflip": augment.vflip,
        "color_jitter": augment.color_jitter or None,
        "auto_augment": augment.auto_augment,
        "re_prob": augment.erasing,
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": "bilinear",
    }
    if augment.crop == "resized":
        return create_transform(scale=augment.scale, **common)
    resize = [transforms.Resize(size, antialias=True), transforms.CenterCrop(size)]
    if augment.crop == "pad":
        resize = [transforms.Resize(size, antialias=True), transforms.RandomCrop(size, augment.padding)]
    # train_crop_mode with a scale of 1 keeps the image: the crop was done above.
    kept = create_transform(scale=(1.0, 1.0), ratio=(1.0, 1.0), **common)
    return transforms.Compose([*resize, kept])


def make_mixup(augment: AugmentConfig, num_classes: int) -> Any:
    """timm's Mixup for the config, or None when it is off."""
    if not augment.mixup and not augment.cutmix:
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )
