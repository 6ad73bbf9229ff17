"""The page: header, results, curves, confusion matrices, pictures, config, for one run or several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from kdcore.errors import InputError
from kdcore.report.curves import Group, profile_charts, training_groups, validation_groups
from kdcore.report.figures import Data, group_html, legend, profile_figure, swatch, toolbar
from kdcore.report.read import Run
from kdcore.report.samples import take_samples
from kdcore.report.tables import cards, compare_table, config_differences, confusion_html, metrics_table
from kdcore.report.text import duration, esc, flatten, moment, script_json, short

_MAIN_SETTINGS = ("teacher", "student", "data", "seed")
_MAIN_ENVIRONMENT = ("python", "torch", "cuda", "gpu", "device", "git", "commit", "kdcore")


def render(runs: Sequence[Run], samples: int) -> str:
    """The whole document for the given runs."""
    data: Data = []
    sections = _one(runs[0], samples, data) if len(runs) == 1 else _several(runs, samples, data)
    shown = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<li><a href="#{key}">{esc(title)}</a></li>' for key, title, _ in shown)
    body = "".join(f'<section id="{key}"><h2>{esc(title)}</h2>{text}</section>' for key, title, text in shown)
    title = runs[0].label if len(runs) == 1 else "Comparison of " + ", ".join(run.label for run in runs)
    header = _header(runs[0]) if len(runs) == 1 else _header_of_several(runs)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{esc(title)}</title>'
        f"<style>{_asset('report.css')}</style></head><body><header>{header}</header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main>'
        f'<script type="application/json" id="chart-data">{script_json(data)}</script>'
        f"<script>{_asset('report.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return files("kdcore.report").joinpath("assets", name).read_text(encoding="utf-8")


Sections = list[tuple[str, str, str]]  # anchor, heading, HTML


def _one(run: Run, samples: int, data: Data) -> Sections:
    results = "" if run.results is None else cards(run.results) + metrics_table(run.results)
    kind, pictures = _samples(run, samples)
    return [
        ("results", "Results", _notes(run) + results),
        ("training", "Training", _training([run], data)),
        ("validation", "Validation", _validation([run], data)),
        ("profiles", "Profiles", _profiles([run], data)),
        ("confusion", "Confusion matrix", _confusions([run])),
        ("samples", kind or "Predictions", pictures),
        ("config", "Config and environment", _details(run)),
    ]


def _several(runs: Sequence[Run], samples: int, data: Data) -> Sections:
    notes = "".join(_notes(run, named=True) for run in runs)
    found = [(run, *_samples(run, samples)) for run in runs]
    kinds = dict.fromkeys(kind for _, kind, _ in found if kind)
    return [
        ("results", "Results", notes + compare_table(runs)),
        ("differences", "Config differences", config_differences(runs)),
        ("training", "Training", _training(runs, data)),
        ("validation", "Validation", _validation(runs, data)),
        ("profiles", "Profiles", _profiles(runs, data)),
        ("confusion", "Confusion matrices", _confusions(runs)),
        (
            "samples",
            " and ".join(kinds).capitalize() or "Predictions",
            "".join(_folded(run, body) for run, _, body in found if body),
        ),
        ("config", "Configs and environments", "".join(f"<h3>{esc(run.label)}</h3>{_details(run)}" for run in runs)),
    ]


# ---------------------------------------------------------------- header


def _header(run: Run) -> str:
    title, paper = _card(run)
    facts = _facts(run)
    rows = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in facts)
    return f'<p class="kicker">{esc(run.label)}</p><h1>{esc(title)}</h1>{_paper(paper)}<dl class="facts">{rows}</dl>'


def _header_of_several(runs: Sequence[Run]) -> str:
    rows = []
    for index, run in enumerate(runs):
        title, paper = _card(run)
        facts = " · ".join(f"{name} {value}" for name, value in _facts(run) if name in ("started", "took"))
        rows.append(
            f"<li>{swatch(index)}<div><strong>{esc(run.label)}</strong> {esc(title)}{_paper(paper)}"
            f'<p class="note">{esc(facts)}</p></div></li>'
        )
    return (
        f'<p class="kicker">kd report</p><h1>Comparison of {len(runs)} runs</h1><ul class="runs">{"".join(rows)}</ul>'
    )


def _card(run: Run) -> tuple[str, str]:
    """Title and paper of the run's method; its key alone when it is not installed."""
    from kdcore.method import card, installed

    point = installed().get(run.method)
    if point is not None:
        try:
            found = card(point)
        except InputError:
            return run.method, ""
        return found.title or run.method, found.paper
    return (f"{run.method} (method not installed here)", "") if run.method else ("Unknown method", "")


