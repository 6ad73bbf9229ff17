"""`mmcv._ext` where mmcv came without compiled operators (mmcv-lite): its names answer, calls need a replacement.

`mmcv.ops` asks the extension for its functions by name when it is imported, and mmseg imports it. `provide` puts a
module in its place before that, so that everything which does not call a compiled operator works. A compiled extension
is never touched.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAME = "mmcv._ext"
REPLACEMENTS = "kd_replacements"  # attribute of a stand-in: name of an operator -> function; packages may share one


class StandIn(ModuleType):
    """A module in which every name is a function; one without a replacement raises when it is called."""

    def __init__(self) -> None:
        super().__init__(NAME, __doc__)
        self.__spec__ = ModuleSpec(NAME, None)
        setattr(self, REPLACEMENTS, {})

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        found = self.__dict__[REPLACEMENTS].get(name)
        return found if found is not None else _missing(name)


def _missing(name: str) -> Callable[..., Any]:
    def operator(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"mmcv operator '{name}' is not compiled and has no replacement here; install mmcv with its operators "
            "(`pip install mmcv==2.1.0` with a compiler) in the place of mmcv-lite, or choose a network without it"
        )

    operator.__name__ = name
    return operator


def provide(replacements: Mapping[str, Callable[..., Any]] | None = None) -> bool:
    """Makes `mmcv.ops` importable; returns whether the operators are a stand-in.

    `replacements` are added to those of a stand-in, also to one that another package made.
    """
    module = sys.modules.get(NAME)
    if module is None:
        import mmcv

        if importlib.util.find_spec(NAME) is not None:
            return False
        module = sys.modules[NAME] = StandIn()
        mmcv._ext = module
    known = getattr(module, REPLACEMENTS, None)
    if not isinstance(known, dict):
        return False
    known.update(replacements if replacements is not None else OPERATORS)
    return True


# ---------------------------------------------------------------- replacements


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, *, im2col_step: int = 64
) -> Tensor:
    """Multi-scale deformable attention by torch's grid_sample; Mask2Former's pixel decoder calls it on a GPU.

    value (B, keys, heads, D), shapes (levels, 2) as (h, w), locations (B, queries, heads, levels, points, 2) in [0, 1],
    weights (B, queries, heads, levels, points) -> (B, queries, heads * D). `starts` follows from `shapes`.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    gradient: Tensor,
    to_value: Tensor,
    to_locations: Tensor,
    to_weights: Tensor,
    *,
    im2col_step: int = 64,
) -> None:
    """Gradients of `ms_deform_attn_forward`, written into the last three tensors."""
    inputs = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(inputs[0], shapes, starts, inputs[1], inputs[2])
    for target, found in zip((to_value, to_locations, to_weights), torch.autograd.grad(output, inputs, gradient)):
        target.copy_(found)


OPERATORS = {
    "ms_deform_attn_forward": ms_deform_attn_forward,
    "ms_deform_attn_backward": ms_deform_attn_backward,
}
