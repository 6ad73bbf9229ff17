"""Parameter groups: layer-wise learning rates over timm's own grouping of layers, and what weight decay spares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from kdcore.errors import InputError


def stage_param_groups(model: nn.Module, scales: Sequence[float], *, field: str = "lr_scales") -> list[dict[str, Any]]:
    """Groups `{"params", "lr_scale"}` for `kdcore.distiller.Player`: `scales` from the stem to the last stage, head 1.

    One factor a stage where there are as many factors as stages, the stem counted (ResNet: 5). Otherwise the blocks are
    split in order into len(scales) runs of equal length: the stem goes with the first, what is left over with the
    last (MobileNetV3-large: 15 blocks, 5 factors, 3 blocks each). Parameters without gradient are left out.

    Published factors for networks distilled by SSLD (its documentation, section 4.1): ResNet50 .1 .1 .2 .2 .3,
    for detection .05 .05 .05 .1 .15; MobileNetV3 .25 .25 .5 .5 .75.

    Raises InputError for a network that timm cannot group, a negative factor, or more factors than blocks.
    """
    if not scales or min(scales) < 0:
        raise InputError(f"{field} = {list(scales)}: expected one or more factors, none below 0")
    layers = _layers(model, coarse=True, field=field)
    if len(layers) - 1 == len(scales):
        body, head = layers[:-1], layers[-1]
        owners = list(range(len(scales)))
    else:
        *body, head = _layers(model, coarse=False, field=field)
        length = (len(body) - 1) // len(scales)
        if length == 0:
            raise InputError(f"{field} = {list(scales)}: {len(scales)} factors for {len(body) - 1} blocks")
        owners = [0] + [min(block // length, len(scales) - 1) for block in range(len(body) - 1)]
    members: list[list[nn.Parameter]] = [[] for _ in scales]
    for layer, owner in zip(body, owners, strict=True):
        members[owner] += layer
    groups = [{"params": params, "lr_scale": scale} for params, scale in zip(members, scales)]
    return [group for group in [*groups, {"params": head, "lr_scale": 1.0}] if group["params"]]


def weight_decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Groups for `kdcore.distiller.Player`: biases, norms and other vectors without weight decay, the rest with it."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    spared = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _layers(model: nn.Module, *, coarse: bool, field: str) -> list[list[nn.Parameter]]:
    """Trainable parameters of stem, stages (coarse) or blocks, and head, in the order of the forward pass."""
    from timm.models import group_parameters

    if not hasattr(model, "group_matcher"):
        raise InputError(f"{field}: {type(model).__name__} has no group_matcher; it is not a timm network with layers")
    parameters = dict(model.named_parameters())
    names = group_parameters(model, model.group_matcher(coarse=coarse))
    return [[parameters[n] for n in names[key] if parameters[n].requires_grad] for key in sorted(names)]
