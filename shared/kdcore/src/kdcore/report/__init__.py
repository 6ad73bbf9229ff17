"""Run directories in, one self-contained HTML page out.

The page needs no network and no other file: style, script, charts (inline SVG) and pictures (data URIs) are in it.
It is readable without JavaScript; the script only adds values under the pointer.

The pictures come from the method's optional `predict(config, artefacts, count)`, a list of
`{"image": uint8 (H, W) or (H, W, 3), "truth": str, "teacher": {"label": str, "probability": float},
"student": {...}}`; without it, or where the method is not installed, the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdcore.errors import InputError

__all__ = ["write_report"]


def write_report(runs: Sequence[Path], output: Path | None = None, *, samples: int = 16) -> Path:
    """Writes the report of one run, or of several side by side, and returns its path.

    Args:
        runs: run directories, finished or not.
        output: the HTML file. By default `report.html` in the run directory; for several runs `report.html` in the
            folder that holds the first one.
        samples: how many inputs with predictions to show per run; 0 shows none.

    Raises:
        InputError: no run, a folder that is no run directory, a run given twice, a negative `samples`, or an output
            that cannot be written.
    """
    from kdcore.report.page import render
    from kdcore.report.read import read_runs
    from kdcore.stages import write_atomically

    folders = [Path(run) for run in runs]
    if not folders:
        raise InputError("report: give at least one run directory")
    if samples < 0:
        raise InputError(f"report: samples = {samples}: expected 0 or more")
    read = read_runs(folders)
    first = folders[0].resolve()
    target = Path(output) if output is not None else (first if len(folders) == 1 else first.parent) / "report.html"
    if target.is_dir():
        raise InputError(f"report: output {target} is a folder; give the name of an HTML file")
    page = render(read, samples)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, page)
    except OSError as error:
        raise InputError(f"report: output {target} cannot be written ({error.strerror})") from None
    return target
