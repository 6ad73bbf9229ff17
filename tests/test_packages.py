"""Every package imports cheaply, every registered method loads, and every config that ships is valid."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from kdcore.method import GROUP, arm_config, card, get, installed, load_config, read_config, shipped_configs

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = {
    file.parent.name: tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    for file in sorted([*ROOT.glob("shared/*/pyproject.toml"), *ROOT.glob("packages/*/pyproject.toml")])
}
REGISTERED = {
    key: value for project in PROJECTS.values() for key, value in project.get("entry-points", {}).get(GROUP, {}).items()
}
# A folder with a leading underscore holds what several configs share.
CONFIGS = sorted(path for path in ROOT.glob("packages/*/src/*/configs/[!_]*/*") if path.name != "__pycache__")
DOMAINS = ("classification", "detection3d", "segmentation", "graph", "nerf", "diffusion", "llm")


def test_the_workspace_has_kdcore_and_seven_domains():
    assert set(PROJECTS) == {"kdcore", *(f"kd-{domain}" for domain in DOMAINS)}


@pytest.mark.parametrize("name", PROJECTS)
def test_package_imports_and_tells_its_version(name):
    project, module = PROJECTS[name], importlib.import_module(name.replace("-", "_"))
    assert module.__version__ == project["version"] == version(name)
    assert module.__doc__
    if name != "kdcore":
        assert importlib.import_module(f"{module.__name__}.methods").__doc__


@pytest.mark.parametrize("name", PROJECTS)
def test_project_files_agree(name):
    project, (folder,) = PROJECTS[name], [*ROOT.glob(f"*/{name}")]
    assert project["name"] == name
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11"
    assert (folder / project["readme"]).read_text(encoding="utf-8").startswith(f"# {name}\n")


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json\nprint(json.dumps([name for name in sys.modules if '.' not in name]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_packages_and_the_command_loads_no_torch():
    modules = ", ".join(
        [*(name.replace("-", "_") for name in PROJECTS), "kdcore.method", "kdcore.errors", "kdcore.cli"]
    )
    assert modules_after(f"import {modules}") & {"torch", "numpy", "accelerate", "timm", "torchvision"} == set()


def test_listing_methods_loads_neither_torch_nor_a_method():
    loaded = modules_after(
        "from kdcore.method import installed, card\nfor p in installed().values(): print(card(p).title)"
    )
    assert loaded & {"torch", "numpy", "timm", "kd_classification"} == set()


def test_importing_every_method_loads_no_library_heavier_than_torch():
    modules = ", ".join(sorted(value.split(":")[0] for value in REGISTERED.values()))
    heavy = {"timm", "torchvision", "torchmetrics", "sklearn", "skimage", "scipy", "transformers", "diffusers"}
    assert modules_after(f"import {modules}") & heavy == set()


# ---------------------------------------------------------------- methods


def test_installed_entry_points_are_those_of_the_sources():
    assert {key: point.value for key, point in installed().items()} == REGISTERED
    assert len(REGISTERED) == sum(
        len(project.get("entry-points", {}).get(GROUP, {})) for project in PROJECTS.values()
    ), "two packages register the same key"


@pytest.mark.parametrize("key", REGISTERED)
def test_method_loads_and_its_card_is_complete(key):
    method = get(key)
    assert method.key == key
    assert REGISTERED[key].split(":")[0].endswith(f".methods.{key}")
    assert card(installed()[key]) == method.card
    assert method.card.title
    assert any(character.isdigit() for character in method.card.paper), "the docstring's first line names no paper"
    assert len(method.card.doc.splitlines()) > 2, "the docstring holds no equations"


@pytest.mark.parametrize("key", REGISTERED)
def test_method_ships_small_and_paper_configs_and_a_test(key):
    package = REGISTERED[key].split(".")[0]
    folder = ROOT / "packages" / package.replace("_", "-")
    names = {path.stem for path in shipped_configs(key)}
    assert "small" in names
    assert any(re.split("[-_]", name)[0] == "paper" for name in names), names
    assert (folder / "tests" / f"test_{key}.py").is_file()


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_config_and_its_arms_are_valid(path, monkeypatch):
    key = path.parent.name
    # The configs of OpenMMLab are Python files.
    assert path.suffix == (
        ".py" if path.relative_to(ROOT).parts[1] in {"kd-segmentation", "kd-detection3d"} else ".yaml"
    ), path
    assert key in REGISTERED, f"configs of '{key}', which is not registered"
    method, config = load_config(f"{key}/{path.stem}")
    assert method.key == config.method == key
    values = read_config(path)
    plain = config.model_copy(update={"compare": {}})
    for arm, overrides in config.compare.items():
        assert arm != key, "the method's own arm is there without being named"
        _, arm_values = arm_config(values, overrides)
        assert arm_values.model_dump() != plain.model_dump(), f"arm '{arm}' changes nothing"


@pytest.mark.parametrize("key", REGISTERED)
def test_small_config_compares_with_a_baseline(key):
    """Classifiers with the labels alone; a generator's baseline, the teacher, is in its metrics."""
    _, config = load_config(f"{key}/small")
    assert config.compare
    assert "ce" in config.compare or not REGISTERED[key].startswith("kd_classification.")


