"""The README's Python block for scripts runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kdcore.method import installed

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_script_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, script = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    namespace: dict = {}
    exec(compile(script, "README.md", "exec"), namespace)
    assert namespace["trainer"].state.global_step == 2
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()


def test_every_method_has_a_row():
    own = {key for key, point in installed().items() if point.module.startswith("kd_llm.")}
    rows = set(re.findall(r"^\| `(\w+)` \| ", README.split("## Methods")[1].split("## Data")[0], re.MULTILINE))
    assert rows == own
