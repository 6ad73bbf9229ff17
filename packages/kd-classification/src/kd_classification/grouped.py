"""Sources whose images belong to groups (patients): a CSV table, and textures cut from tiles."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kd_classification.sources import IMAGENET_MEAN, IMAGENET_STD, Source, Split, check_readable, expanded, image_tensor
from kdcore.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from kd_classification.data import DataConfig, TableConfig


# ---------------------------------------------------------------- a table of image files


def csv_table(config: DataConfig) -> Source:
    """`data.table`: a CSV file with columns for image path, class name and patient, under the folder `data.root`.

    Paths are matched without regard to case where they do not match exactly. Raises InputError that names the file,
    the line and the column of what is wrong.
    """
    table, root = config.table, config.folder
    if table is None:
        raise InputError("data.table: required for data.name = 'csv'")
    path = root / expanded(table.file, "data.table.file")
    rows = _rows(path, table)
    names = [row[table.label] for _, row in rows]
    classes = table.classes or sorted(set(names))
    labels = []
    for (line, _), name in zip(rows, names, strict=True):
        if name not in classes:
            raise InputError(
                f"{path}, line {line}: '{table.label}' = '{name}' is no class{did_you_mean(name, classes)}"
            )
        labels.append(classes.index(name))
    finder = _Finder(root)
    paths = [finder.find(row[table.image], f"{path}, line {line}") for line, row in rows]
    check_readable(paths)
    groups = None if table.group is None else np.array([row[table.group] for _, row in rows])
    split = Split(np.asarray(labels, dtype=np.int64), None, paths, groups=groups)
    return Source(split, None, list(classes), 224, 3, IMAGENET_MEAN, IMAGENET_STD)


def _rows(path: Path, table: TableConfig) -> list[tuple[int, dict[str, str]]]:
    """(line, row) of the rows that are kept, every needed cell filled."""
    wanted = [table.image, table.label, *([table.group] if table.group else []), *(table.equal or ())]
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            for column in wanted:
                if column not in columns:
                    raise InputError(f"{path}: no column '{column}'{did_you_mean(column, columns)}")
            rows = [(reader.line_num, _cells(row, wanted, path, reader.line_num)) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data.table.file {path}: not a readable CSV file ({error})") from None
    if table.equal is not None:
        left, right = table.equal
        rows = [(line, row) for line, row in rows if row[left] == row[right]]
    if not rows:
        agree = f" whose '{table.equal[0]}' and '{table.equal[1]}' agree" if table.equal else ""
        raise InputError(f"{path}: it has no rows{agree}")
    return rows


def _cells(row: Mapping[str, str | None], wanted: Sequence[str], path: Path, line: int) -> dict[str, str]:
    cells = {column: (row[column] or "").strip() for column in wanted}
    empty = [column for column, value in cells.items() if not value]
    if empty:
        raise InputError(f"{path}, line {line}: column '{empty[0]}' is empty")
    return cells


class _Finder:
    """Finds files below a folder, by their exact name or else without regard to case."""

    def __init__(self, root: Path):
        self.root, self.listings = root, {}

    def find(self, relative: str, where: str) -> Path:
        path = self.root / relative.replace("\\", "/")
        if path.is_file():
            return path
        found = self.root
        for part in Path(relative.replace("\\", "/")).parts:
            found = found / self._listing(found).get(part.lower(), part)
        if not found.is_file():
            raise InputError(f"{where}: no image file {path}")
        return found

    def _listing(self, folder: Path) -> dict[str, str]:
        if folder not in self.listings:
            names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
            self.listings[folder] = {name.lower(): name for name in names}
        return self.listings[folder]


# ---------------------------------------------------------------- embedded textures

TEXTURES = {"brick": 12, "grass": 6, "gravel": 3}
"""Texture -> patches cut from each of its tiles: an imbalanced set."""


def textures(config: DataConfig, *, tile: int = 64, side: int = 16, noise: float = 0.6) -> Source:
    """Noisy patches of the brick, grass and gravel photographs that ship with scikit-image; nothing to download.

    Each photograph (512x512, grey) is cut into 64 tiles of 64x64 pixels, a tile being a "patient": 12, 6 or 3 patches
    of 16x16 at random places in it, which overlap, each with Gaussian noise of 0.6 times the patch's deviation. 1344
    images; the same ones on every call.
    """
    from skimage import data as photographs

    generator = np.random.default_rng(20)
    patches, labels, groups = [], [], []
    for label, (name, count) in enumerate(TEXTURES.items()):
        photograph = getattr(photographs, name)().astype(np.float64)
        for top in range(0, photograph.shape[0], tile):
            for left in range(0, photograph.shape[1], tile):
                for y, x in generator.integers(0, tile - side + 1, (count, 2)):
                    patch = photograph[top + y : top + y + side, left + x : left + x + side]
                    patches.append(patch + noise * patch.std() * generator.standard_normal(patch.shape))
                    labels.append(label)
                    groups.append(f"{name}-{top // tile}-{left // tile}")
    images = np.clip(np.round(np.stack(patches)), 0, 255).astype(np.uint8)
    mean, std = float(images.mean() / 255), float(images.std() / 255)
    split = Split(np.array(labels, dtype=np.int64), image_tensor(images), channels=1, groups=np.array(groups))
    return Source(split, None, list(TEXTURES), side, 1, [round(mean, 4)], [round(std, 4)])
