"""ConvNet: the network on which data set distillation compares itself; timm has none like it.

`depth` blocks of 3x3 convolution, normalisation, ReLU and 2x2 average pooling, all of one width, then one linear layer
on the flattened map (Gidaris and Komodakis, arXiv 1804.09458; as in Zhao et al., arXiv 2006.05929). Instance
normalisation has no running statistics: its weights alone are the network, so that trajectories and interpolations of
weights are well defined. After `register`, `timm.create_model("dd_convnet", num_classes=10, img_size=32)` makes one.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from kdcore.errors import InputError

Norm = Literal["instance", "group", "batch", "none"]
NAME = "dd_convnet"


def _norm(kind: Norm, width: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(width)
    groups = {"instance": width, "group": 4}.get(kind)
    return nn.Identity() if groups is None else nn.GroupNorm(groups, width)


class ConvNet(nn.Module):
    """Images (B, in_chans, img_size, img_size) -> logits (B, num_classes), with timm's two-step forward.

    The pre-logits feature is the flattened last map: `head_hidden_size` = width * side^2 numbers. Single-channel images
    of 28 pixels are padded to 32 by the first convolution, as the field does for MNIST.

    Raises InputError for an image too small for the depth.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
        width: int = 128,
        depth: int = 3,
        norm: Norm = "instance",
    ):
        super().__init__()
        if norm not in ("instance", "group", "batch", "none"):
            raise InputError(f"{NAME}: norm = {norm!r}; allowed: instance, group, batch, none")
        padded = in_chans == 1 and img_size == 28
        side = (32 if padded else img_size) >> depth
        if side < 1:
            raise InputError(f"{NAME}: depth = {depth} halves an image of {img_size} pixels to nothing")
        layers: list[nn.Module] = []
        for block in range(depth):
            before, padding = (in_chans, 3 if padded else 1) if block == 0 else (width, 1)
            layers += [nn.Conv2d(before, width, 3, padding=padding), _norm(norm, width)]
            layers += [nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * side * side, num_classes)
        self.num_classes, self.num_features, self.in_chans = num_classes, width, in_chans
        self.head_hidden_size = width * side * side
        size = (in_chans, img_size, img_size)
        self.pretrained_cfg = {"input_size": size, "num_classes": num_classes, "classifier": "classifier"}

    def forward_features(self, images: Tensor) -> Tensor:
        return self.features(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        flat = features.flatten(1)
        return flat if pre_logits else self.classifier(flat)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        return self.classifier


def dd_convnet(pretrained: bool = False, **arguments: Any) -> ConvNet:
    """timm's entry point of `ConvNet`; there are no pretrained weights."""
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        arguments.pop(name, None)
    return ConvNet(**arguments)


def register() -> None:
    """Makes `dd_convnet` a name of `timm.create_model` in this process."""
    import timm
    from timm.models import register_model

    if not timm.is_model(NAME):
        register_model(dd_convnet)
