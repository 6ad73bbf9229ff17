"""Image transforms: timm's or torchvision's, chosen by `AugmentConfig`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kdcore.errors import InputError

if TYPE_CHECKING:
    from kd_classification.data import AugmentConfig


def evaluation_transform(
    size: int, mean: Sequence[float], std: Sequence[float], resize: str = "crop", crop_pct: float = 1.0
) -> Callable[[Any], Any]:
    """PIL image -> normalised tensor (C, size, size): resize the shorter side to size / crop_pct and take the centre
    (256 and 224 for 0.875), or squash.
    """
    from torchvision import transforms

    return transforms.Compose(
        [*resized(size, resize, crop_pct), transforms.ToTensor(), transforms.Normalize(list(mean), list(std))]
    )


def resized(size: int, resize: str = "crop", crop_pct: float = 1.0) -> list[Any]:
    """The steps that bring a PIL image to size x size without chance; see `evaluation_transform`."""
    from torchvision import transforms

    if resize == "squash":
        return [transforms.Resize((size, size), antialias=True)]
    return [transforms.Resize(math.floor(size / crop_pct), antialias=True), transforms.CenterCrop(size)]


def training_transform(
    augment: AugmentConfig,
    size: int,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    resize_mode: str = "crop",
) -> Callable[[Any], Any] | None:
    """timm's training transform for the config (or torchvision's), or None when nothing in it is random."""
    area = augment.erasing and augment.erasing_area != type(augment)().erasing_area
    if (
        augment.operations
        or _is_affine(augment)
        or area
        or augment.blur
        or augment.posterize
        or augment.crop == "margin"
    ):
        return _torchvision_transform(augment, size, mean, std, resize_mode)
    is_random = augment.crop != "none" or augment.auto_augment or augment.color_jitter
    if not (is_random or augment.hflip or augment.vflip or augment.erasing):
        return None
    from timm.data import create_transform
    from torchvision import transforms

    common: dict[str, Any] = {
        "input_size": (channels, size, size),
        "is_training": True,
        "hflip": augment.hflip,
        "vflip": augment.vflip,
        "color_jitter": tuple(jitter) if isinstance(jitter := augment.color_jitter, list) else jitter or None,
        "auto_augment": augment.auto_augment,
        "re_prob": augment.erasing,
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": augment.interpolation,
    }
    if augment.crop == "resized":
        return create_transform(scale=augment.scale, **common)
    # train_crop_mode with a scale of 1 keeps the image: the crop was done above.
    kept = create_transform(scale=(1.0, 1.0), ratio=(1.0, 1.0), **common)
    return transforms.Compose([*_cropped(augment, size, resize_mode), kept])


def _torchvision_transform(
    augment: AugmentConfig, size: int, mean: Sequence[float], std: Sequence[float], resize: str
) -> Callable[[Any], Any]:
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    if augment.auto_augment:
        raise InputError("augment.auto_augment: a policy of timm; not together with operations, rotation, shear, ...")
    maybe: list[tuple[float, Any]] = [
        (augment.hflip, transforms.RandomHorizontalFlip(augment.hflip)),
        (augment.vflip, transforms.RandomVerticalFlip(augment.vflip)),
        (augment.blur, transforms.RandomApply([transforms.GaussianBlur(3)], augment.blur)),
        (augment.posterize, transforms.RandomPosterize(4, augment.posterize)),
    ]
    steps = _cropped(augment, size, resize)
    if augment.operations:
        steps.append(RandomOperations(augment))
    if _is_affine(augment):
        geometry = {"scale": augment.zoom, "shear": augment.shear or None}
        steps.append(transforms.RandomAffine(augment.rotation, interpolation=InterpolationMode.BILINEAR, **geometry))
    if augment.color_jitter:
        jitter = augment.color_jitter
        steps.append(transforms.ColorJitter(*(jitter if isinstance(jitter, list) else [jitter] * 3)))
    steps += [step for probability, step in maybe if probability]
    steps.append(transforms.ToTensor())
    if augment.erasing:
        steps.append(transforms.RandomErasing(augment.erasing, scale=augment.erasing_area))
    return transforms.Compose([*steps, transforms.Normalize(list(mean), list(std))])


def _is_affine(augment: AugmentConfig) -> bool:
    return bool(augment.rotation or augment.shear or augment.zoom != (1.0, 1.0))


def _cropped(augment: AugmentConfig, size: int, resize: str) -> list[Any]:
    from torchvision import transforms

    if augment.crop == "resized":
        mode = transforms.InterpolationMode(augment.interpolation)
        return [transforms.RandomResizedCrop(size, scale=augment.scale, interpolation=mode, antialias=True)]
    if augment.crop == "margin":
        return [transforms.Resize((size + augment.padding,) * 2, antialias=True), transforms.RandomCrop(size)]
    if augment.crop == "pad":
        return [transforms.Resize(size, antialias=True), transforms.RandomCrop(size, augment.padding)]
    return resized(size, resize)


class RandomOperations:
    """RandAugment with a fixed magnitude M: N different ones of the operations, each with a random sign.

    Colour operations by the factor 1 +- M/30, rotation by +- operation_angle M/30 degrees, translation by +- M % of
    the side along both axes. PIL image -> PIL image.
    """

    def __init__(self, augment: AugmentConfig):
        if augment.operations_drawn > len(set(augment.operations)):
            drawn = f"{augment.operations_drawn} different ones of {len(set(augment.operations))}"
            raise InputError(f"augment.operations_drawn = {augment.operations_drawn}: cannot draw {drawn} operations")
        self.names, self.count = sorted(set(augment.operations)), augment.operations_drawn
        self.magnitude, self.angle = augment.magnitude, augment.operation_angle

    def __call__(self, image: Any) -> Any:
        for name in random.sample(self.names, self.count):
            image = self.apply(name, image, random.choice((-1, 1)))
        return image

    def apply(self, name: str, image: Any, sign: int) -> Any:
        """One operation by its name; `sign` is 1 or -1."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as TF

        strength = sign * self.magnitude / 30
        if name == "rotate":
            return TF.rotate(image, self.angle * strength, interpolation=InterpolationMode.BILINEAR)
        if name == "translate":
            shift = [round(sign * self.magnitude / 100 * side) for side in image.size]
            return TF.affine(image, angle=0, translate=shift, scale=1.0, shear=[0.0])
        return getattr(TF, f"adjust_{name}")(image, 1 + strength)


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
