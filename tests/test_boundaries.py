"""Import boundaries: they hold in the workspace, and the checker finds each kind of crossing."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

import check_boundaries


def test_they_hold_in_the_workspace():
    assert check_boundaries.violations() == []


def test_the_checker_reads_every_package():
    names = {package.name for package in check_boundaries.packages(check_boundaries.ROOT)}
    root = check_boundaries.ROOT
    assert names == {file.parent.name.replace("-", "_") for file in root.glob("*/*/pyproject.toml")}
    for package in check_boundaries.packages(root):
        assert package.name in package.modules


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


@pytest.fixture
def tree(tmp_path):
    """A workspace with the layers of the real one, and nothing in them."""
    write(
        tmp_path / "shared/kdcore/pyproject.toml", '[project]\nname = "kdcore"\ndependencies = ["torch>=2", "numpy"]\n'
    )
    write(tmp_path / "packages/kd-a/pyproject.toml", '[project]\nname = "kd-a"\ndependencies = ["kdcore", "timm"]\n')
    write(tmp_path / "packages/kd-b/pyproject.toml", '[project]\nname = "kd-b"\ndependencies = ["kdcore"]\n')
    core = ("__init__", "method", "stages", "helper", "losses/__init__", "losses/logits", "cli/__init__", "cli/app")
    for module in core:
        write(tmp_path / f"shared/kdcore/src/kdcore/{module}.py")
    for name in ("kd_a", "kd_b"):
        layers = ("__init__", "models", "methods/__init__", "methods/x", "methods/y", "engine/__init__", "engine/e")
        for module in (*layers, "integrations/__init__", "integrations/i"):
            write(tmp_path / f"packages/{name.replace('_', '-')}/src/{name}/{module}.py")
    return tmp_path


CORE, A = "shared/kdcore/src/kdcore", "packages/kd-a/src/kd_a"


def test_an_empty_tree_holds(tree):
    assert check_boundaries.violations(tree) == []


CROSSINGS = [
    (f"{CORE}/stages.py", "import timm", "kdcore knows"),
    (f"{CORE}/stages.py", "def f():\n    import kd_a", "kdcore knows"),
    (f"{CORE}/stages.py", "import importlib\nimportlib.import_module('transformers')", "kdcore knows"),
    (f"{CORE}/stages.py", "import yaml", "does not declare"),
    (f"{CORE}/losses/logits.py", "import numpy", "losses import torch only"),
    (f"{CORE}/losses/logits.py", "from kdcore.stages import run_stages", "losses import torch only"),
    (f"{CORE}/losses/logits.py", "from ..stages import run_stages", "losses import torch only"),
    (f"{CORE}/__init__.py", "import torch", "`kd list` would load it"),
    (f"{CORE}/method.py", "from torch import nn", "`kd list` would load it"),
    (f"{CORE}/cli/app.py", "import torch", "`kd list` would load it"),
    (f"{CORE}/cli/app.py", "try:\n    import torch\nexcept ImportError:\n    pass", "`kd list` would load it"),
    (f"{A}/models.py", "import kd_b", "imports no other one"),
    (f"{A}/models.py", "def f():\n    from kd_b.models import x", "imports no other one"),
    (f"{A}/models.py", "def f():\n    import diffusers", "does not declare"),
    (f"{A}/models.py", "import timm", "belong inside functions"),
    (f"{A}/models.py", "class X:\n    import timm", "belong inside functions"),
    (f"{A}/__init__.py", "import torch", "has to cost nothing"),
    (f"{A}/engine/e.py", "from kd_a.methods.x import X", "engine never imports methods"),
    (f"{A}/engine/e.py", "from kd_a.methods import x", "engine never imports methods"),
    (f"{A}/engine/e.py", "def f():\n    from ..methods import x", "engine never imports methods"),
    (f"{A}/methods/x.py", "from kd_a.methods.y import Y", "belongs in engine"),
    (f"{A}/methods/x.py", "from .y import Y", "belongs in engine"),
]


@pytest.mark.parametrize(("file", "source", "message"), CROSSINGS)
def test_each_crossing_is_named_with_file_and_line(tree, file, source, message):
    write(tree / file, source)
    (found,) = check_boundaries.violations(tree)
    assert found.startswith(f"{file}:")
    assert message in found
    line = int(found.split(":")[1])
    assert "import" in source.splitlines()[line - 1]


ALLOWED = [
    (f"{CORE}/stages.py", "import torch, json\nfrom kdcore.losses import logits"),
    (f"{CORE}/cli/app.py", "def f():\n    import torch"),
    (f"{CORE}/method.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import nn"),
    (f"{CORE}/losses/logits.py", "import math, torch\nfrom kdcore.losses import _checks"),
    (f"{A}/models.py", "import torch, numpy\nfrom kdcore import stages\ndef f():\n    import timm"),
    (f"{A}/integrations/i.py", "from timm.task import TrainingTask"),
    (f"{A}/methods/x.py", "from kd_a.engine.e import E\nfrom kd_a.models import m"),
]


@pytest.mark.parametrize(("file", "source"), ALLOWED)
def test_what_is_allowed_passes(tree, file, source):
    write(tree / file, source)
    assert check_boundaries.violations(tree) == []


def test_a_slow_import_is_found_through_other_modules(tree):
    write(tree / CORE / "cli/app.py", "from kdcore.helper import x")
    write(tree / CORE / "helper.py", "from kdcore.losses import logits")
    write(tree / CORE / "losses/__init__.py", "import torch")
    (found,) = check_boundaries.violations(tree)
    assert found.startswith(f"{CORE}/losses/__init__.py:1:")
