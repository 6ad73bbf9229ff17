"""Pictures as data URIs: a PNG encoder on zlib alone, so that kdcore needs no imaging library.

PNG (ISO/IEC 15948): signature, then chunks `length | type | data | CRC-32(type + data)`; IHDR holds width, height,
bit depth and colour type; IDAT holds the zlib stream of the rows, each led by its filter byte (0: none).
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np

_COLOUR_TYPE = {1: 0, 3: 2, 4: 6}  # channels -> grey, RGB, RGBA


def png(image: np.ndarray) -> bytes:
    """A PNG file.

    Args:
        image: uint8, (H, W) or (H, W, 1) grey, (H, W, 3) RGB, (H, W, 4) RGBA.

    Raises:
        ValueError: another dtype or shape, or an empty image.
    """
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in _COLOUR_TYPE or 0 in pixels.shape:
        raise ValueError(
            f"image: expected uint8 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"got {pixels.dtype} of shape {np.shape(image)}"
        )
    height, width, channels = pixels.shape
    rows = np.zeros((height, 1 + width * channels), dtype=np.uint8)
    rows[:, 1:] = pixels.reshape(height, width * channels)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPE[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def shrink(image: np.ndarray, limit: int = 256) -> np.ndarray:
    """The image with its longer side at most about `limit`, by the mean of k x k blocks; smaller ones unchanged."""
    block = -(-max(image.shape[:2]) // limit)
    if block <= 1:
        return image
    height, width = (max(1, side // block) * block for side in image.shape[:2])
    height, width = min(height, image.shape[0]), min(width, image.shape[1])
    rows, columns = min(block, height), min(block, width)
    cut = image[:height, :width].reshape(height // rows, rows, width // columns, columns, *image.shape[2:])
    return np.rint(cut.astype(np.float64).mean(axis=(1, 3))).astype(np.uint8)


def data_uri(image: Any, limit: int = 256) -> str:
    """The picture as `data:image/png;base64,...`, its longer side at most `limit`; ValueError as in `png`."""
    pixels = np.asarray(image)
    if pixels.dtype == np.uint8 and pixels.ndim in (2, 3) and 0 not in pixels.shape:
        pixels = shrink(pixels, limit)
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")
