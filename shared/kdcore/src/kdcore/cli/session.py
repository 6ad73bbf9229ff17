"""What the commands and the handling of their failures share."""

from __future__ import annotations

import os
import sys
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


def leave_group(code: int = 0) -> None:
    """Ends a process of a group here and now: a normal exit destroys the group's threads, and now and then aborts.

    Does nothing in a process that is in no group, and does not import torch.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
