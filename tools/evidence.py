"""Measured results -> the tables in the READMEs.

    uv run python tools/evidence.py            write them
    uv run python tools/evidence.py --check    exit 1 if a README does not show what the files hold

Reads `packages/*/evidence/<key>.json` (what `kd compare <key>/small --output` leaves as comparison.json), further data
sets as `<key>-<data>.json`, and `notes.yaml`, a sentence for a file's stem where the numbers need one. The root README
gets one row a file between its markers; each package's README every arm of every file.

Differences are the method's minus the arm's, paired by seed, ± their standard error; "within noise" is less than two
standard errors from zero.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdcore.method import GROUP, Card

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("<!-- methods: written by tools/evidence.py -->", "<!-- end of methods -->")
EVIDENCE = ("<!-- evidence: written by tools/evidence.py -->", "<!-- end of evidence -->")
BASELINES = {"ce": "labels alone (`ce`)", "kd": "plain KD (`kd`)"}
SHARED = {"agreement"}  # metrics without a prefix that every method of a package reports
UNITS = {"student/accuracy": 100.0}  # shown in percent; other metrics as they are


class EvidenceError(Exception):
    """A file that cannot be shown; the message names it."""


@dataclass(frozen=True)
class Result:
    """One comparison file of a method. `data` says on what."""

    path: Path
    card: Card
    data: str
    values: Mapping[str, Any]

    @property
    def key(self) -> str:
        return self.card.key

    @property
    def arms(self) -> dict[str, Any]:
        """Every arm, the method itself first."""
        arms = dict(self.values["arms"])
        return {self.key: arms.pop(self.key), **arms}


@dataclass(frozen=True)
class PackageEvidence:
    """A package, the methods it registers, what was measured of them and what there is to say about it."""

    folder: Path
    cards: dict[str, Card]
    results: tuple[Result, ...]
    notes: dict[str, str]


# ---------------------------------------------------------------- reading


def collect(root: Path) -> list[PackageEvidence]:
    """Every package that registers methods."""
    found = [read_package(file.parent) for file in sorted(root.glob("packages/*/pyproject.toml"))]
    return [package for package in found if package.cards]


def read_package(folder: Path) -> PackageEvidence:
    cards = read_cards(folder)
    order = list(cards)
    files = sorted((folder / "evidence").glob("*.json"), key=lambda path: (order.index(key_of(path, cards)), path.stem))
    results = tuple(read_result(path, cards[key_of(path, cards)], folder) for path in files)
    notes_file = folder / "evidence" / "notes.yaml"
    notes = yaml.safe_load(notes_file.read_text(encoding="utf-8")) or {} if notes_file.is_file() else {}
    for stem in notes:
        if stem not in {path.stem for path in files}:
            raise EvidenceError(f"{notes_file}: '{stem}' is no evidence file")
    return PackageEvidence(folder, cards, results, {stem: " ".join(str(note).split()) for stem, note in notes.items()})


def read_cards(folder: Path) -> dict[str, Card]:
    """The card of every registered method whose module is there, in the order of pyproject.toml."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cards = {}
    for key, value in project.get("entry-points", {}).get(GROUP, {}).items():
        module = value.split(":")[0]
        source = (folder / "src").joinpath(*module.split(".")).with_suffix(".py")
        if source.is_file():
            doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
            cards[key] = Card.from_doc(key, doc, module.split(".")[0])
    return cards


def key_of(path: Path, cards: Mapping[str, Card]) -> str:
    """The method that a file name belongs to: `dhkd.json`, `dhkd-mnist.json`."""
    key = path.stem.split("-")[0]
    if key not in cards:
        raise EvidenceError(f"{path}: no method '{key}' is registered")
    return key


def read_result(path: Path, card: Card, folder: Path) -> Result:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvidenceError(f"{path}: not JSON ({error})") from None
    lacking = {"config", "method", "seeds", "arms", "differences"} - set(values)
    if lacking:
        raise EvidenceError(f"{path}: lacks {', '.join(sorted(lacking))}")
    if values["method"] != card.key or card.key not in values["arms"]:
        raise EvidenceError(f"{path}: holds method '{values['method']}', expected '{card.key}' with its own arm")
    without = [arm for arm in values["arms"] if arm != card.key and arm not in values["differences"]]
    if without:
        raise EvidenceError(f"{path}: no differences for arm '{without[0]}'")
    return Result(path, card, data_name(path, values, folder), values)


def data_name(path: Path, values: Mapping[str, Any], folder: Path) -> str:
    """The data set: the file name's suffix, or the `data.name` of the shipped config."""
    _, dash, suffix = path.stem.partition("-")
    if dash:
        return suffix
    key, _, name = values["config"].partition("/")
    for config in (folder / "src").glob(f"*/configs/{key}/{name}.yaml"):
        data = (yaml.safe_load(config.read_text(encoding="utf-8")).get("data") or {}).get("name")
        if data:
            return data
    raise EvidenceError(f"{path}: config '{values['config']}' with a data.name is not shipped by {folder.name}")


# ---------------------------------------------------------------- numbers


def number(value: float | None, metric: str, *, signed: bool = False) -> str:
    """A metric's value with the digits it deserves: percent with one or two, others with three significant ones."""
    if value is None:
        return "n/a"
    scale = UNITS.get(metric, 1.0)
    sign = "+" if signed else ""
    text = f"{value * scale:{sign}.2f}" if scale != 1.0 else f"{value:{sign}.3g}"
    return text.replace("-", "−")


