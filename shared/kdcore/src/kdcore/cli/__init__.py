"""The `kd` command. Exit codes: 0 done, 1 the run failed, 2 bad input.

Starting it imports neither torch nor a method: commands import what they need when they run.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcore.cli.session import Interrupted, leave_group, session
from kdcore.errors import InputError, RunFailed

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `kd` with the given arguments (by default those of the process) and returns the exit code."""
    code = _run(list(sys.argv[1:] if arguments is None else arguments) or ["--help"])
    if arguments is None:
        leave_group(code)
    return code


def _run(given: list[str]) -> int:
    from typer import BadParameter
    from typer.main import get_command

    from kdcore.cli.app import app

    session.run = None
    usage_error: Any = BadParameter.__bases__[0]  # typer's own, or click's in older versions
    try:
        code = get_command(app).main(given, prog_name="kd", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(2, str(error))
    except usage_error as error:
        return _fail(2, f"{error.format_message()} (kd --help says what there is)")
    except RunFailed as error:
        begun = session.run is not None and session.run.is_dir()
        again = session.again if begun and isinstance(error, Interrupted) else ""
        return _fail(1, str(error), *_last_checkpoint(error.checkpoint), again)
    except Exception as error:
        if os.environ.get("KD_DEBUG"):
            traceback.print_exc()
        hint = "" if os.environ.get("KD_DEBUG") else "KD_DEBUG=1 shows where"
        text = " ".join(str(error).split()) or "no message"
        return _fail(1, f"{type(error).__name__}: {text}", *_last_checkpoint(None), hint)


def _last_checkpoint(known: Path | None) -> tuple[str, ...]:
    """The sentence that names the last good checkpoint of the run that was going on; nothing outside a run."""
    if session.run is None or not session.run.is_dir():
        return ()
    from kdcore.checkpoint import last_good

    path = known or last_good(session.run)
    return (f"last good checkpoint: {path}" if path else f"no checkpoint yet in {session.run}",)


def _fail(code: int, *parts: str) -> int:
    rank = os.environ.get("RANK", "0")
    prefix = "error: " if rank == "0" else f"error (process {rank}): "
    print(prefix + "\n".join(part for part in parts if part), file=sys.stderr, flush=True)
    return code
