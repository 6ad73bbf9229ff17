"""The skeleton of a method: its file, configs, test and entry point.

    uv run python tools/new_method.py --package kd-classification --key foo --title "Foo for Bar" --arxiv 2401.00000

Nothing is overwritten. What the paper says is for you to write: until then the loss raises NotImplementedError and the
test fails. Run `uv sync --all-packages` afterwards, so that `kd list` finds the entry point.
"""

from __future__ import annotations

import argparse
import keyword
import re
import sys
import tomllib
from pathlib import Path

from kdcore.errors import InputError, did_you_mean
from kdcore.method import GROUP

ROOT = Path(__file__).resolve().parent.parent
TABLE = f'[project.entry-points."{GROUP}"]'

CLASSIFIER = '''"""{title} (arXiv {arxiv}, {year}).

TODO: what the paper does, its symbols, and

    L = ...                                                                                                  (eq. ?)

Teacher frozen, in eval mode. TODO: what trains, what ships.
"""

from __future__ import annotations

from pydantic import Field
from torch import nn

from kd_classification.data import Batch
from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.runs import Networks, Run, classification_method
from kdcore.config import MethodConfig
from kdcore.distiller import LossTerms


class {name}Config(MethodConfig):
    alpha: float = Field(1.0, ge=0, description="TODO: weight of the paper's loss")  # not confirmed


class {name}(ClassifierDistiller):
    def __init__(self, teacher: nn.Module, student: nn.Module, *, alpha: float = 1.0):
        super().__init__(teacher, student)
        self.alpha = alpha

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        raise NotImplementedError("{key}: the loss is not written yet")


def build(config: Run, networks: Networks) -> {name}:
    return {name}(networks.teacher, networks.student, **config.method_args.model_dump())


METHOD = classification_method("{key}", __doc__, {name}Config, build)
'''

GENERIC = '''"""{title} (arXiv {arxiv}, {year}).

TODO: what the paper does, its symbols, and

    L = ...                                                                                                  (eq. ?)

Teacher frozen, in eval mode. TODO: what trains, what ships.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from kdcore.config import MethodConfig, RunConfig
from kdcore.distiller import Distiller, LossTerms
from kdcore.method import Method
from kdcore.stages import Artefacts, RunContext, Stage


class {name}Config(MethodConfig):
    alpha: float = Field(1.0, ge=0, description="TODO: weight of the paper's loss")  # not confirmed


class {name}Run(RunConfig):
    method_args: {name}Config = Field(default_factory=lambda: {name}Config())


class {name}(Distiller):
    def loss(self, batch: Any, player: str = "student") -> LossTerms:
        raise NotImplementedError("{key}: the loss is not written yet")


def stages(config: {name}Run, context: RunContext) -> Sequence[Stage]:
    raise NotImplementedError("{key}: the stages are not written yet")


def evaluate(config: {name}Run, artefacts: Artefacts) -> Mapping[str, Any]:
    raise NotImplementedError("{key}: the evaluation is not written yet")


METHOD = Method("{key}", __doc__ or "", {name}Run, stages, evaluate)
'''

CLASSIFIER_SMALL = """# Digits on two CPU cores: under two minutes with the teacher, nothing is downloaded.
method: {key}
teacher:
  name: resnet18
  args: {{layers: [1, 1, 1, 1], channels: [32, 64, 128, 256], stem_width: 32}}
  train:
    epochs: 40
    batch_size: 50
    optimizer: {{name: sgd, lr: 0.05, weight_decay: 5.0e-4}}
    schedule: {{name: cosine}}
student:
  name: resnet18
  args: {{layers: [1, 1, 1, 1], channels: [4, 8, 16, 32], stem_width: 4}}
data:
  name: digits
  image_size: 16
  per_class: 20
method_args:
  alpha: 1.0
train:
  epochs: 40
  batch_size: 50
  optimizer: {{name: sgd, lr: 0.05, weight_decay: 5.0e-4}}
  schedule: {{name: cosine}}
  checkpoint_every: 50
compare:
  ce: {{method: kd, method_args.alpha: 0.0}}
  kd: {{method: kd}}
"""

CLASSIFIER_PAPER = """# TODO: the paper's setting. Every value gets `# source: table or file` or `# not confirmed`.
method: {key}
teacher:
  name: resnet34             # not confirmed
  pretrained: true           # not confirmed
student:
  name: resnet18             # not confirmed
data:
  name: image_folder
  root: $IMAGENET
  image_size: 224            # not confirmed
train:
  epochs: 100                # not confirmed
  batch_size: 256            # not confirmed
compare:
  ce: {{method: kd, method_args.alpha: 0.0}}
  kd: {{method: kd}}
"""

