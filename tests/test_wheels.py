"""The built wheels: what they hold, that they install without a compiler, and a training from them alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir())
SHORT = ["train.epochs=2", "teacher.train.epochs=2"]
SOURCE_ONLY = ["fpsample", "pyliblzfse"]  # of nerfstudio; pip builds them in seconds

pytestmark = pytest.mark.slow


def run(*command: str | Path, **options) -> str:
    # Neither this test's environment nor its interpreter's settings may leak into the new one.
    environment = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "PYTHONPATH"}}
    environment.update(options.pop("environment", {}))
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False, timeout=900, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """Package -> its wheel."""
    folder = tmp_path_factory.mktemp("wheels")
    run("uv", "build", "--wheel", "--all-packages", "--out-dir", folder, cwd=ROOT)
    return {path.name.split("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("package", ["kdcore", *PACKAGES])
def test_a_wheel_holds_every_file_of_its_package(wheels, package):
    source = ROOT / ("shared" if package == "kdcore" else "packages") / package / "src"
    wanted = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    found = {name for name in names(wheels[package]) if ".dist-info/" not in name}
    assert found == {name for name in wanted if "__pycache__" not in name}


def test_wheels_hold_what_is_not_code(wheels):
    assert {"kdcore/py.typed", "kdcore/report/assets/report.css"} <= names(wheels["kdcore"])
    assert "kd_classification/configs/dhkd/small.yaml" in names(wheels["kd-classification"])


@pytest.mark.parametrize("package", PACKAGES)
def test_what_an_installer_chooses_for_a_wheel_has_wheels(wheels, package, tmp_path):
    """Without the workspace's constraints and overrides, which no user has: nothing is compiled while installing."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    resolve = ["uv", "pip", "compile", "--quiet", "--exclude-newer", settings["exclude-newer"]]
    asked, chosen = tmp_path / "asked.txt", tmp_path / "chosen.txt"
    asked.write_text("".join(f"{name} @ {wheels[name].as_uri()}\n" for name in ("kdcore", package)))
    run(*resolve, asked, "--output-file", chosen, cwd=tmp_path)
    assert "torch==" in chosen.read_text()
    sources = [argument for name in SOURCE_ONLY for argument in ("--no-binary", name)]
    run(*resolve, "--no-deps", "--only-binary", ":all:", *sources, chosen, cwd=tmp_path)


def test_the_wheels_install_and_train_in_an_empty_environment(wheels, tmp_path):
    """From a folder that has nothing of the workspace in it, with the versions the workspace is tested with."""
    environment = tmp_path / "environment"
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    run("uv", "venv", "--python", sys.executable, environment, cwd=tmp_path)
    constraints = tmp_path / "constraints.txt"
    listed = run("uv", "pip", "freeze", "--python", sys.executable, "--exclude-editable", cwd=tmp_path)
    constraints.write_text("\n".join(line for line in listed.splitlines() if "==" in line))
    run(
        *("uv", "pip", "install", "--python", python, "--constraint", constraints),
        *(wheels["kdcore"], wheels["kd-classification"]),
        cwd=tmp_path,
    )
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    where = run(python, "-c", "import kd_classification; print(kd_classification.__file__)", cwd=foreign)
    assert Path(where.strip()).is_relative_to(environment)
    kd = python.with_name("kd")
    settings = {"KD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run(kd, "train", "dhkd/small", *SHORT, cwd=foreign, environment=settings)
    folder = foreign / "runs/dhkd-small-seed0"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["student/accuracy"] <= 1
    assert (folder / "student/model.safetensors").is_file()
    assert [path.name for path in foreign.iterdir()] == ["runs"]
