"""What the method's own `predict` gives, as HTML: predictions of inputs, rows of pictures, or texts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdcore.report.pictures import pictures
from kdcore.report.predictions import predictions
from kdcore.report.read import Run
from kdcore.report.texts import texts


@dataclass(frozen=True)
class Shown:
    """A section's heading and its content as HTML."""

    title: str
    html: str


def take_samples(run: Run, count: int) -> tuple[Shown | None, str]:
    """What there is to show, or None and a sentence that says why there is nothing.

    The run's method may not be installed, its networks may be missing, its `predict` may fail: a report is made all
    the same.
    """
    try:
        from kdcore.run import load_run

        method, config, artefacts = load_run(run.folder)
        if method.predict is None:
            return None, f"No pictures: method {method.key} has no predict function."
        items = list(method.predict(config, artefacts, count))
        if not items:
            return None, "No pictures: the method's predict function returned none."
        return _shown(items), ""
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        unfinished = "" if run.results is not None else " The run is not finished."
        return None, f"No pictures: {reason} ({type(error).__name__}).{unfinished}"


def _shown(items: Sequence[Mapping[str, Any]]) -> Shown:
    rows = ["images" in item for item in items]
    if all(rows):
        return Shown("Pictures", pictures(items))
    if any(rows):
        raise ValueError(f"predict: {sum(rows)} of {len(rows)} items are rows of 'images'; expected all or none")
    if all("prompt" in item for item in items):
        return Shown("Texts", texts(items))
    return Shown("Predictions", predictions(items))