def _paper(paper: str) -> str:
    """The paper, linked when it names an arXiv identifier. The link is the page's only address outside itself."""
    if not paper:
        return ""
    text = re.sub(
        r"arXiv[: ]\s*(\d{4}\.\d{4,5})",
        r'<a href="https://arxiv.org/abs/\1" rel="noreferrer">arXiv \1</a>',
        esc(paper),
    )
    return f'<p class="paper">{text}</p>'


def _facts(run: Run) -> list[tuple[str, str]]:
    """Date and what the config and the environment say first."""
    facts = []
    if run.started is not None and run.ended is not None:
        facts.append(("started", moment(run.started)))
        facts.append(("took", duration(run.ended - run.started)))
    if run.method:
        facts.append(("method", run.method))
    settings = [(name, _named(run.config[name])) for name in _MAIN_SETTINGS if name in run.config]
    facts += [(name, text) for name, text in settings if text]
    environment = flatten(run.environment)
    for wanted in _MAIN_ENVIRONMENT:
        values = [value for name, value in environment.items() if name.lower().split(".")[-1] == wanted]
        if values and values[0] not in (None, "", []):
            facts.append((wanted, short(values[0], 60)))
    return facts


def _named(value: Any) -> str:
    """A section of the config in a few words: a name in it, or in a section of it; empty where nothing is set."""
    if not isinstance(value, dict):
        return short(value, 60)
    for section in (value, *(inner for inner in value.values() if isinstance(inner, dict))):
        name = next((section[key] for key in ("name", "model", "path", "pretrained") if section.get(key)), None)
        if isinstance(name, str):
            return short(name, 60)
    known = {key: inner for key, inner in value.items() if inner is not None}
    return short(known, 60) if known else ""


# ---------------------------------------------------------------- sections


def _notes(run: Run, *, named: bool = False) -> str:
    prefix = f"<strong>{esc(run.label)}:</strong> " if named else ""
    return "".join(f'<p class="notice" role="note">{prefix}{esc(note)}</p>' for note in run.notes)


def _curves(groups: Sequence[Group], runs: Sequence[Run], data: Data, *, switches: bool) -> str:
    """Charts under their headings; the switches act on every chart of the page, so they come once."""
    if not groups:
        return ""
    labels = [run.label for run in runs]
    weighted = any(line.weighted is not None for group in groups for panel in group.panels for line in panel.lines)
    bar = (toolbar(weighted) if switches else "") + (legend(labels) if len(runs) > 1 else "")
    charts = "".join(group_html(group, labels, data) for group in groups)
    return f'<div class="sticky">{bar}</div>{charts}' if bar else charts


def _training(runs: Sequence[Run], data: Data) -> str:
    return _curves(training_groups(runs), runs, data, switches=True) or "<p>No training step was logged.</p>"


def _validation(runs: Sequence[Run], data: Data) -> str:
    return _curves(validation_groups(runs), runs, data, switches=not any(run.trainings for run in runs))


def _profiles(runs: Sequence[Run], data: Data) -> str:
    charts = "".join(profile_figure(chart, data) for chart in profile_charts(runs))
    return f'<div class="charts">{charts}</div>' if charts else ""


def _confusions(runs: Sequence[Run]) -> str:
    figures = [
        confusion_html(confusion, _confusion_caption(run, confusion.name, len(runs) > 1))
        for run in runs
        for confusion in run.confusions
    ]
    if not figures:
        return ""
    told = "Counts per true class (row) and predicted class (column); the colour is the share of the row."
    return f'<p class="note">{told}</p><div class="confusions">{"".join(figures)}</div>'


def _confusion_caption(run: Run, name: str, several: bool) -> str:
    role = name.removesuffix("confusion_matrix").strip("/_ ") or "student"
    return f"{run.label}: {role}" if several else role


def _samples(run: Run, count: int) -> tuple[str, str]:
    """What the method's pictures are called, an empty string when there are none, and their HTML."""
    if count == 0:
        return "", ""
    shown, reason = take_samples(run, count)
    return (shown.title, shown.html) if shown else ("", f'<p class="notice" role="note">{esc(reason)}</p>')


def _folded(run: Run, body: str) -> str:
    return f"<details><summary>{esc(run.label)}</summary>{body}</details>"


def _details(run: Run) -> str:
    config = f"<pre>{esc(run.config_text)}</pre>" if run.config_text else ""
    stages = {
        name: ", ".join(map(str, paths.values())) for name, paths in run.stages.items() if isinstance(paths, dict)
    }
    parts = (
        ("Resolved config", config),
        ("Environment", _listing(flatten(run.environment))),
        ("Finished stages and what they left", _listing(stages)),
    )
    return "".join(f"<details><summary>{title}</summary>{body}</details>" for title, body in parts if body)


def _listing(values: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{esc(name)}</th><td>{esc(short(value, 400))}</td></tr>' for name, value in values.items()
    )
    return f'<table class="config"><tbody>{rows}</tbody></table>' if rows else ""
