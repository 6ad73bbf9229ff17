"""The README's blocks: Python runs in order in one namespace, `kd` commands run for real."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import new_method

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST = "pip install uv && uv run --package kd-classification kd train dhkd/small"
SECOND = "uv run --all-packages pytest"
# A row of the printed table: the student's value and the teacher's.
ACCURACIES = r"(?m)^\W*accuracy\W+0\.\d+\W+0\.\d+"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


LINES = [line for block in blocks("bash") for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("kd ")]


def test_every_bash_line_is_known_to_these_tests():
    others = [line for line in LINES if line not in COMMANDS]
    assert others[:2] == [FIRST, SECOND]
    assert len(others) == 3
    assert others[2].startswith("uv run --all-packages python tools/new_method.py ")


def test_python_blocks_run_in_order():
    found = blocks("python")
    assert len(found) == README.count("```python")
    namespace: dict = {}
    for number, block in enumerate(found, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    student, model = namespace["student"], namespace["model"]
    assert model is student
    assert set(namespace["result"]) >= {"loss", "output", "ce", "kd"}
    assert all(parameter.grad is None for parameter in namespace["distiller"].teacher.parameters())
    assert namespace["weight_s"].grad.shape == namespace["weight_s"].shape


def test_kdcore_readme_runs():
    (block,) = blocks("python", (ROOT / "shared/kdcore/README.md").read_text(encoding="utf-8"))
    namespace: dict = {}
    exec(compile(block, "shared/kdcore/README.md", "exec"), namespace)
    assert namespace["student_logits"].grad.abs().sum() > 0


def test_the_new_method_line_works(tmp_path):
    shutil.copytree(ROOT / "packages", tmp_path / "packages", ignore=shutil.ignore_patterns("__pycache__"))
    (line,) = [line for line in LINES if "new_method.py" in line]
    arguments = shlex.split(line.split("new_method.py")[1])
    assert new_method.main(arguments, tmp_path) == 0
    assert (tmp_path / "packages/kd-classification/src/kd_classification/methods/my_method.py").is_file()


PACKAGES = ("packages/kd-classification/README.md", "packages/kd-diffusion/README.md")


def test_links_lead_to_files():
    for name in ("README.md", "CONTRIBUTING.md", "shared/kdcore/README.md", *PACKAGES):
        folder = (ROOT / name).parent
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8")):
            assert target.startswith("https://") or (folder / target).exists(), f"{name}: {target}"


def test_contributing_names_commands_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"(?:tools|\.ci)/[\w./]+", text):
        assert (ROOT / path.rstrip(".")).is_file(), path


def kd(line: str, folder: Path, timeout: int = 480) -> str:
    """A line's `kd`, as this interpreter's environment has it, in `folder`."""
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "KD_CACHE": str(folder / "cache"),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        shlex.split(line), cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_kd_commands_run_one_after_another(tmp_path):
    assert {line.split()[1] for line in COMMANDS} == {"list", "show", "train", "eval", "report", "compare", "cache"}
    outputs = {line.split()[1]: kd(line, tmp_path) for line in COMMANDS}
    assert "dhkd" in outputs["list"]
    assert "2411.08937" in outputs["show"]
    assert re.search(ACCURACIES, outputs["train"])
    assert re.search(ACCURACIES, outputs["eval"])
    assert (tmp_path / "runs/kd-small-seed1/report.html").stat().st_size > 10_000
    assert (tmp_path / "runs/kd-compare/comparison.json").is_file()
    assert any((tmp_path / "runs/cache").iterdir())


@pytest.mark.slow
def test_the_first_command_trains_reports_and_leaves_a_timm_student(tmp_path):
    import timm

    output = kd(FIRST.partition(" kd-classification ")[2], tmp_path)
    run = tmp_path / "runs/dhkd-small-seed0"
    assert re.search(ACCURACIES, output), output
    assert (run / "report.html").is_file()
    assert timm.create_model(f"local-dir:{run / 'student'}", pretrained=True).num_classes == 10
