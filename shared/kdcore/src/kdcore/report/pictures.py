"""Rows of pictures under named columns, such as one noise through teacher and student, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcore.report.images import data_uri, shrink
from kdcore.report.tables import scroll
from kdcore.report.text import esc

SIDE = 112  # CSS pixels that the shorter side of a picture is drawn at, about
LIMIT = 128  # pixels of the shorter side that are kept


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, and the size in CSS pixels that it is drawn at."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Row:
    """One row: what it shows, an empty string where there is nothing to say, and its pictures by column."""

    caption: str
    pictures: dict[str, Picture]


def pictures(items: Sequence[Mapping[str, Any]]) -> str:
    """The table as HTML, from what `predict` gave. Raises ValueError, with row and column, on another form."""
    rows = [_row(item, f"row {number}") for number, item in enumerate(items, start=1)]
    columns = list(dict.fromkeys(column for row in rows for column in row.pictures))
    head = "".join(f'<th scope="col">{esc(column)}</th>' for column in columns)
    body = "".join(_row_html(row, number, columns) for number, row in enumerate(rows, start=1))
    table = f'<table class="pictures"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'
    told = f"{len(rows)} row{'s' * (len(rows) > 1)}; the pictures of a row belong together."
    return f'<p class="note">{told}</p>{scroll(table, "Pictures")}'


def _row(item: Mapping[str, Any], where: str) -> Row:
    caption, images = item.get("caption"), item.get("images")
    if not isinstance(caption, str):
        raise ValueError(f"{where}: caption: expected a string, got {type(caption).__name__}")
    if not isinstance(images, Mapping) or not images:
        raise ValueError(f"{where}: images: expected pictures by column, got {images!r:.40}")
    return Row(caption, {str(name): _picture(image, f"{where}, column '{name}'") for name, image in images.items()})


def _picture(image: Any, where: str) -> Picture:
    pixels = np.asarray(image)
    shorter, longer = min(pixels.shape[:2], default=0), max(pixels.shape[:2], default=0)
    # A strip is as high as the other pictures, so its longer side may be many times its shorter one.
    limit = max(LIMIT, LIMIT * longer // max(1, shorter))
    try:
        uri = data_uri(pixels, limit)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    height, width = shrink(pixels, limit).shape[:2]
    zoom = max(1, round(SIDE / min(height, width)))  # whole, so that every pixel is drawn equally large
    return Picture(uri, zoom * width, zoom * height)


def _row_html(row: Row, number: int, columns: Sequence[str]) -> str:
    name = row.caption or f"row {number}"
    cells = "".join(_cell(row.pictures.get(column), f"{name}: {column}") for column in columns)
    return f'<tr><th scope="row">{esc(row.caption or number)}</th>{cells}</tr>'


def _cell(picture: Picture | None, alt: str) -> str:
    if picture is None:
        return "<td>–</td>"
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<td><img src="{picture.uri}" {size} alt="{esc(alt)}"></td>'
