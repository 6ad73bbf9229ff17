"""Puts the package's distillers into mmdet3d's registry, under their class names."""

from __future__ import annotations

import importlib

from mmdet3d.registry import MODELS

from kd_detection3d.engine.supervised import Supervised
from kdcore.distiller import Distiller

METHODS = ("unidistill",)
"""Modules of `kd_detection3d.methods` whose distillers configs may name."""


def register() -> None:
    """Registers every distiller once."""
    classes: list[type] = [Supervised]
    for key in METHODS:
        module = importlib.import_module(f"kd_detection3d.methods.{key}")
        classes += [
            item
            for item in vars(module).values()
            if isinstance(item, type) and issubclass(item, Distiller) and item.__module__ == module.__name__
        ]
    for item in classes:
        if item.__name__ not in MODELS.module_dict:
            MODELS.register_module(module=item)