def spread(arm: Mapping[str, Any], metric: str, seeds: int) -> str:
    """`91.20 ± 0.41`: mean and standard deviation over the seeds."""
    mean = arm["mean"].get(metric)
    if mean is None:
        return "–"
    return f"{number(mean, metric)} ± {number(arm['std'][metric], metric)}" if seeds > 1 else number(mean, metric)


def difference(result: Result, arm: str, metric: str) -> str:
    """`+1.20 ± 0.30`, the method minus the arm, and whether that is noise."""
    entry = result.values["differences"].get(arm, {}).get(metric)
    if entry is None:
        return "–"
    error = entry["standard_error"]
    if error is None or entry["n"] < 2:
        return f"{number(entry['mean'], metric, signed=True)} (one seed)"
    text = f"{number(entry['mean'], metric, signed=True)} ± {number(error, metric)}"
    return f"{text}, within noise" if entry["within_noise"] else f"**{text}**"


def paper(card: Card) -> str:
    """The paper's title, linked where it is on arXiv."""
    match = re.search(r"arXiv\s*:?\s*(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", card.paper)
    if match is None:
        return f"{card.title} ({card.paper})" if card.paper else card.title
    return f"[{card.title}](https://arxiv.org/abs/{match[1]}){year(card.paper)}"


def year(text: str) -> str:
    match = re.search(r"\b(19|20)\d{2}$", text.strip())
    return f", {match[0]}" if match else ""


# ---------------------------------------------------------------- tables


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def methods_section(packages: list[PackageEvidence]) -> str:
    """The root README's table: a row for each evidence file, and one for a method without any."""
    parts = []
    for package in packages:
        rows = []
        for card in package.cards.values():
            results = [result for result in package.results if result.key == card.key]
            rows += [method_row(result) for result in results] or [
                [f"`{card.key}`", paper(card), *["not measured"] * 5]
            ]
        header = ["key", "paper", "data", "teacher", "student", *(f"against {name}" for name in BASELINES.values())]
        parts.append(f"### {package.folder.name}\n\n{table(header, rows)}")
        notes = [f"- `{stem}`: {note}" for stem, note in package.notes.items()]
        link = f"[packages/{package.folder.name}/README.md](packages/{package.folder.name}/README.md#evidence)"
        parts.append("\n".join(notes))
        parts.append(f"Ablations and every other arm: {link}.")
    return "\n\n".join(part for part in parts if part)


def method_row(result: Result) -> list[str]:
    metric, seeds = "student/accuracy", len(result.values["seeds"])
    own = result.arms[result.key]
    against = [difference(result, arm, metric) for arm in BASELINES]
    data = f"{result.data}, {seeds} seed{'s' * (seeds > 1)}"
    teacher = number(own["mean"].get("teacher/accuracy"), metric)
    return [f"`{result.key}`", paper(result.card), data, teacher, spread(own, metric, seeds), *against]


def evidence_section(package: PackageEvidence) -> str:
    """A package README's tables: every arm of every file, with the method's own metrics."""
    parts = []
    for result in package.results:
        metrics = ["student/accuracy", *own_metrics(result)]
        seeds = len(result.values["seeds"])
        header = ["arm", "what differs"]
        header += [text for metric in metrics for text in (heading(metric), f"`{result.key}` minus arm")]
        rows = []
        for arm, entry in result.arms.items():
            cells = [f"`{arm}`", changes(entry.get("overrides") or {})]
            for metric in metrics:
                own = arm == result.key
                cells += [spread(entry, metric, seeds), "" if own else difference(result, arm, metric)]
            rows.append(cells)
        applied = " ".join(result.values.get("overrides") or [])
        setting = f"`{result.values['config']}`" + (f" with `{applied}`" if applied else "")
        seed_list = ", ".join(map(str, result.values["seeds"]))
        title = f"### {result.path.stem}\n\n{setting} on {result.data}, seeds {seed_list}."
        parts += [title, table(header, rows), package.notes.get(result.path.stem, "")]
    return "\n\n".join(part for part in parts if part) or "Nothing is measured yet."


def own_metrics(result: Result) -> list[str]:
    """The method's own scalars: those without a prefix."""
    mean = result.arms[result.key]["mean"]
    return [metric for metric in mean if "/" not in metric and metric not in SHARED]


def heading(metric: str) -> str:
    return metric.replace("/", " ").replace("_", " ") + (", %" if metric in UNITS else "")


def changes(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={json.dumps(value)}`" for key, value in overrides.items()) or "the method"


# ---------------------------------------------------------------- READMEs


def rewritten(text: str, markers: tuple[str, str], section: str, path: Path) -> str:
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise EvidenceError(f"{path}: expected the markers '{begin}' and '{end}', once each")
    return f"{text[: text.index(begin)]}{begin}\n\n{section}\n\n{text[text.index(end) :]}"


def readmes(root: Path) -> dict[Path, str]:
    """README path -> what it should hold."""
    packages = collect(root)
    sections = [(root / "README.md", METHODS, methods_section(packages))]
    sections += [(package.folder / "README.md", EVIDENCE, evidence_section(package)) for package in packages]
    return {
        path: rewritten(path.read_text(encoding="utf-8"), markers, section, path) for path, markers, section in sections
    }


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Writes the measured results into the READMEs.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a README is stale")
    check = parser.parse_args(arguments).check
    try:
        wanted = readmes(root)
    except EvidenceError as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    stale = [path for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        name = path.relative_to(root)
        if check:
            print(f"evidence: {name} is stale; run `uv run python tools/evidence.py`", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {name}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