GENERIC_CONFIG = """# TODO: {which}
method: {key}
train:
  epochs: 1                  # not confirmed
"""

TEST = '''"""{title}: the paper's equations on numbers worked out by hand, and a run of the small config."""

from __future__ import annotations

import pytest

from {package}.methods.{key} import METHOD
from kdcore.method import load_config
from kdcore.run import train


@pytest.mark.parametrize("name", ["small", "paper"])
def test_configs_are_valid(name):
    method, config = load_config(f"{key}/{{name}}")
    assert method is METHOD
    assert config.method == "{key}"


def test_the_equations_on_numbers():
    pytest.fail("{key}: write the paper's equations as checks in float64, with a gradcheck")


@pytest.mark.slow
def test_the_small_config_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    method, config = load_config("{key}/small", ["train.epochs=1"])
    assert train(method, config, tmp_path / "run", quiet=True, cpu=True)
'''


def skeleton(root: Path, package: str, key: str, title: str, arxiv: str) -> dict[Path, str]:
    """Path -> text of everything a new method needs, pyproject.toml's new text included. InputError on bad input."""
    folder = root / "packages" / package
    check(root, package, key, title, arxiv)
    module = package.replace("-", "_")
    values = {
        "key": key,
        "title": title.strip().rstrip("."),
        "arxiv": arxiv,
        "year": f"20{arxiv[:2]}",
        "name": "".join(part.capitalize() for part in key.split("_")),
        "package": module,
    }
    classifier = package == "kd-classification"
    source, configs = folder / "src" / module, folder / "src" / module / "configs" / key
    small = CLASSIFIER_SMALL if classifier else GENERIC_CONFIG.replace("{which}", "runs on two CPU cores, no download.")
    paper = CLASSIFIER_PAPER if classifier else GENERIC_CONFIG.replace("{which}", "the paper's own setting.")
    files = {
        source / "methods" / f"{key}.py": (CLASSIFIER if classifier else GENERIC).format(**values),
        configs / "small.yaml": small.format(**values),
        configs / "paper.yaml": paper.format(**values),
        folder / "tests" / f"test_{key}.py": TEST.format(**values),
    }
    for path in files:
        if path.exists():
            raise InputError(f"--key {key}: {path.relative_to(root)} exists; nothing is overwritten")
    project = folder / "pyproject.toml"
    entry = f'{key} = "{module}.methods.{key}:METHOD"'
    return {**files, project: with_entry_point(project.read_text(encoding="utf-8"), entry)}


def check(root: Path, package: str, key: str, title: str, arxiv: str) -> None:
    known = {file.parent.name: file for file in root.glob("packages/*/pyproject.toml")}
    if package not in known:
        raise InputError(f"--package {package}: no such package{did_you_mean(package, known)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", key) or keyword.iskeyword(key):
        raise InputError(f"--key '{key}': a Python module name in lower case, letters, digits and _")
    if not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv) or not 1 <= int(arxiv[2:4]) <= 12:
        raise InputError(f"--arxiv '{arxiv}': expected an identifier such as 2401.00000")
    if not title.strip() or re.search(r'["\\\n()]', title):
        raise InputError(f"--title {title!r}: one line without quotes, backslashes and parentheses")
    for name, file in known.items():
        if key in tomllib.loads(file.read_text(encoding="utf-8"))["project"].get("entry-points", {}).get(GROUP, {}):
            raise InputError(f"--key {key}: {name} registers a method of this key")


def with_entry_point(text: str, entry: str) -> str:
    """`text` of a pyproject.toml with one more line in its table of methods, which is made where there is none."""
    if TABLE not in text:
        before, build, after = text.partition("[build-system]")
        return f"{before}{TABLE}\n{entry}\n\n{build}{after}"
    head, _, rest = text.partition(TABLE)
    body, gap, after = rest.partition("\n[")
    return f"{head}{TABLE}{body.rstrip()}\n{entry}\n{gap}{after}"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Writes the skeleton of a method.")
    parser.add_argument("--package", required=True, help="folder under packages/, for example kd-classification")
    parser.add_argument("--key", required=True, help="the method's key and module name")
    parser.add_argument("--title", required=True, help="the paper's title")
    parser.add_argument("--arxiv", required=True, help="the paper's arXiv identifier, for example 2401.00000")
    given = parser.parse_args(arguments)
    try:
        files = skeleton(root, given.package, given.key, given.title, given.arxiv)
    except InputError as error:
        print(f"new_method: {error}", file=sys.stderr)
        return 2
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(root))
    print("next: uv sync --all-packages, write the method and its test, then uv run python tools/evidence.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
