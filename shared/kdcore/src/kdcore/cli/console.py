"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """As wide as the terminal; 160 columns where the output is no terminal, so that a pipe gets whole lines."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    return console
