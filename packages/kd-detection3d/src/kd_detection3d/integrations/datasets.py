"""Data sets and samplers in mmdet3d's registry: KITTI and nuScenes folders that are checked, rendered scenes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmdet3d.datasets import KittiDataset
from mmdet3d.registry import DATA_SAMPLERS, DATASETS
from mmengine.dataset import InfiniteSampler
from torch.utils.data import Dataset

from kd_detection3d import scenes
from kdcore.data import mix, seeded
from kdcore.errors import InputError


def checked(section: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A data set's config with environment variables filled in. Raises InputError: one is unset, a file is missing."""
    found = dict(section)
    if isinstance(found.get("dataset"), Mapping):  # CBGSDataset, RepeatDataset
        found["dataset"] = checked(found["dataset"], f"{field}.dataset")
        return found
    if "data_root" not in found or found.get("data_root") is None:
        return found
    found["data_root"] = root = expanded(str(found["data_root"]), f"{field}.data_root")
    info = found.get("ann_file")
    if info and not os.path.isfile(os.path.join(root, info)):
        raise InputError(
            f"{field}.ann_file = '{info}': no such info file in {root}; mmdet3d's create_data.py writes it"
        )
    return found


def expanded(root: str, field: str) -> str:
    """A folder with its environment variables filled in. Raises InputError for an unset one, or no folder."""
    path = os.path.expandvars(os.path.expanduser(root))
    if "$" in path:
        raise InputError(f"{field} = '{root}': the environment variable is not set")
    if not os.path.isdir(path):
        raise InputError(f"{field} = '{root}': no such folder" + (f" ({path})" if path != root else ""))
    return path


@DATASETS.register_module()
class RenderedScenes(KittiDataset):
    """`kd_detection3d.scenes` on disk as a KITTI data set, drawn where they are missing. split: train or val.

    data_root: a folder of their own; None: in kd's cache. `draw_seed` says which scenes.
    """

    def __init__(self, split: str = "train", data_root: str | None = None, draw_seed: int = 0, **arguments: Any):
        if split not in scenes.COUNTS:
            raise InputError(f"split = '{split}': allowed: {', '.join(scenes.COUNTS)}")
        root = scenes.write(Path(data_root) if data_root else scenes.default_root(draw_seed), seed=draw_seed)
        prefix = {"pts": "training/velodyne", "img": "training/image_2"}
        defaults = {
            "data_prefix": prefix,
            "modality": {"use_lidar": True, "use_camera": True},
            "metainfo": {"classes": list(scenes.CLASSES)},
            "pcd_limit_range": list(scenes.RANGE),
        }
        super().__init__(data_root=str(root), ann_file=f"kitti_infos_{split}.json", **{**defaults, **arguments})


def _built(config: Any) -> Any:
    return DATASETS.build(dict(config)) if isinstance(config, Mapping) else config


# ---------------------------------------------------------------- order and augmentation by the seed alone


@DATASETS.register_module()
class SeededSamples(Dataset[Any]):
    """A data set read by (pass, index): the randomness of a sample is a function of (seed, pass, index)."""

    def __init__(self, dataset: Mapping[str, Any], seed: int = 0):
        self.dataset: Any = _built(dataset)
        self.seed = seed

    @property
    def metainfo(self) -> dict[str, Any]:
        return getattr(self.dataset, "metainfo", {})

    def full_init(self) -> None:
        if hasattr(self.dataset, "full_init"):
            self.dataset.full_init()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with seeded(mix(self.seed, *key)):
            return self.dataset[key[1]]


@DATA_SAMPLERS.register_module()
class SeededInfiniteSampler(InfiniteSampler):
    """InfiniteSampler that yields (pass, index) for SeededSamples, from item `start` on."""

    def __init__(self, dataset: Any, shuffle: bool = True, seed: int = 0, start: int = 0):
        super().__init__(dataset, shuffle, seed)
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield from itertools.islice(self._keys(), self.rank + self.start * self.world_size, None, self.world_size)

    def _keys(self) -> Iterator[tuple[int, int]]:
        for turn in itertools.count():
            if self.shuffle:
                generator = torch.Generator().manual_seed(mix(self.seed, turn))
                order = torch.randperm(self.size, generator=generator).tolist()
            else:
                order = list(range(self.size))
            for index in order:
                yield turn, index
