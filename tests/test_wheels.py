"""The built wheels of kd-classification and kdcore, alone in an empty environment, train from a foreign folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["train.epochs=2", "teacher.train.epochs=2"]

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
    folder = tmp_path_factory.mktemp("wheels")
    for package in ("kdcore", "kd-classification"):
        run("uv", "build", "--wheel", "--package", package, "--out-dir", folder, cwd=ROOT)
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_config_and_module(wheels):
    source = ROOT / "packages/kd-classification/src"
    wanted = {path.relative_to(source).as_posix() for suffix in ("*.py", "*.yaml") for path in source.rglob(suffix)}
    assert any(name.endswith("configs/dhkd/small.yaml") for name in wanted)
    assert wanted <= names(wheels["kd_classification"])
    extra = {name for name in names(wheels["kd_classification"]) - wanted if ".dist-info/" not in name}
    assert extra == set()


def test_kdcores_wheel_holds_the_reports_assets(wheels):
    source = ROOT / "shared/kdcore/src"
    wanted = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert {"kdcore/py.typed", "kdcore/report/assets/report.css"} <= wanted
    assert wanted <= names(wheels["kdcore"])


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
        *(wheels["kdcore"], wheels["kd_classification"]),
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
