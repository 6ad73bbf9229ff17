"""What the commands and the handling of their failures share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdcore.errors import RunFailed


@dataclass
class Session:
    """The run directory that the current command is filling, and how to go on with it after an interrupt."""

    run: Path | None = None
    again: str = ""


session = Session()


class Interrupted(RunFailed):
    """Control-C during a command."""
