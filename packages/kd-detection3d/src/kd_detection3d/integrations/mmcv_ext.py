"""`mmcv._ext` where mmcv came without compiled operators (mmcv-lite): ours in torch, and a clear error for the rest.

`mmcv.ops` and mmdet3d ask the extension for its functions by name when they are imported. `provide` puts a module in
its place before that. A compiled extension is never touched, and neither is KITTI's evaluation where a GPU runs it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from kd_detection3d.engine import ops

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

        def operator(*args: Any, **kwargs: Any) -> Any:
            # Looked up when it is called: another package may have added it after mmcv.ops was imported.
            found = self.__dict__[REPLACEMENTS].get(name)
            return found(*args, **kwargs) if found is not None else _missing(name)

        operator.__name__ = name
        return operator


def _missing(name: str) -> Any:
    raise NotImplementedError(
        f"mmcv operator '{name}' is not compiled and has no replacement here; install mmcv with its operators "
        "(`pip install mmcv==2.1.0` with a compiler) in the place of mmcv-lite, or choose a network without it"
    )


def provide(replacements: Mapping[str, Callable[..., Any]] = ops.OPERATORS) -> bool:
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
    known.update(replacements)
    return True


def rotate_iou(boxes: Any, query: Any, criterion: int = -1, device_id: int = 0) -> Any:
    """What mmdet3d's KITTI evaluation computes on a GPU: (N, 5), (K, 5) -> (N, K) float32 array.

    Boxes are x, z, dx, dz, angle in the camera's frame, the angle clockwise. criterion -1: over the union, 0: over the
    query's area, 1: over the box's area, 2: the intersection itself.
    """
    turn = torch.tensor([1, 1, 1, 1, -1])
    first, second = (torch.as_tensor(item[:, :5]).double() * turn for item in (boxes, query))
    if criterion == 2:
        found = ops.pairwise_intersection(first, second)
    else:
        found = ops.rotated_iou(first, second, over={-1: "union", 0: "second", 1: "first"}[criterion])
    return found.float().numpy()


def provide_kitti_evaluation() -> None:
    """mmdet3d's KITTI evaluation on machines without CUDA."""
    if torch.cuda.is_available():
        return
    import mmdet3d.evaluation.functional.kitti_utils as utils

    name = f"{utils.__name__}.rotate_iou"
    module = ModuleType(name, rotate_iou.__doc__)
    module.__dict__["rotate_iou_gpu_eval"] = rotate_iou
    # The evaluation imports it inside its functions; the original compiles CUDA kernels when it is imported.
    sys.modules[name] = module
    utils.rotate_iou = module
