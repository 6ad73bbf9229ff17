"""What the commands and the handling of their failures share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdcore.errors import RunFailed


@dataclass
class Session:
    """The run directory that the current command is filling, for the message of a failure."""

    run: Path | None = None


session = Session()


class Interrupted(RunFailed):
    """Control-C during a command."""
