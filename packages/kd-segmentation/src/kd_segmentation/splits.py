"""Labelled and unlabelled split files: one file name without suffix a line, as mmseg's `ann_file` reads them.

    python -m kd_segmentation.splits IMAGES --share 1/8 --seed 0 --output FOLDER

writes FOLDER/labelled.txt and FOLDER/unlabelled.txt for the images in a folder.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

from kdcore.errors import InputError


def split(names: Iterable[str], share: Fraction | float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Names in (labelled, unlabelled), both sorted; at least one of each. InputError for a share outside (0, 1)."""
    names = sorted(set(names))
    if not 0 < share < 1:
        raise InputError(f"share = {share}: expected a number between 0 and 1, such as 1/8")
    if len(names) < 2:
        raise InputError(f"{len(names)} images: a split needs at least 2")
    count = min(max(1, round(len(names) * share)), len(names) - 1)
    chosen = set(random.Random(seed).sample(names, count))
    return sorted(chosen), [name for name in names if name not in chosen]


def check_disjoint(labelled: Iterable[str], unlabelled: Iterable[str]) -> None:
    """Raises InputError where an image is in both lists; its label would leak into the unlabelled stream."""
    both = sorted(set(labelled) & set(unlabelled))
    if both:
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        raise InputError(f"unlabelled: overlaps the labelled split: {both[0]}{more}")


def write(
    folder: Path, images: Path, share: Fraction, seed: int = 0, suffixes: Sequence[str] = (".jpg", ".png")
) -> None:
    """Writes both files for the images below a folder."""
    if not images.is_dir():
        raise InputError(f"images '{images}': no such folder")
    found = [path for path in images.rglob("*") if path.suffix.lower() in suffixes]
    parts = split((path.relative_to(images).with_suffix("").as_posix() for path in found), share, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in zip(("labelled", "unlabelled"), parts):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kd_segmentation.splits", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--share", type=Fraction, required=True, help="labelled share, for example 1/8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder of the two files")
    given = parser.parse_args(arguments)
    try:
        write(given.output, given.images, given.share, given.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
