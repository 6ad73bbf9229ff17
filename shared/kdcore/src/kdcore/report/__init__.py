"""Run directories in, one self-contained HTML page out.

The page needs no network and no other file: style, script, charts (inline SVG) and pictures (data URIs) are in it.
It is readable without JavaScript; the script only adds values under the pointer.

The pictures come from the method's optional `predict(config, artefacts, count)`, a list of one of two kinds; without
it, or where the method is not installed, the page says so. A picture is uint8, (H, W), (H, W, 3) or (H, W, 4).

    predictions    {"image": picture, "truth": str, "teacher": {"label": str, "probability": float}, "student": {...}}
                   of one input: a list, the disagreements first
    pictures       {"caption": str, "images": {column: picture}}, such as what teacher and student generate from one
                   noise: a table, a row each, columns in the order in which they first appear; a strip of several
                   pictures side by side is a wide picture; a column that a row lacks stays empty there

The curves come from metrics.jsonl: lines of kind "train" and "eval", as the training loop writes them, and

    {"kind": "profile", "name": str, "stage": str, "step": int, "x": [label, ...], "values": [number or null, ...]}

for a curve over something that is not the step, such as a gradient's size by noise level. Every name and stage gets a
chart with a line for each of a few steps; null leaves a gap.
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
