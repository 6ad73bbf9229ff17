"""Measured results -> the tables in the READMEs.

    uv run python tools/evidence.py            write them
    uv run python tools/evidence.py --check    exit 1 if a README does not show what the files hold

Reads `packages/*/evidence/<key>.json` (what `kd compare <key>/small --output` leaves as comparison.json), further data
sets as `<key>-<data>.json`; `notes.yaml`, a sentence for a file's stem where the numbers need one; `headline.yaml`, the
metrics that a package's tables lead with where that is not the accuracy (see `Headline`). The root README gets one row
a file between its markers; each package's README every arm of every file.

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
from typing import Any, Literal

import yaml
from pydantic import Field

from kdcore.config import Config, parse, read_yaml
from kdcore.errors import InputError
from kdcore.method import GROUP, Card

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("<!-- methods: written by tools/evidence.py -->", "<!-- end of methods -->")
EVIDENCE = ("<!-- evidence: written by tools/evidence.py -->", "<!-- end of evidence -->")
BASELINES = {"ce": "labels alone (`ce`)", "kd": "plain KD (`kd`)"}
SHARED = {"agreement"}  # metrics without a prefix that every method of a package reports
UNITS = {"student/accuracy": 100.0}  # shown in percent; other metrics as they are
MINUS_ARMS = "student minus each arm"


class EvidenceError(Exception):
    """A file that cannot be shown; the message names it."""


class Headline(Config):
    """What the tables of a comparison lead with. Metrics are named without their role: `frechet`, not
    `student/frechet`."""

    metric: str = Field(min_length=1, description="the student's metric that leads")
    title: str = Field("", description="the metric in words, over its table in the root README")
    better: Literal["lower", "higher"] = Field("higher", description="which way is better, said beside the title")
    teachers: dict[str, str] = Field(description="columns beside the student's: their titles, and their metrics' role")
    teacher_rows: bool = Field(True, description="whether the package's tables compare the student with each of them")
    against: dict[str, str] | None = Field(
        None, description="arms of the root README, in words; None: all, in one cell"
    )
    also: list[str] = Field(default_factory=list, description="more of the student's metrics in the package's tables")

    @property
    def student(self) -> str:
        return f"student/{self.metric}"


class HeadlineFile(Config):
    """`headline.yaml`: the first entry whose metric a file's student has leads its tables."""

    headlines: list[Headline] = Field(min_length=1)


ACCURACY = Headline(
    metric="accuracy", title="", better="higher", teachers={"teacher": "teacher"}, teacher_rows=False, against=BASELINES
)


@dataclass(frozen=True)
class Result:
    """One comparison file of a method. `data` says on what, `headline` what its tables lead with."""

    path: Path
    card: Card
    data: str
    headline: Headline
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
    headlines: list[Headline]
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
    headlines = read_headlines(folder / "evidence" / "headline.yaml")
    results = tuple(read_result(path, cards[key_of(path, cards)], folder, headlines) for path in files)
    notes_file = folder / "evidence" / "notes.yaml"
    notes = yaml.safe_load(notes_file.read_text(encoding="utf-8")) or {} if notes_file.is_file() else {}
    for stem in notes:
        if stem not in {path.stem for path in files}:
            raise EvidenceError(f"{notes_file}: '{stem}' is no evidence file")
    sentences = {stem: " ".join(str(note).split()) for stem, note in notes.items()}
    return PackageEvidence(folder, cards, headlines, results, sentences)


def read_headlines(path: Path) -> list[Headline]:
    """What a package's tables lead with; the accuracy where it does not say."""
    if not path.is_file():
        return [ACCURACY]
    try:
        return parse(HeadlineFile, read_yaml(path), source=str(path)).headlines
    except InputError as error:
        raise EvidenceError(str(error)) from None


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


def read_result(path: Path, card: Card, folder: Path, headlines: list[Headline]) -> Result:
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
    means = values["arms"][card.key]["mean"]
    headline = next((found for found in headlines if found.student in means), None)
    if headline is None:
        wanted = " or ".join(found.student for found in headlines)
        raise EvidenceError(
            f"{path}: no {wanted}; the package's evidence/headline.yaml names what its tables lead with"
        )
    return Result(path, card, data_name(path, values, folder), headline, values)


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


def spread(arm: Mapping[str, Any], metric: str, seeds: int, role: str = "student") -> str:
    """`91.20 ± 0.41`: mean and standard deviation over the seeds; of a student's metric, or a teacher's like it."""
    name = metric if role == "student" else of_role(metric, role)
    mean = arm["mean"].get(name)
    if mean is None:
        return "–"
    return f"{number(mean, metric)} ± {number(arm['std'][name], metric)}" if seeds > 1 else number(mean, metric)


def difference(result: Result, arm: str, metric: str) -> str:
    """`+1.20 ± 0.30`, the method minus the arm, and whether that is noise."""
    return shown(result.values["differences"].get(arm, {}).get(metric), metric)


