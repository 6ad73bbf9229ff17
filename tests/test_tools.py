"""tools/evidence.py and tools/new_method.py on small trees."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import evidence
import new_method
from kdcore.compare import summary

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------- evidence


def comparison(**changes):
    """Two arms beside the method; seeds, means and differences by hand, in shares."""

    def arm(accuracy, deviation, **more):
        return {
            "overrides": {},
            "runs": [],
            "mean": {"student/accuracy": accuracy, "teacher/accuracy": 0.95, "agreement": 0.5, "flips": 0.0123},
            "std": {"student/accuracy": deviation, "teacher/accuracy": 0.0, "agreement": 0.1, "flips": 0.001},
            **more,
        }

    def minus(mean, error, noise):
        entry = {"mean": mean, "standard_error": error, "n": 3, "within_noise": noise}
        return {"student/accuracy": entry, "flips": {**entry, "mean": -0.5, "standard_error": 0.25}}

    return {
        "config": "foo/small",
        "method": "foo",
        "seeds": [0, 1, 2],
        "overrides": [],
        "arms": {
            "ce": arm(0.8, 0.01, overrides={"method": "kd", "method_args.alpha": 0.0}),
            "foo": arm(0.9, 0.02),
            "half": arm(0.895, 0.02, overrides={"method_args.alpha": 0.5}),
        },
        "differences": {"ce": minus(0.1, 0.012, False), "half": minus(0.005, 0.01, True)},
        **changes,
    }


@pytest.fixture
def tree(tmp_path):
    package = tmp_path / "packages/kd-x"
    for folder in ("src/kd_x/methods", "src/kd_x/configs/foo", "evidence"):
        (package / folder).mkdir(parents=True)
    (package / "pyproject.toml").write_text(
        '[project]\nname = "kd-x"\n[project.entry-points."kd.methods"]\n'
        'foo = "kd_x.methods.foo:METHOD"\nbar = "kd_x.methods.bar:METHOD"\n'
    )
    (package / "src/kd_x/methods/foo.py").write_text('"""Foo for\nBar (arXiv 2401.00001, 2024).\n\nL = 1\n"""\n')
    (package / "src/kd_x/methods/bar.py").write_text('"""Bar (ICML, 1999).\n\nL = 2\n"""\n')
    (package / "src/kd_x/configs/foo/small.yaml").write_text("method: foo\ndata: {name: digits}\n")
    (package / "evidence/foo.json").write_text(json.dumps(comparison()))
    (tmp_path / "README.md").write_text(f"# kd\n{evidence.METHODS[0]}\nold\n{evidence.METHODS[1]}\nafter\n")
    (package / "README.md").write_text(f"# kd-x\n{evidence.EVIDENCE[0]}\n{evidence.EVIDENCE[1]}\n")
    return tmp_path


def rows(path, key):
    lines = path.read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(f"| `{key}`")]


def test_the_root_table_shows_means_differences_and_noise(tree):
    assert evidence.main([], tree) == 0
    link = "[Foo for Bar](https://arxiv.org/abs/2401.00001), 2024"
    (row,) = rows(tree / "README.md", "foo")
    assert row == ["`foo`", link, "digits, 3 seeds", "95.00", "90.00 ± 2.00", "**+10.00 ± 1.20**", "–"]
    assert rows(tree / "README.md", "bar") == [["`bar`", "Bar (ICML, 1999)", *["not measured"] * 5]]
    text = (tree / "README.md").read_text()
    assert text.startswith("# kd\n")
    assert text.endswith("after\n")
    assert "old" not in text


def test_the_package_table_shows_every_arm_and_the_methods_own_metrics(tree):
    evidence.main([], tree)
    path = tree / "packages/kd-x/README.md"
    assert "| student accuracy, % | `foo` minus arm | flips | `foo` minus arm |" in path.read_text()
    (own,), (half,), (ce,) = rows(path, "foo"), rows(path, "half"), rows(path, "ce")
    assert own[1:] == ["the method", "90.00 ± 2.00", "", "0.0123 ± 0.001", ""]
    assert half[3] == "+0.50 ± 1.00, within noise"
    assert ce[1] == '`method="kd"`, `method_args.alpha=0.0`'
    assert ce[5] == "**−0.5 ± 0.25**"


def test_a_second_data_set_is_a_row_and_notes_are_shown(tree):
    folder = tree / "packages/kd-x/evidence"
    (folder / "foo-mnist.json").write_text(json.dumps(comparison(overrides=["data.name=mnist"])))
    (folder / "notes.yaml").write_text("foo-mnist: >\n  Too easy\n  to tell.\n")
    evidence.main([], tree)
    assert [row[2] for row in rows(tree / "README.md", "foo")] == ["digits, 3 seeds", "mnist, 3 seeds"]
    assert "- `foo-mnist`: Too easy to tell.\n" in (tree / "README.md").read_text()
    assert "with `data.name=mnist`" in (tree / "packages/kd-x/README.md").read_text()


def test_one_seed_has_no_error_bar(tree):
    values = comparison(seeds=[0])
    for entry in values["differences"].values():
        for metric in entry.values():
            metric.update(standard_error=None, n=1)
    (tree / "packages/kd-x/evidence/foo.json").write_text(json.dumps(values))
    evidence.main([], tree)
    assert rows(tree / "README.md", "foo")[0][2:] == ["digits, 1 seed", "95.00", "90.00", "+10.00 (one seed)", "–"]


HEADLINES = """
headlines:
  - metric: frechet
    title: Fréchet distance
    better: lower
    teachers: {"teacher, 1 step": teacher_1, "teacher, 50 steps": teacher_50}
    also: [recall, accuracy]
  - {metric: energy_distance, title: energy distance, better: lower, teachers: {"teacher, 50 steps": teacher_50}}
