"""write_report on run directories that are whole, unfinished, broken or hostile."""

import base64
import json
import math
import re
import struct
import sys
import types
from html.parser import HTMLParser
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import yaml

import kdcore.method
from kdcore.errors import InputError
from kdcore.report import write_report
from kdcore.report.read import read_run, read_runs

CONFIG = {
    "method": "blend",
    "seed": 3,
    "teacher": {"name": "wide"},
    "student": {"name": "narrow"},
    "method_args": {"alpha": 0.5},
    "train": {"epochs": 4},
}


def train_line(step: int, ce: float, *, stage: str = "student", weight: float = 0.5, **extra) -> str:
    terms = {"ce": {"raw": ce, "weighted": ce}, "kd": {"raw": 2 * ce, "weighted": 2 * weight * ce}}
    record = {"time": 1.7e9 + step, "kind": "train", "stage": stage, "player": "student", "step": step, "epoch": 0}
    return json.dumps({**record, "terms": terms, "total": ce + 2 * weight * ce, "lr": 0.1, **extra})


def eval_line(step: int, **metrics: float) -> str:
    record = {"time": 1.7e9 + step, "kind": "eval", "stage": "student", "step": step, "epoch": 0}
    return json.dumps({**record, "metrics": metrics})


def make_run(folder: Path, *, lines=None, metrics=None, config=None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG if config is None else config))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.9", "packages": {"torch": "2.13.0"}}))
    if lines is None:
        lines = [train_line(step, 2.0 / step, samples_per_second=900.5) for step in range(1, 21)]
        lines += [eval_line(step, accuracy=0.04 * step) for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if metrics is not False:
        values = {
            "student/accuracy": 0.9125,
            "teacher/accuracy": 0.95,
            "student/nll": 0.3,
            "agreement": 0.9,
            "confusion_matrix": [[8, 2], [1, 9]],
            "class_names": ["cat", "dog"],
        }
        (folder / "metrics.json").write_text(json.dumps(values if metrics is None else metrics))
        (folder / "stages.json").write_text(json.dumps({"student": {"student": "student"}}))
    return folder


class Page(HTMLParser):
    """Elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            continue

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            found
            for name, found in self.elements
            if name == tag and all(value in found.get(key, "").split() for key, value in wanted.items())
        ]


@pytest.fixture
def predictions(monkeypatch):
    """Stands in for `kdcore.run`: a method whose predict returns what the test puts in."""
    module = types.ModuleType("kdcore.run")
    method = types.SimpleNamespace(key="blend", predict=None)
    module.load_run = lambda folder: (method, None, {})
    monkeypatch.setitem(sys.modules, "kdcore.run", module)
    return method


def sample(truth: str, teacher: str, student: str, shade: int = 0) -> dict:
    guess = {"teacher": {"label": teacher, "probability": 0.875}, "student": {"label": student, "probability": 0.21}}
    return {"image": np.full((4, 4), shade, dtype=np.uint8), "truth": truth, **guess}


# ---------------------------------------------------------------- one run


def test_page_of_one_run_holds_every_part(tmp_path, predictions):
    predictions.predict = lambda config, artefacts, count: [sample("cat", "cat", "cat")] * count
    run = make_run(tmp_path / "run-a")
    output = write_report([run], samples=3)
    assert output == run.resolve() / "report.html"
    page = Page(output)
    titles = ("ce", "kd", "total (weighted sum)", "learning rate", "samples per second", "accuracy")
    assert len(page.all("figure", class_="chart")) == len(titles)
    for words in (*titles, "91.25 %", "95.00 %", "−3.75 points", "2023-11-14 22:13 UTC", "wide", "3.11.9", "2.13.0"):
        assert words in page.text
    assert "method_args:\n  alpha: 0.5" in page.source
    assert len(page.all("li", class_="sample")) == 3
    assert page.text.count("88 %") == 3
    assert page.text.count("21 %") == 3
    assert not page.all("p", class_="notice")


def test_several_teachers_have_a_column_each(tmp_path):
    metrics = {"student/frechet": 3.5, "student/parameters": 10, "share": 0.25}
    metrics |= {"teacher_1/frechet": 9.0, "teacher_1/recall": 0.125, "teacher_50/frechet": 1.5}
    page = Page(write_report([make_run(tmp_path / "run", metrics=metrics)]))
    table = page.source.split('<table class="metrics">')[1].split("</table>")[0]
    assert re.findall(r'<th scope="col">(.*?)</th>', table) == ["metric", "teacher_1", "teacher_50", "student"]
    assert "difference" not in table
    cells = [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", row)] for row in table.split("<tr>")[2:]]
    assert cells == [["9", "1.5", "3.5"], ["–", "–", "10"], ["12.50 %", "–", "–"], ["0.25"]]
    assert 'colspan="3"' in table
    assert "student frechet 3.5 teacher_1 9 · teacher_50 1.5" in page.text


def test_the_difference_is_to_the_teacher_alone(tmp_path):
    metrics = {"student/accuracy": 0.9, "teacher/accuracy": 0.95, "teacher_averaged/accuracy": 0.97}
    page = Page(write_report([make_run(tmp_path / "run", metrics=metrics)]))
    assert "metric teacher teacher_averaged student difference" in page.text
    assert "95.00 % 97.00 % 90.00 % −5.00 points" in page.text
    assert "teacher 95.00 % (−5.00 points) · teacher_averaged 97.00 %" in page.text


@pytest.mark.parametrize(
    ("teacher", "shown"),
    [
        ({"name": "wide", "path": "/x"}, "teacher wide"),
        ({"pretrained": None, "dtype": "fp32", "world": {"name": "rings", "size": 3}}, "teacher rings"),
        ({"pretrained": "some/model", "world": None}, "teacher some/model"),
        ({"pretrained": None, "depth": 3}, 'teacher {"depth": 3}'),
        ({"pretrained": None, "lora": None}, "method blend student narrow"),
    ],
)
def test_header_names_a_section_of_the_config(tmp_path, teacher, shown):
    page = Page(write_report([make_run(tmp_path / "run", config={**CONFIG, "teacher": teacher})]))
    assert shown in page.text.split("Config and environment")[0]


def test_weighted_drawings_exist_where_the_weight_is_not_one(tmp_path):
    page = Page(write_report([make_run(tmp_path / "a", lines=[train_line(s, 1.0 / s, weight=0.25) for s in (1, 2)])]))
    modes = [plot["data-term"] for plot in page.all("g", class_="plot")]
    assert modes == ["any"] * 2 + ["raw"] * 2 + ["weighted"] * 2 + ["any"] * 4  # ce, kd, then total and lr
    assert "weight 0.25" in page.text
    (data,) = [json.loads(text) for text in scripts(page.source) if text.startswith("[")]
    assert data[1]["lines"][0]["raw"] == [[1, 2], [2.0, 1.0]]
    assert data[1]["lines"][0]["weighted"] == [[1, 2], [0.5, 0.25]]


def scripts(source: str) -> list[str]:
    return [part.split(">", 1)[1].split("</script>")[0] for part in source.split("<script")[1:]]


def test_page_is_self_contained(tmp_path, predictions):
    predictions.predict = lambda config, artefacts, count: [sample("cat", "cat", "dog")] * count
    page = Page(write_report([make_run(tmp_path / "a"), make_run(tmp_path / "b")]))
    addresses = [
        found[name] for _, found in page.elements for name in ("src", "href", "srcset", "data") if name in found
    ]
    assert addresses
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert "http" not in page.source
    assert not {"iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}


def test_anchors_and_ids_are_unique_and_charts_are_described(tmp_path):
    page = Page(write_report([make_run(tmp_path / "a")]))
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)
    labels = [svg["aria-label"] for svg in page.all("svg", role="img")]
    assert "Line chart of ce over optimiser steps. step 1 to 20, last 0.1, between 0.1 and 2." in labels
    assert {label["for"] for label in page.all("label")} == {radio["id"] for radio in page.all("input")}


def test_every_string_is_escaped(tmp_path, predictions):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    predictions.predict = lambda config, artefacts, count: [sample(evil, evil, "dog")]
    lines = [train_line(1, 1.0), eval_line(1, **{evil: 0.5}), train_line(2, 0.5, stage=evil, **{evil: 3.0})]
    lines.append(train_line(3, 0.5).replace('"kd"', json.dumps(evil)))
    metrics = {f"student/{evil}": 0.5, evil: evil, "confusion_matrix": [[1, 0], [0, 1]], "class_names": [evil, "b"]}
    config = {**CONFIG, "method": evil, "teacher": {"name": evil}, evil: {evil: evil}}
    folder = tmp_path / "<b>bold&amp;"
    runs = [make_run(folder, lines=lines, metrics=metrics, config=config), make_run(tmp_path / "plain")]
    (folder / "environment.json").write_text(json.dumps({"python": evil, evil: evil}))
    (folder / "stages.json").write_text(json.dumps({evil: {evil: evil}}))
    for page in (Page(write_report(runs[:1])), Page(write_report(runs))):
        assert len(page.all("script")) == 2
        assert not page.all("b")
        assert all(image["src"].startswith("data:image/png") for image in page.all("img"))
        assert not [name for _, found in page.elements for name in found if name.startswith("on")]
        assert evil in " ".join(page.words)
        assert "<b>bold&amp;" in page.text


def test_title_and_paper_come_from_the_method_card(tmp_path, monkeypatch):
    package = tmp_path / "kd_blendlab" / "methods"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "blend.py").write_text(
        '"""Blended Distillation (arXiv 2401.01234, 2024).\n\nL = CE\n"""\nraise ImportError\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("blend", "kd_blendlab.methods.blend:METHOD", "kd.methods")
    monkeypatch.setattr(kdcore.method, "entry_points", lambda group: [point])
    page = Page(write_report([make_run(tmp_path / "run")]))
    assert "Blended Distillation" in page.text
    assert [a["href"] for a in page.all("a") if a["href"].startswith("http")] == ["https://arxiv.org/abs/2401.01234"]


def test_method_that_is_not_installed_still_has_a_report(tmp_path):
    page = Page(write_report([make_run(tmp_path / "run", config={**CONFIG, "method": "never_installed"})]))
    assert "never_installed (method not installed here)" in page.text
    assert "No pictures:" in page.text
    assert not page.all("li", class_="sample")
    assert page.all("table", class_="heat")


# ---------------------------------------------------------------- pictures


def test_disagreements_come_first_and_are_marked(tmp_path, predictions):
    items = [sample("cat", "cat", "cat", 1), sample("dog", "dog", "cat", 2), sample("dog", "cat", "cat", 3)]
    predictions.predict = lambda config, artefacts, count: items
    page = Page(write_report([make_run(tmp_path / "run")]))
    assert [found["class"] for found in page.all("li", class_="sample")] == ["sample disagree", "sample", "sample"]
    assert "disagree on 1 of 3 inputs; these come first" in page.text
    assert page.text.count("✓") == 3  # cat/cat: both; dog/dog/cat: the teacher; dog/cat/cat: none
    assert page.text.count("✗") == 3


def boom(config, artefacts, count):
    raise RuntimeError("weights are gone")


@pytest.mark.parametrize(
    ("predict", "reason"),
    [
        (None, "method blend has no predict function"),
        (boom, "weights are gone (RuntimeError)"),
        (lambda *_: [], "returned none"),
        (lambda *_: [{**sample("a", "a", "a"), "image": np.zeros((2, 2))}], "expected uint8"),
        (lambda *_: [{"image": np.zeros((2, 2), np.uint8)}], "KeyError"),
    ],
)
def test_page_says_why_there_are_no_pictures(tmp_path, predictions, predict, reason):
    predictions.predict = predict
    page = Page(write_report([make_run(tmp_path / "run")]))
    assert "No pictures: " in page.text
    assert reason in page.text


def test_no_samples_asked_means_no_prediction_is_made(tmp_path, predictions):
    predictions.predict = boom
    page = Page(write_report([make_run(tmp_path / "run")], samples=0))
    assert "No pictures" not in page.text
    assert "samples" not in [found.get("id") for _, found in page.elements]


# ---------------------------------------------------------------- rows of pictures


def picture_row(caption: str, **images) -> dict:
    return {"caption": caption, "images": {name.replace("_", " "): image for name, image in images.items()}}


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width), 200, np.uint8)


def test_rows_of_pictures_become_a_table(tmp_path, predictions):
    first = picture_row("seven", path=grey(8, 53), teacher=grey(8, 8), student=grey(8, 8))
    second = picture_row("", teacher=np.zeros((14, 7, 3), np.uint8), step_400=grey(28, 28), student=grey(64, 64))
    predictions.predict = lambda config, artefacts, count: [first, second]
    page = Page(write_report([make_run(tmp_path / "run")]))
    assert "Pictures" in page.text
    assert "Predictions" not in page.text
    table = page.source.split('<table class="pictures">')[1].split("</table>")[0]
    cells = [re.findall(r'<th scope="col">(.*?)</th>', row) for row in table.split("<tr>")[1:2]]
    assert cells == [["path", "teacher", "student", "step 400"]]
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == ["seven", "2"]
    assert [re.findall(r'alt="(.*?)"|<td>(–)</td>', row) for row in table.split("<tr>")[2:]] == [
        [("seven: path", ""), ("seven: teacher", ""), ("seven: student", ""), ("", "–")],
        [("", "–"), ("row 2: teacher", ""), ("row 2: student", ""), ("row 2: step 400", "")],
    ]
    sizes = [(int(image["width"]), int(image["height"])) for image in page.all("img")]
    assert sizes == [(742, 112), (112, 112), (112, 112), (112, 224), (128, 128), (112, 112)]  # whole multiples
    assert len(page.all("div", **{"class": "scroll", "aria-label": "Pictures"})) == 1


def test_large_pictures_are_shrunk_and_strips_keep_their_height(tmp_path, predictions):
    row = picture_row("x", single=grey(512, 512), strip=grey(512, 3 * 512))
    predictions.predict = lambda config, artefacts, count: [row]
    page = Page(write_report([make_run(tmp_path / "run")]))
    headers = [base64.b64decode(image["src"].split(",")[1])[16:24] for image in page.all("img")]
    assert [struct.unpack(">II", header) for header in headers] == [(128, 128), (384, 128)]


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ([picture_row("a", student=grey(2, 2)), {"images": {"x": grey(2, 2)}}], "row 2: caption: expected a string"),
        ([{"caption": "a", "images": {}}], "row 1: images: expected pictures by column, got {}"),
        ([{"caption": "a", "images": [grey(2, 2)]}], "row 1: images: expected pictures by column"),
        ([picture_row("a", student=np.zeros((2, 2)))], "row 1, column 'student': image: expected uint8"),
        (
            [picture_row("a", student=np.zeros((1, 2, 2, 3), np.uint8))],
            "row 1, column 'student': image: expected uint8",
        ),
        ([picture_row("a", student=np.zeros((0, 4), np.uint8))], "row 1, column 'student': image: expected uint8"),
        ([picture_row("a", student=np.uint8(3))], "row 1, column 'student': image: expected uint8"),
        ([picture_row("a", student=grey(2, 2)), sample("a", "a", "a")], "1 of 2 items are rows of 'images'"),
    ],
)
def test_rows_of_another_form_are_refused_with_a_sentence(tmp_path, predictions, items, reason):
    predictions.predict = lambda config, artefacts, count: items
    page = Page(write_report([make_run(tmp_path / "run")]))
    assert len(page.all("p", class_="notice")) == 1
    assert "No pictures: " in page.text
    assert reason in page.text
    assert not page.all("img")


def test_captions_and_columns_are_escaped(tmp_path, predictions):
    evil = '"><script>alert(1)</script>'
    predictions.predict = lambda config, artefacts, count: [{"caption": evil, "images": {evil: grey(2, 2)}}]
    page = Page(write_report([make_run(tmp_path / "run")]))
    assert len(page.all("script")) == 2
    assert page.all("img")[0]["alt"] == f"{evil}: {evil}"


def test_runs_with_pictures_and_with_predictions_side_by_side(tmp_path, predictions):
    given = iter([[picture_row("a", student=grey(2, 2))], [sample("a", "a", "a")]])
    predictions.predict = lambda config, artefacts, count: next(given)
    page = Page(write_report([make_run(tmp_path / "a"), make_run(tmp_path / "b")]))
    assert "Pictures and predictions" in page.text
    assert len(page.all("table", class_="pictures")) == len(page.all("li", class_="sample")) == 1


# ---------------------------------------------------------------- profiles


def profile_line(step: int, values: list, *, name="gradient norm", stage="student", x=("low", "middle", "high")) -> str:
    return json.dumps(
        {"time": 1.7e9, "kind": "profile", "name": name, "stage": stage, "step": step, "x": x, "values": values}
    )


def chart_data(page: Page) -> list[dict]:
    (data,) = [json.loads(text) for text in scripts(page.source) if text.startswith("[")]
    return data


def test_profiles_are_a_chart_per_name_and_stage(tmp_path):
    lines = [train_line(1, 1.0)] + [profile_line(step, [1.0 * step, None, 0.5]) for step in range(100, 1300, 100)]
    lines += [profile_line(50, [1, 2, 3], stage="warm-up"), profile_line(50, [1, 2], name="other", x=("a", "b"))]
    run = make_run(tmp_path / "run", lines=lines)
    assert [(p.stage, p.name, len(p.curves)) for p in read_run(run).profiles] == [
        ("student", "gradient norm", 12),
        ("warm-up", "gradient norm", 1),
        ("student", "other", 1),
    ]
    page = Page(write_report([run]))
    first, second, third = chart_data(page)[-3:]
    assert [line["run"] for line in first["lines"]] == [f"step {s}" for s in (100, 400, 700, 900, 1200)]
    assert first["lines"][1]["any"] == [[0, 1, 2], [400.0, None, 0.5]]
    assert [line["colour"] for line in first["lines"]] == [0, 1, 2, 3, 4]
    assert (first["labels"], third["labels"]) == (["low", "middle", "high"], ["a", "b"])
    assert len(second["lines"]) == len(third["lines"]) == 1
    charts = page.all("figure", class_="chart")
    assert len(charts) == 7  # ce, kd, total, learning rate and three profiles
    assert "gradient norm stage student step 100 step 400" in page.text
    assert "step 1,200" in page.text
    drawn = page.source.split('data-chart="4"')[1].split("</figure>")[0]
    assert re.findall(r'text-anchor="(?:middle|end)">(low|middle|high)<', drawn) == 2 * ["low", "middle", "high"]
    assert all(d.count("h0") == 2 for d in re.findall(r'<path class="line c\d" d="(M46[^"]*)"', drawn))  # a gap between
    spoken = [svg["aria-label"] for svg in page.all("svg", role="img")][4]
    assert spoken.startswith(
        "Line chart of gradient norm over low to high, stage student. Step 100: between 0.5 and 100."
    )


def test_profiles_of_several_runs_are_charts_side_by_side(tmp_path):
    for name in ("a", "b"):
        lines = [profile_line(10, [1, 2, 3]), profile_line(10, [3, 2, 1], name="other")]
        make_run(tmp_path / name, lines=lines, metrics=False)
    page = Page(write_report([tmp_path / "a", tmp_path / "b"]))
    titles = re.findall(r"<strong>(gradient norm|other)</strong> <span class=\"note\">(.*?)</span>", page.source)
    assert titles == [(name, f"{run}, stage student") for name in ("gradient norm", "other") for run in ("a", "b")]


def test_profile_logged_again_replaces_the_earlier_one(tmp_path):
    lines = [profile_line(10, [1, 2, 3]), profile_line(20, [1, 1, 1]), profile_line(10, [7, None, math.nan])]
    (profile,) = read_run(make_run(tmp_path / "run", lines=lines)).profiles
    assert list(profile.curves) == [10, 20]
    np.testing.assert_array_equal(profile.curves[10], [7, np.nan, np.nan])


def test_profiles_that_do_not_fit_are_counted(tmp_path):
    lines = [profile_line(1, [1, 2]), profile_line(2, [], x=()), profile_line(3, None), profile_line(4, [1, 2, "x"])]
    read = read_run(make_run(tmp_path / "run", lines=lines))
    assert list(read.profiles[0].curves) == [4]
    assert np.isnan(read.profiles[0].curves[4][2])
    assert read.notes == ["metrics.jsonl: 3 profiles were skipped whose 'x' and 'values' are not lists of one length."]


def test_a_profile_with_nothing_and_one_with_one_label(tmp_path):
    lines = [profile_line(1, [None, None, None]), profile_line(1, [2.0], name="one", x=("all",))]
    page = Page(write_report([make_run(tmp_path / "run", lines=lines)]))
    assert "no value above 0: the axis stays linear" in page.text
    assert "nan" not in "".join(path["d"] for path in page.all("path"))


def test_terms_of_every_player_are_charts_of_their_own(tmp_path):
    def line(player: str, **terms: float) -> str:
        record = json.loads(train_line(10, 1.0))
        record |= {"player": player, "terms": {name: {"raw": v, "weighted": v} for name, v in terms.items()}}
        return json.dumps(record)

    lines = [line("generator", matching=1.0, adversarial=2.0), line("fake", denoising=3.0, discriminator=4.0)]
    lines.append(line("discriminator", discriminator=5.0))
    page = Page(write_report([make_run(tmp_path / "run", lines=lines)]))
    headings = re.findall(r"<h3>(.*?)</h3>", page.source)
    assert headings == [f"stage student, player {player}" for player in ("generator", "fake", "discriminator")]
    groups = [re.findall(r"<strong>(.*?)</strong>", part) for part in page.source.split("<h3>")[1:]]
    both = ["total (weighted sum)", "learning rate"]
    assert groups == [
        ["matching", "adversarial", *both],
        ["denoising", "discriminator", *both],
        ["discriminator", *both],
    ]
    values = [entry["lines"][0].get("any") for entry in chart_data(page)]
    assert [v[1][0] for v in (values[0], values[1], values[4], values[5], values[8])] == [1.0, 2.0, 3.0, 4.0, 5.0]


# ---------------------------------------------------------------- several runs


def test_page_of_several_runs(tmp_path):
    better = {"student/accuracy": 0.95, "student/nll": 0.35, "student/ece": 0.01, "student/parameters": 10}
    worse = {"student/accuracy": 0.9, "student/nll": 0.25, "student/ece": 0.01, "student/parameters": 20}
    a = make_run(tmp_path / "runs" / "a", metrics={**better, "confusion_matrix": [[2, 0], [0, 2]]})
    b = make_run(tmp_path / "runs" / "b", metrics=worse, config={**CONFIG, "method_args": {"alpha": 0.9, "extra": 1}})
    output = write_report([a, b])
    assert output == (tmp_path / "runs").resolve() / "report.html"
    page = Page(output)
    assert len(page.all("figure", class_="chart")) == 6
    assert len(page.all("path", class_="c1")) > len(page.all("figure", class_="chart"))
    assert len(page.all("td", class_="best")) == 2  # accuracy and nll; ece ties, parameters have no better direction
    assert "95.00 % best" in page.text
    assert "0.25 best" in page.text
    differences = page.text.split("Config differences")[2].split("Training")[0]
    assert "method_args.alpha 0.5 0.9" in differences
    assert "method_args.extra not set 1" in differences
    assert "seed" not in differences
    assert len(page.all("table", class_="heat")) == 1


def test_equal_configs_are_said_to_be_equal(tmp_path):
    page = Page(write_report([make_run(tmp_path / "a"), make_run(tmp_path / "b")]))
    assert "The configs are equal." in page.text


def test_runs_with_equal_names_are_told_apart(tmp_path):
    runs = read_runs([make_run(tmp_path / "x" / "seed-0"), make_run(tmp_path / "y" / "seed-0")])
    assert [run.label for run in runs] == ["x/seed-0", "y/seed-0"]


# ---------------------------------------------------------------- unfinished and broken runs


def test_unfinished_run_says_so(tmp_path, predictions):
    predictions.predict = boom
    run = make_run(tmp_path / "run", metrics=False, lines=[train_line(s, 1.0) for s in range(1, 8)])
    page = Page(write_report([run]))
    assert "no results (metrics.json)" in page.text
    assert "no stage finished; last line of the log: stage student, step 7" in page.text
    assert "The run is not finished." in page.text
    assert len(page.all("figure", class_="chart")) == 4


def test_run_that_failed_before_its_first_line(tmp_path):
    run = make_run(tmp_path / "run", metrics=False)
    (run / "metrics.jsonl").unlink()
    page = Page(write_report([run]))
    assert "metrics.jsonl is missing" in page.text
    assert "No training step was logged." in page.text


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "stages.json", "metrics.json"])
@pytest.mark.parametrize("content", [b"{\xff", b"[1, 2", b"- 1\n", b"[]", b""])
def test_broken_files_become_notes(tmp_path, name, content):
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(content)
    page = Page(write_report([run]))
    assert any(f"{name} {end}" in page.text for end in ("cannot be read.", "holds no mapping."))
    assert len(page.all("figure", class_="chart")) == 6


def test_log_of_a_killed_and_resumed_process(tmp_path):
    lines = [train_line(s, 1.0) for s in (10, 20, 30)] + [eval_line(30, accuracy=0.1)]
    lines += [train_line(s, 5.0) for s in (20, 30, 40)] + [eval_line(30, accuracy=0.6)]
    run = make_run(tmp_path / "run", lines=lines)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(train_line(50, 1.0)[:60])
    read = read_run(run)
    (training,) = read.trainings
    assert training.terms["ce"].raw.steps.tolist() == [10, 20, 30, 40]
    assert training.terms["ce"].raw.values.tolist() == [1.0, 5.0, 5.0, 5.0]
    assert read.validations[0].metrics["accuracy"].values.tolist() == [0.6]
    assert read.notes == []


def test_broken_lines_inside_the_log_are_counted(tmp_path):
    lines = [train_line(1, 1.0), "{broken", "[1, 2]", "", train_line(2, 1.0), '{"kind": "train", "step": "three"}']
    read = read_run(make_run(tmp_path / "run", lines=lines))
    assert read.trainings[0].scalars["total"].steps.tolist() == [1, 2]
    assert read.notes == ["metrics.jsonl: 2 broken lines were skipped (the first is line 2)."]


def test_values_that_are_not_finite_are_gaps(tmp_path):
    lines = [train_line(s, v) for s, v in enumerate((1.0, 2.0, math.nan, math.inf, 3.0, 4.0), start=1)]
    lines.append(
        '{"kind": "train", "stage": "student", "player": "student", "step": 7, "terms": {"ce": null}, "lr": null}'
    )
    run = make_run(tmp_path / "run", lines=lines)
    values = read_run(run).trainings[0].terms["ce"].raw.values
    np.testing.assert_array_equal(values, [1, 2, np.nan, np.nan, 3, 4, np.nan])
    page = Page(write_report([run]))
    (line,) = page.all("path", class_="line")[:1]
    assert line["d"].count("M") == 2
    assert "nan" not in line["d"]
    assert "not finite" in page.text


def test_run_with_nothing_but_nan(tmp_path):
    page = Page(write_report([make_run(tmp_path / "run", lines=[train_line(s, math.nan) for s in (1, 2)])]))
    assert "no finite value" in page.text
    assert "no value above 0: the axis stays linear" in page.text


def test_terms_that_are_logged_now_and_then_have_no_gaps(tmp_path):
    lines = [train_line(s, 1.0) for s in range(1, 9)]
    for index in (0, 4, 7):
        record = json.loads(lines[index])
        record["terms"]["rare"] = {"raw": 1.0, "weighted": 1.0}
        lines[index] = json.dumps(record)
    term = read_run(make_run(tmp_path / "run", lines=lines)).trainings[0].terms["rare"]
    assert term.raw.steps.tolist() == [1, 5, 8]


def test_confusion_matrix_that_is_none_is_noted(tmp_path):
    for index, matrix in enumerate(([[1, 2]], "text", [], [[1, None], [0, 1]], [[math.nan]])):
        page = Page(write_report([make_run(tmp_path / str(index), metrics={"confusion_matrix": matrix})]))
        assert "'confusion_matrix' is not a square matrix of counts" in page.text


def test_many_classes_become_a_picture_and_a_list(tmp_path):
    counts = (np.eye(60) * 9).astype(int)
    counts[7, 11] = 5
    page = Page(write_report([make_run(tmp_path / "run", metrics={"confusion_matrix": counts.tolist()})]))
    assert not page.all("table", class_="heat")
    assert "60 classes" in page.all("img", class_="heatmap")[0]["alt"]
    assert "7 11 5 35.7 %" in page.text


# ---------------------------------------------------------------- bad input


def test_folder_that_is_no_run(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"other': not a run directory; .*config\.yaml.*metrics\.jsonl"):
        write_report([tmp_path / "other"])
    with pytest.raises(InputError, match=r"missing': no such folder"):
        write_report([tmp_path / "missing"])


def test_bad_arguments(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(InputError, match="at least one run"):
        write_report([])
    with pytest.raises(InputError, match="given twice"):
        write_report([run, tmp_path / "run" / ".." / "run"])
    with pytest.raises(InputError, match="samples = -1"):
        write_report([run], samples=-1)
    with pytest.raises(InputError, match="is a folder"):
        write_report([run], tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        write_report([run], run / "config.yaml" / "report.html")


def test_output_folder_is_made(tmp_path):
    target = tmp_path / "new" / "deep" / "page.html"
    assert write_report([make_run(tmp_path / "run")], target) == target
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]