def minus_teacher(result: Result, role: str, metric: str) -> str:
    """The same for the student minus a teacher of its own runs, paired by seed."""
    from kdcore.compare import differences

    runs = [run["metrics"] for run in result.arms[result.key]["runs"]]
    pairs = [(run.get(metric), run.get(of_role(metric, role))) for run in runs]
    if not pairs or any(value is None for pair in pairs for value in pair):
        return "–"
    student, teacher = ([{metric: pair[side]} for pair in pairs] for side in (0, 1))
    return shown(differences(student, teacher)[metric], metric)


def of_role(metric: str, role: str) -> str:
    """`student/frechet` of a teacher: `teacher_4/frechet`."""
    return f"{role}/{metric.partition('/')[2]}"


def shown(entry: Mapping[str, Any] | None, metric: str) -> str:
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
    """The root README's tables: a row for each evidence file, and one for a method without any."""
    parts = []
    for package in packages:
        parts.append(f"### {package.folder.name}")
        parts += [methods_table(package, headline) for headline in package.headlines]
        parts.append("\n".join(f"- `{stem}`: {note}" for stem, note in package.notes.items()))
        link = f"[packages/{package.folder.name}/README.md](packages/{package.folder.name}/README.md#evidence)"
        parts.append(f"Ablations and every other arm: {link}.")
    return "\n\n".join(part for part in parts if part)


def methods_table(package: PackageEvidence, headline: Headline) -> str:
    """The rows of the files that this metric leads, under its name; methods without a file are in the first table."""
    against = [MINUS_ARMS] if headline.against is None else [f"against {name}" for name in headline.against.values()]
    header = ["key", "paper", "data", *headline.teachers, "student", *against]
    rows = []
    for card in package.cards.values():
        results = [result for result in package.results if result.key == card.key]
        rows += [method_row(result) for result in results if result.headline is headline]
        if not results and headline is package.headlines[0]:
            rows.append([f"`{card.key}`", paper(card), *["not measured"] * (len(header) - 2)])
    if not rows:
        return ""
    lead = f"{headline.title}, {headline.better} is better:\n\n" if headline.title else ""
    return lead + table(header, rows)


def method_row(result: Result) -> list[str]:
    headline, seeds = result.headline, len(result.values["seeds"])
    metric, own = headline.student, result.arms[result.key]
    if headline.against is None:
        arms = [arm for arm in result.arms if arm != result.key]
        against = ["<br>".join(f"`{arm}` {difference(result, arm, metric)}" for arm in arms) or "–"]
    else:
        against = [difference(result, arm, metric) for arm in headline.against]
    data = f"{result.data}, {seeds} seed{'s' * (seeds > 1)}"
    teachers = [number(own["mean"].get(of_role(metric, role)), metric) for role in headline.teachers.values()]
    return [f"`{result.key}`", paper(result.card), data, *teachers, spread(own, metric, seeds), *against]


def evidence_section(package: PackageEvidence) -> str:
    """A package README's tables: every arm of every file, with the method's own metrics."""
    parts = []
    for result in package.results:
        headline = result.headline
        also = [f"student/{name}" for name in headline.also]
        also = [metric for metric in also if metric in result.arms[result.key]["mean"]]
        metrics = [headline.student, *also, *own_metrics(result)]
        seeds = len(result.values["seeds"])
        header = ["arm", "what differs"]
        header += [text for metric in metrics for text in (heading(metric, headline), f"`{result.key}` minus arm")]
        rows = []
        for arm, entry in result.arms.items():
            cells = [f"`{arm}`", changes(entry.get("overrides") or {})]
            for metric in metrics:
                own = arm == result.key
                cells += [spread(entry, metric, seeds), "" if own else difference(result, arm, metric)]
            rows.append(cells)
        if headline.teacher_rows:
            measured = result.arms[result.key]["mean"]
            rows += [
                teacher_row(result, title, role, metrics)
                for title, role in headline.teachers.items()
                if of_role(headline.student, role) in measured
            ]
        applied = " ".join(result.values.get("overrides") or [])
        setting = f"`{result.values['config']}`" + (f" with `{applied}`" if applied else "")
        seed_list = ", ".join(map(str, result.values["seeds"]))
        title = f"### {result.path.stem}\n\n{setting} on {result.data}, seeds {seed_list}."
        parts += [title, table(header, rows), package.notes.get(result.path.stem, "")]
    return "\n\n".join(part for part in parts if part) or "Nothing is measured yet."


def teacher_row(result: Result, title: str, role: str, metrics: list[str]) -> list[str]:
    """A teacher of the method's own runs, as if it were an arm."""
    own, seeds = result.arms[result.key], len(result.values["seeds"])
    cells = [title, "not distilled"]
    for metric in metrics:
        students = "/" in metric
        cells += [spread(own, metric, seeds, role), minus_teacher(result, role, metric)] if students else ["", ""]
    return cells


def own_metrics(result: Result) -> list[str]:
    """The method's own scalars: those without a prefix."""
    mean = result.arms[result.key]["mean"]
    return [metric for metric in mean if "/" not in metric and metric not in SHARED]


def heading(metric: str, headline: Headline) -> str:
    if metric == headline.student and headline.title:
        return f"student {headline.title}, {headline.better} is better"
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