"""


def generation(metric="frechet"):
    """A comparison of generators on three seeds: student minus teacher is 3, 4, 5 in one step and 0, 1, -1 in 50."""

    def arm(shift):
        runs = []
        for seed, student in enumerate((4.0, 6.0, 8.0)):
            values = {f"student/{metric}": student + shift, "student/recall": 0.5, "teacher_1/recall": 0.25}
            values |= {f"teacher_1/{metric}": (1.0, 2.0, 3.0)[seed], f"teacher_50/{metric}": (4.0, 5.0, 9.0)[seed]}
            runs.append({"seed": seed, "metrics": values})
        return {"overrides": {}, "runs": runs, **summary([run["metrics"] for run in runs])}

    def minus(mean, error, noise):
        return {f"student/{metric}": {"mean": mean, "standard_error": error, "n": 3, "within_noise": noise}}

    return comparison(
        arms={"foo": arm(0.0), "no_gan": arm(2.0), "half": arm(0.25)},
        differences={"no_gan": minus(-2.0, 0.5, False), "half": minus(-0.25, 0.5, True)},
    )


@pytest.fixture
def generators(tree):
    folder = tree / "packages/kd-x/evidence"
    (folder / "headline.yaml").write_text(HEADLINES, encoding="utf-8")
    (folder / "foo.json").write_text(json.dumps(generation()))
    (folder / "foo-points.json").write_text(json.dumps(generation("energy_distance")))
    assert evidence.main([], tree) == 0
    return tree


def test_a_package_names_what_its_root_tables_lead_with(generators):
    text = (generators / "README.md").read_text(encoding="utf-8")
    first, second = text.split("energy distance, lower is better:")
    assert "Fréchet distance, lower is better:" in first
    head = "| key | paper | data | teacher, 1 step | teacher, 50 steps | student | student minus each arm |"
    assert head in first
    assert head.replace("teacher, 1 step | ", "") in second
    images, points = rows(generators / "README.md", "foo")
    against = "`no_gan` **−2 ± 0.5**<br>`half` −0.25 ± 0.5, within noise"
    assert images[2:] == ["digits, 3 seeds", "2", "6", "6 ± 2", against]
    assert points[2:] == ["points, 3 seeds", "6", "6 ± 2", against]
    assert text.count("`bar`") == 1  # the method without a file is in the first table alone
    assert "`bar`" in first


def test_a_packages_own_table_compares_with_the_teachers_of_the_same_runs(generators):
    path = generators / "packages/kd-x/README.md"
    text = path.read_text(encoding="utf-8").split("### foo-points")[0]
    (head,) = [line for line in text.splitlines() if line.startswith("| arm")]
    assert head == (
        "| arm | what differs | student Fréchet distance, lower is better | `foo` minus arm "
        "| student recall | `foo` minus arm |"
    )
    one, fifty = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| teacher, ")
    )
    # The paired differences 3, 4, 5 have mean 4 and standard error 1 / sqrt(3); 0, 1, -1 have mean 0.
    assert one == ["teacher, 1 step", "not distilled", "2 ± 1", "**+4 ± 0.577**", "0.25 ± 0", "**+0.25 ± 0**"]
    assert fifty == ["teacher, 50 steps", "not distilled", "6 ± 2.65", "+0 ± 0.577, within noise", "–", "–"]
    assert "| `no_gan` | the method | 8 ± 2 | **−2 ± 0.5** | 0.5 ± 0 | – |" in text


BAD_HEADLINES = [
    ("headlines: []", "headlines"),
    ("headlines: [{metric: accuracy, teachers: {t: teacher}, teecher: 1}]", "teecher"),
    ("headlines: [{metric: accuracy, better: bigger, teachers: {t: teacher}}]", "better"),
    ("headlines: [{metric: psnr, teachers: {t: teacher}}]", "no student/psnr"),
    ("- accuracy", "headline.yaml"),
]


@pytest.mark.parametrize(("text", "message"), BAD_HEADLINES)
def test_a_broken_headline_file_is_named(tree, capsys, text, message):
    (tree / "packages/kd-x/evidence/headline.yaml").write_text(text)
    assert evidence.main([], tree) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "headline.yaml" in said


def test_a_metric_that_leads_is_not_guessed(tree, capsys):
    (tree / "packages/kd-x/evidence/foo.json").write_text(json.dumps(generation()))
    assert evidence.main([], tree) == 2
    assert "foo.json: no student/accuracy" in capsys.readouterr().err


def test_check_tells_a_stale_readme_and_changes_nothing(tree, capsys):
    before = (tree / "README.md").read_text()
    assert evidence.main(["--check"], tree) == 1
    assert "README.md is stale" in capsys.readouterr().err
    assert (tree / "README.md").read_text() == before
    assert evidence.main([], tree) == 0
    assert evidence.main(["--check"], tree) == 0
    (tree / "packages/kd-x/evidence/foo.json").write_text(json.dumps(comparison(seeds=[0, 1])))
    assert evidence.main(["--check"], tree) == 1


BROKEN = [
    ("foo.json", "{", "foo.json: not JSON"),
    ("foo.json", "{}", "foo.json: lacks arms, config"),
    ("foo.json", json.dumps(comparison(method="bar")), "holds method 'bar', expected 'foo'"),
    ("foo.json", json.dumps(comparison(differences={})), "no differences for arm 'ce'"),
    ("foo.json", json.dumps(comparison(config="foo/large")), "config 'foo/large'"),
    ("nope.json", json.dumps(comparison()), "no method 'nope'"),
    ("notes.yaml", "baz: hm", "'baz' is no evidence file"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN)
def test_a_broken_file_is_named(tree, capsys, name, text, message):
    (tree / "packages/kd-x/evidence" / name).write_text(text)
    assert evidence.main([], tree) == 2
    assert message in capsys.readouterr().err


def test_missing_markers_are_named(tree, capsys):
    (tree / "README.md").write_text("# kd\n")
    assert evidence.main([], tree) == 2
    assert "expected the markers" in capsys.readouterr().err


def test_the_readmes_of_the_workspace_are_up_to_date(capsys):
    assert evidence.main(["--check"]) == 0, capsys.readouterr().err


# ---------------------------------------------------------------- new_method


@pytest.fixture
def workspace(tmp_path):
    """The packages, without their tests and configs."""
    ignore = shutil.ignore_patterns("tests", "configs", "evidence", "__pycache__")
    shutil.copytree(ROOT / "packages", tmp_path / "packages", ignore=ignore)
    return tmp_path


def make(root, package="kd-classification", key="foo_bar", title="Foo for Bar", arxiv="2401.00001"):
    return new_method.main(["--package", package, "--key", key, "--title", title, "--arxiv", arxiv], root)


def registered(root, package):
    project = tomllib.loads((root / "packages" / package / "pyproject.toml").read_text())["project"]
    return project.get("entry-points", {}).get("kd.methods", {})


@pytest.mark.parametrize("package", ["kd-classification", "kd-llm"])
def test_the_skeleton_is_whole_and_registered(workspace, package):
    before = registered(workspace, package)
    assert make(workspace, package) == 0
    module = package.replace("-", "_")
    assert registered(workspace, package) == {**before, "foo_bar": f"{module}.methods.foo_bar:METHOD"}
    source = workspace / f"packages/{package}/src/{module}"
    tree = ast.parse((source / "methods/foo_bar.py").read_text())
    assert (ast.get_docstring(tree) or "").startswith("Foo for Bar (arXiv 2401.00001, 2024).\n")
    for name in ("small", "paper"):
        assert yaml.safe_load((source / f"configs/foo_bar/{name}.yaml").read_text())["method"] == "foo_bar"
    files = [source / "methods/foo_bar.py", workspace / f"packages/{package}/tests/test_foo_bar.py"]
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", *files]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_second_method_goes_into_the_same_table(workspace):
    before = list(registered(workspace, "kd-llm"))
    make(workspace, "kd-llm", "a")
    make(workspace, "kd-llm", "b")
    assert list(registered(workspace, "kd-llm")) == [*before, "a", "b"]


def snapshot(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


REFUSED = [
    ({"package": "kd-lm"}, "did you mean 'kd-llm'?"),
    ({"key": "kd"}, "kd-classification registers a method of this key"),
    ({"key": "Foo"}, "lower case"),
    ({"key": "class"}, "lower case"),
    ({"key": "../x"}, "lower case"),
    ({"arxiv": "240.1"}, "expected an identifier"),
    ({"arxiv": "2413.00001"}, "expected an identifier"),
    ({"title": " "}, "--title"),
    ({"title": 'a """ b'}, "--title"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_arguments_write_nothing(workspace, capsys, arguments, message):
    before = snapshot(workspace)
    assert make(workspace, **arguments) == 2
    assert message in capsys.readouterr().err
    assert snapshot(workspace) == before


def test_nothing_is_overwritten(workspace, capsys):
    (workspace / "packages/kd-classification/tests").mkdir()
    (workspace / "packages/kd-classification/tests/test_foo_bar.py").write_text("mine")
    before = snapshot(workspace)
    assert make(workspace) == 2
    assert "exists; nothing is overwritten" in capsys.readouterr().err
    assert snapshot(workspace) == before


@pytest.mark.slow
def test_the_skeleton_runs_and_its_test_fails_until_it_is_written(workspace):
    """Its configs validate; what is not written yet is said, by the test and by the loss."""
    make(workspace)
    package = workspace / "packages/kd-classification"
    points = "\n".join(f"{key} = {value}" for key, value in registered(workspace, package.name).items())
    metadata = package / "src/kd_classification-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kd-classification\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(f"[kd.methods]\n{points}\n")
    environment = {**os.environ, "PYTHONPATH": str(package / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    command += ["-m", "slow or not slow", package / "tests/test_foo_bar.py"]
    done = subprocess.run(command, env=environment, cwd=workspace, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 2 passed" in done.stdout
    assert "foo_bar: write the paper's equations" in done.stdout
    assert "NotImplementedError: foo_bar: the loss is not written yet" in done.stdout
