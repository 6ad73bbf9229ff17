"""IDX files (MNIST and its relatives): big-endian header, then unsigned bytes; gzipped or not."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from kdcore.errors import InputError


def idx_files(folder: Path, prefix: str) -> tuple[Path, Path] | None:
    """`<prefix>-images-idx3-ubyte` and `<prefix>-labels-idx1-ubyte` (.gz or not), or None where one is missing."""
    images, labels = (
        next((p for p in (folder / f"{prefix}-{kind}", folder / f"{prefix}-{kind}.gz") if p.is_file()), None)
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    return (images, labels) if images is not None and labels is not None else None


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped or not. Raises InputError that names a broken file."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise InputError(f"data file {path}: not a readable IDX file ({error})") from None
    if zeros != 0 or kind != 8 or values.size != np.prod(shape):
        raise InputError(f"data file {path}: not an IDX file of unsigned bytes with the size its header gives")
    return values.reshape(shape).copy()
