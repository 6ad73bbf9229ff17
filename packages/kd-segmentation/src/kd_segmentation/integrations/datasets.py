"""Data sets and samplers in mmseg's registry: CamVid, texture mosaics, streams of labelled and unlabelled images."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from zlib import crc32

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import InfiniteSampler
from mmengine.registry import DATA_SAMPLERS
from mmseg.datasets.basesegdataset import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS
from torch.utils.data import Dataset

from kd_segmentation import textures
from kd_segmentation.shifts import CORRUPTIONS, corrupt
from kd_segmentation.splits import check_disjoint
from kdcore.data import mix, seeded
from kdcore.errors import InputError


def expanded(root: str, field: str) -> str:
    """A folder with its environment variables filled in. Raises InputError for an unset one, or no folder."""
    path = os.path.expandvars(os.path.expanduser(root))
    if "$" in path:
        raise InputError(f"{field} = '{root}': the environment variable is not set")
    if not os.path.isdir(path):
        raise InputError(f"{field} = '{root}': no such folder" + (f" ({path})" if path != root else ""))
    return path


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid street scenes: images/<split>/*.jpg and annotations/<split>/*.png with ids 0 to 10; 11, void, is ignored.

    `data_root` may name environment variables. `split` is train, val or test; `ann_file` chooses from it by name.
    """

    METAINFO: ClassVar[dict[str, Any]] = {
        "classes": (
            *("sky", "building", "pole", "road", "pavement", "tree"),
            *("sign", "fence", "car", "pedestrian", "bicyclist"),
        ),
        "palette": [
            *([128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0]),
            *([192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192]),
        ],
    }

    def __init__(self, data_root: str = "$KD_DATA/camvid", split: str = "train", **arguments: Any):
        prefix = {"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"}
        arguments = {"data_prefix": prefix, **arguments}
        super().__init__(data_root=expanded(data_root, "data_root"), **arguments)

    @classmethod
    def get_label_map(cls, new_classes: Sequence[str] | None = None) -> dict[int, int] | None:
        chosen = super().get_label_map(new_classes) or {index: index for index in range(len(cls.METAINFO["classes"]))}
        return {**chosen, 11: 255}


@DATASETS.register_module()
class TextureMosaicDataset(BaseSegDataset):
    """`kd_segmentation.textures` on disk, drawn where they are missing. split: train, val, val_blur, ...

    data_root: a folder of their own; None: in kd's cache. `draw_seed`, `size` and `broad`, the number of images in the
    broad split (None: 800), say which pictures.
    """

    METAINFO: ClassVar[dict[str, Any]] = {
        "classes": textures.CLASSES,
        "palette": [list(colour) for colour in textures.PALETTE],
    }

    def __init__(
        self,
        split: str = "train",
        data_root: str | None = None,
        draw_seed: int = 0,
        size: int = 64,
        broad: int | None = None,
        **arguments: Any,
    ):
        if split not in textures.splits():
            raise InputError(f"split = '{split}': allowed: {', '.join(textures.splits())}")
        if broad is not None and broad < 1:
            raise InputError(f"broad = {broad}: expected a number of images above 0")
        root = Path(data_root) if data_root else textures.default_root(draw_seed, size, broad)
        textures.write(root, seed=draw_seed, size=size, broad=broad)
        prefix = {"img_path": f"img_dir/{split}", "seg_map_path": f"ann_dir/{split}"}
        arguments = {"data_prefix": prefix, "img_suffix": ".png", **arguments}
        super().__init__(data_root=str(root), **arguments)


@DATASETS.register_module()
class StreamDataset(Dataset[dict[str, Any]]):
    """A labelled data set and one or more streams of an unlabelled one, side by side.

    An item is {"labelled": sample, "unlabelled_0": sample, ...}. Its length is that of the larger set, which is read
    in order; every other stream draws its image at random, so that pairs change from pass to pass.
    Raises InputError where the sets share an image.
    """

    def __init__(self, labelled: Mapping[str, Any], unlabelled: Mapping[str, Any], streams: int = 2):
        self.labelled: Any = _built(labelled)
        self.unlabelled: Any = _built(unlabelled)
        self.streams = streams
        if not len(self.labelled) or not len(self.unlabelled):
            raise InputError("labelled, unlabelled: both need at least one image")
        check_disjoint(_paths(self.labelled), _paths(self.unlabelled))

    @property
    def metainfo(self) -> dict[str, Any]:
        return copy.deepcopy(self.labelled.metainfo)

    def full_init(self) -> None:
        self.labelled.full_init()
        self.unlabelled.full_init()

    def __len__(self) -> int:
        return max(len(self.labelled), len(self.unlabelled))

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"labelled": self.labelled[self._place(index, self.labelled)]}
        for stream in range(self.streams):
            place = self._place(index, self.unlabelled) if stream == 0 else _any_of(self.unlabelled)
            item[f"unlabelled_{stream}"] = self.unlabelled[place]
        return item

    def _place(self, index: int, dataset: Any) -> int:
        return index if len(dataset) == len(self) else _any_of(dataset)


def _any_of(dataset: Any) -> int:
    return int(np.random.randint(len(dataset)))


def _built(config: Any) -> Any:
    return DATASETS.build(dict(config)) if isinstance(config, Mapping) else config


def _paths(dataset: Any) -> list[str]:
    return [os.path.abspath(dataset.get_data_info(index)["img_path"]) for index in range(len(dataset))]


@TRANSFORMS.register_module()
class RandomShift(BaseTransform):
    """With probability `prob` one of the shifts of `kd_segmentation.shifts`, at a random strength of its own.

    fixed: what is drawn is a function of the image's name, so that every network is tested on the same pictures.
    """

    def __init__(self, prob: float = 0.5, kinds: Sequence[str] = textures.BROAD, fixed: bool = False):
        unknown = set(kinds) - set(CORRUPTIONS)
        if unknown or not kinds or not 0 <= prob <= 1:
            raise InputError(
                f"RandomShift: prob = {prob}, kinds = {list(kinds)}: expected a probability and some of "
                f"{', '.join(CORRUPTIONS)}"
            )
        self.prob, self.kinds, self.fixed = prob, tuple(kinds), fixed

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        name = Path(results.get("img_path", "")).name.encode()
        rng = np.random.default_rng(crc32(name) if self.fixed else np.random.randint(2**31))
        if rng.uniform() < self.prob:
            kind = self.kinds[rng.integers(len(self.kinds))]
            results["img"] = corrupt(results["img"].astype(np.uint8), kind, rng)
        return results


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
