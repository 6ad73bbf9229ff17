"""Puts the package's losses and distillers into mmseg's registry, under their class names."""

from __future__ import annotations

import importlib

from mmseg.registry import MODELS

from kd_segmentation.engine.cps import CPS
from kd_segmentation.engine.losses import LOSSES
from kd_segmentation.engine.tapped import TappedDistiller
from kdcore.distiller import Distiller

METHODS = ("cwd", "mgd", "gkd")
"""Modules of `kd_segmentation.methods` whose distillers configs may name."""


def register() -> None:
    """Registers every loss and distiller once."""
    classes = [*LOSSES.values(), TappedDistiller, CPS]
    for key in METHODS:
        module = importlib.import_module(f"kd_segmentation.methods.{key}")
        classes += [
            item
            for item in vars(module).values()
            if isinstance(item, type) and issubclass(item, Distiller) and item.__module__ == module.__name__
        ]
    for item in classes:
        if MODELS.get(item.__name__) is None:
            MODELS.register_module(module=item)