# What says where data and weights lie and how the machine is used is no value of the paper's.
SOURCES = {"digits", "mnist", "cifar10", "cifar100", "image_folder", "idx", "npz", "csv", "imagefolder", "prompts"}
UNSOURCED_KEYS = {"method", "root", "channels", "pretrained", "variant", "dtype", "gradient_checkpointing"}
UNSOURCED_KEYS |= {"num_workers", "log_every", "checkpoint_every", "eval_every"}
UNSOURCED_KEYS |= {"type", "_base_", "_delete_", "data_root", "data_prefix"}
UNSOURCED_KEYS |= {"img_suffix", "seg_map_suffix", "metainfo"}  # of OpenMMLab's configs
PAPER_CONFIGS = [path for path in CONFIGS if re.split("[-_]", path.stem)[0] == "paper"]


@pytest.mark.parametrize("path", PAPER_CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_paper_config_gives_the_source_of_its_values(path):
    text = path.read_text(encoding="utf-8")
    assert list(unsourced(from_python(text) if path.suffix == ".py" else text)) == []


def from_python(text: str) -> str:
    """A Python config in YAML's form: one `key: value` a line, no brackets; `type` and quoted paths set no value."""
    lines = []
    for line in text.split("\ncompare = ")[0].splitlines():
        code, hash_, comment = line.partition("#")
        indentation, code = code[: len(code) - len(code.lstrip())], code.strip()
        match = re.fullmatch(r"(\w+)\s*=\s*(.*)|['\"](\w+)['\"]:\s*(.*)", code)
        key, value = (match[1] or match[3], match[2] if match[1] else match[4]) if match else ("item", code)
        value = re.sub(r"^(?:dict)?[(\[{]+$", "", value).rstrip(",")
        # What only repeats another variable, or an environment variable, sets nothing.
        value = re.sub(r"^(?!True|False)[a-z_]+[\w.]*$|^\"?\{\{.*\}\}\"?$|^dict\((type=\"\w+\")?\)$", "", value)
        opens = not match and re.fullmatch(r"(?:dict)?[(\[{]+", code)
        closes = re.fullmatch(r"[)\]},]*", code) and not opens
        closes = closes or re.match(r"(def|return)\b|\"{3}", code)
        code = "" if closes else f"{key}: {value}" if not opens else f"{key}:"
        lines.append(f"{indentation}{code}{'  #' + comment if hash_ else ''}")
    return "\n".join(lines)


def unsourced(text: str) -> Iterator[str]:
    """The lines before `compare` that set a value and do not say whether a table or file confirms it.

    A comment counts for its line, a section's for the whole section, and one on lines of its own for the next value.
    """
    covered, above = -1, False  # indentation of a section with a comment of its own; whether the last comment says it
    for line in text.split("\ncompare:")[0].splitlines():
        code, _, comment = line.partition("#")
        said = "source:" in comment or "not confirmed" in comment
        if not code.strip():
            above = said or (above and bool(comment))
            continue
        key, _, value = (part.strip() for part in code.partition(":"))
        indentation = len(code) - len(code.lstrip())
        covered = covered if covered >= 0 and indentation > covered else -1
        if not value and said:
            covered = indentation
        exempt = not value or value[0] in "&*" or key in UNSOURCED_KEYS or value in SOURCES
        if not (exempt or said or above or covered >= 0):
            yield line.strip()
        above = False


def test_unsourced_values_are_found():
    sourced = """
# release: the authors' code; "source: release" is it
method: x
data:
  root: $X
  size: 3  # source: a
  n: 2  # not confirmed
  augment:  # source: b
    flip: 0.5
    crop:
      size: 3
  # source: c, and this goes on
  # for a second line
  p: 1
"""
    silent = "  m: 1\n  o: 2  # hm\ntrain:\n  # why\n  q: 1\n"
    assert list(unsourced(f"{sourced}{silent}compare:\n  ce: {{method: kd}}\n")) == ["m: 1", "o: 2  # hm", "q: 1"]
