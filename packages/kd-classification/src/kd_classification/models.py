"""Teachers and students by timm name; saved and loaded in timm's own format.

A saved model is a folder with `model.safetensors` and `config.json` that stock timm opens:

    timm.create_model("local-dir:runs/x/student")
    timm.create_model("resnet18", num_classes=10, checkpoint_path="runs/x/student/model.safetensors")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kd_classification.data import Data
from kdcore.checkpoint import load_weights
from kdcore.config import Config
from kdcore.errors import InputError, did_you_mean


class ModelConfig(Config):
    """A timm model. `args` are keyword arguments of timm's factory (channels, layers, img_size, drop_rate ...)."""

    name: str = Field(description="timm model name, as in timm.list_models()")
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for timm.create_model")
    pretrained: bool = Field(False, description="start from timm's pretrained weights (needs its hub or cache)")
    checkpoint: str | None = Field(None, description="start from a saved folder, a .safetensors or a .pth file")
    input_size: int | None = Field(None, ge=4, description="side the model wants; images are resized to it")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="how they are resized to input_size")
    mean: list[float] | None = Field(None, description="normalisation the model wants; None is that of the data")
    std: list[float] | None = Field(None, description="normalisation the model wants; None is that of the data")


def create_model(config: ModelConfig, data: Data, *, field: str, num_classes: int | None = None) -> nn.Module:
    """The timm model of a config for the data's channels and classes. InputError names `field` and what is wrong."""
    import timm

    classes = data.num_classes if num_classes is None else num_classes
    if config.checkpoint is not None and Path(config.checkpoint).is_dir():
        return load_model(Path(config.checkpoint), num_classes=classes, channels=data.channels, field=field)
    if not timm.is_model(config.name):
        architecture = config.name.split(".")[0]
        known = timm.list_models() if not timm.is_model(architecture) else timm.list_pretrained(f"{architecture}.*")
        raise InputError(f"{field}.name = '{config.name}': not a timm model{_near(architecture, known)}")
    try:
        model = timm.create_model(
            config.name, pretrained=config.pretrained, num_classes=classes, in_chans=data.channels, **config.args
        )
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise InputError(f"{field}.args = {config.args}: timm refuses them for {config.name} ({error})") from None
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise
        raise InputError(f"{field}.pretrained: the weights of {config.name} cannot be had ({error})") from None
    if config.checkpoint is not None:
        load_into(model, Path(config.checkpoint), field=field)
    return model


def _near(name: str, known: Sequence[str]) -> str:
    hint = did_you_mean(name, known)
    return hint if len(hint) < 200 else "; see timm.list_models()"


def load_into(model: nn.Module, path: Path, *, field: str = "checkpoint") -> None:
    """Loads weights (safetensors, or a .pth read with weights_only) that must fit exactly."""
    if path.suffix == ".safetensors":
        state = load_weights(path)
    else:
        if not path.is_file():
            raise InputError(f"{field}.checkpoint = {path}: no such file")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # its messages are paragraphs about how to load an untrusted file all the same
            raise InputError(
                f"{field}.checkpoint = {path}: not a checkpoint of plain tensors; no other is read"
            ) from None
        state = state.get("state_dict", state) if isinstance(state, dict) else state
    own = model.state_dict()
    if not isinstance(state, dict):
        raise InputError(f"{field}.checkpoint = {path}: holds {type(state).__name__}, expected a state dict")
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)}, the model wants {tuple(own[wrong[0]].shape)}"
        raise InputError(f"{field}.checkpoint = {path}: '{wrong[0]}' is {shapes}")
    if missing or extra:
        named = f"lacks '{missing[0]}'" if missing else f"has '{extra[0]}' besides"
        raise InputError(f"{field}.checkpoint = {path}: weights of another architecture ({named})")
    model.load_state_dict(state)


def save_model(model: nn.Module, folder: Path, data: Data) -> None:
    """Writes timm's folder format: model.safetensors and config.json with everything needed to build the model.

    Of an `Adapted` network what is inside is written.
    """
    from timm.models import save_for_hf

    save_for_hf(
        model.model if isinstance(model, Adapted) else model,
        str(folder),
        model_config={"label_names": list(data.class_names)},
        data_config={
            "input_size": (data.channels, data.image_size, data.image_size),
            "mean": tuple(data.mean),
            "std": tuple(data.std),
        },
        safe_serialization=True,
    )


def load_model(
    folder: Path, *, num_classes: int | None = None, channels: int | None = None, field: str = "model"
) -> nn.Module:
    """A model that `save_model` wrote, by stock timm. InputError on a broken folder or other classes or channels."""
    import timm

    weights = folder / "model.safetensors"
    load_weights(weights)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"{field}.checkpoint = {folder}: timm cannot open it ({error})") from None
    if num_classes is not None and model.num_classes != num_classes:
        raise InputError(
            f"{field}.checkpoint = {folder}: it tells {model.num_classes} classes apart, the data has {num_classes}"
        )
    found = getattr(model, "in_chans", None) or model.pretrained_cfg["input_size"][0]
    if channels is not None and found != channels:
        raise InputError(f"{field}.checkpoint = {folder}: it takes {found} channels, the data has {channels}")
    return model


class Adapted(nn.Module):
    """A model behind images that were normalised (and sized) for another one: undoes that and does its own.

    Keeps timm's `forward_features` / `forward_head`, so that feature methods see through it.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        own_mean: Sequence[float] | None = None,
        own_std: Sequence[float] | None = None,
        size: int | None = None,
        interpolation: str = "bilinear",
    ):
        super().__init__()
        self.model, self.size, self.interpolation = model, size, interpolation
        given_mean, given_std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        wanted_mean, wanted_std = (
            torch.tensor(values).view(1, -1, 1, 1) for values in (own_mean or mean, own_std or std)
        )
        self.register_buffer("scale", given_std / wanted_std, persistent=False)
        self.register_buffer("shift", (given_mean - wanted_mean) / wanted_std, persistent=False)

    def adapt(self, images: Tensor) -> Tensor:
        """Images in the other model's normalisation and size -> in this model's."""
        if self.size is not None and images.shape[-1] != self.size:
            images = interpolate(images, (self.size, self.size), mode=self.interpolation, antialias=True)
        return images * self.scale + self.shift

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.adapt(images))

    def forward_features(self, images: Tensor) -> Tensor:
        return self.model.forward_features(self.adapt(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(features, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        return self.model.get_classifier()


def adapted(model: nn.Module, data: Data, config: ModelConfig, *, field: str = "teacher") -> nn.Module:
    """`model` itself, or `Adapted` when its config asks for another normalisation or size than the data's."""
    for name in ("mean", "std"):
        values = getattr(config, name)
        if values is not None and len(values) != data.channels:
            raise InputError(f"{field}.{name} = {values}: {len(values)} values for {data.channels} channels")
    same = (config.mean or data.mean) == data.mean and (config.std or data.std) == data.std
    if same and config.input_size in (None, data.image_size):
        return model
    own = {"own_mean": config.mean, "own_std": config.std, "size": config.input_size}
    return Adapted(model, data.mean, data.std, **own, interpolation=config.interpolation)


def penultimate(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(features, logits): the pooled feature (B, D) right before the classifier, and the logits (B, K)."""
    features = model.forward_features(images)
    return model.forward_head(features, pre_logits=True), model.forward_head(features)


def feature_width(model: nn.Module) -> int:
    """D of `penultimate`: timm's head width, which differs from num_features in MobileNet-type heads."""
    inner = model.model if isinstance(model, Adapted) else model
    return int(getattr(inner, "head_hidden_size", None) or inner.num_features)
