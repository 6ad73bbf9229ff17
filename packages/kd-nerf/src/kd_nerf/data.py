"""Photographs with cameras: the embedded scene, and folders in Blender's or nerfstudio's format.

nerfstudio's own parsers read all of them; this module says which one, checks that the files are there, and gives plain
tensors to whoever needs no nerfstudio.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from kd_nerf.scene import SceneConfig, provide_scene
from kdcore.config import Config
from kdcore.errors import InputError

SCENE = "scene"
"""Folder of the embedded scene inside a run."""


class DataConfig(Config):
    name: Literal["scene", "blender", "nerfstudio"] = Field(
        "scene", description="scene: rendered here; else the format of the folder `root`"
    )
    root: str | None = Field(None, description="folder of the photographs; $VARIABLES are expanded")
    scene: SceneConfig = Field(default_factory=SceneConfig, description="the embedded scene's views")
    scale: float = Field(1.0, gt=0, le=1, description="factor on the size of the photographs")
    eval_interval: int = Field(8, ge=2, description="nerfstudio: every n-th photograph is for evaluation")
    scene_scale: float = Field(1.0, gt=0, description="nerfstudio: half the side of the box, cameras within 1")
    near: float = Field(0.2, ge=0, description="where rays start, in world units")
    far: float = Field(1000.0, gt=0, description="where rays end; they also do at the box")

    @model_validator(mode="after")
    def _has_a_root(self) -> DataConfig:
        if self.name != "scene" and self.root is None:
            raise ValueError(f"name = '{self.name}' needs root, the folder of the photographs")
        if self.name == "scene" and self.root is not None:
            raise ValueError("root: name = 'scene' takes none; give name: blender or nerfstudio")
        if self.near >= self.far:
            raise ValueError(f"near = {self.near}: must be below far = {self.far}")
        return self


def folder_of(config: DataConfig, run: Path) -> Path:
    """Where the photographs lie; the embedded scene is rendered into the run. InputError where files are missing."""
    if config.name == "scene":
        return provide_scene(run / SCENE, config.scene)
    return existing_root(config)


def existing_root(config: DataConfig) -> Path:
    """The folder `root`, whose file of cameras is there."""
    text = os.path.expandvars(config.root or "")
    if "$" in text:
        raise InputError(f"data.root = '{config.root}': the environment variable is not set")
    root = Path(text)
    names = ("transforms_train.json", "transforms_test.json") if config.name == "blender" else ("transforms.json",)
    for name in names:
        if not (root / name).is_file():
            what = f"has no {name}" if root.is_dir() else "no such folder"
            raise InputError(f"data.root = '{config.root}': {what}; expected the {config.name} format")
    return root


def parser_config(config: DataConfig, folder: Path) -> Any:
    """nerfstudio's data parser for the folder."""
    if config.name == "nerfstudio":
        from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

        return NerfstudioDataParserConfig(
            data=folder,
            downscale_factor=1,
            center_method="focus",  # random cameras look at the origin
            scene_scale=config.scene_scale,
            eval_mode="interval",
            eval_interval=config.eval_interval,
        )
    from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig

    return BlenderDataParserConfig(data=folder)


@dataclass
class Views:
    """Photographs of a split: nerfstudio's cameras, pictures (H, W, 3) in [0, 1], and the scene box."""

    cameras: Any
    images: list[Any]
    scene_box: Any


def views(config: DataConfig, folder: Path, split: str = "test") -> Views:
    """What nerfstudio's parser and data set make of a split of the folder."""
    from nerfstudio.data.datasets.base_dataset import InputDataset

    outputs = parser_config(config, folder).setup().get_dataparser_outputs(split=split)
    dataset = InputDataset(outputs, scale_factor=config.scale)
    images = [dataset.get_image_float32(index) for index in range(len(dataset))]
    return Views(dataset.cameras, images, dataset.scene_box)
