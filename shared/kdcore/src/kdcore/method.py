"""Method: what a paper registers. Discovery of the installed methods without importing them.

A package names its methods in the entry-point group `kd.methods`, `key = "package.methods.key:METHOD"`. The module's
docstring is the method's card: its first line reads `Title (arXiv id, year).` or `Title (venue, year).`, the rest
holds the equations. `kd list` reads it from the source file, so that listing imports neither torch nor the method.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kdcore.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from kdcore.config import RunConfig
    from kdcore.stages import Artefacts, RunContext, Stage

R = TypeVar("R", bound="RunConfig")
GROUP = "kd.methods"
SUFFIXES = (".yaml", ".yml", ".py")


@dataclass(frozen=True)
class Card:
    """What can be said of a method without importing it."""

    key: str
    title: str
    paper: str
    domain: str
    package: str
    doc: str

    @classmethod
    def from_doc(cls, key: str, doc: str, package: str) -> Card:
        first = doc.strip().split("\n\n")[0].replace("\n", " ").strip()
        match = re.match(r"(?P<title>.+?)\s*\((?P<paper>[^()]*)\)\.?$", first)
        title, paper = (match["title"], match["paper"]) if match else (first.rstrip("."), "")
        return cls(key, title, paper, package.removeprefix("kd_"), package, doc.strip())


@dataclass(frozen=True)
class Method(Generic[R]):
    """A published method: its run config class, its stages and its evaluation.

    `stages(config, context)` checks the inputs (InputError before anything trains) and returns the list of stages.
    `evaluate(config, artefacts)` returns metrics: name -> number, or a nested list such as a confusion matrix.
    `predict(config, artefacts, count)` is optional: samples for the report, see `kdcore.report`.
    `cache(config, folder)` is optional: writes the teacher outputs that `kd cache` precomputes.
    `read(path)` is optional: gives the mapping in a `.py` config, where the ecosystem's configs are Python files.
    """

    key: str
    doc: str
    config: type[R]
    stages: Callable[[R, RunContext], Sequence[Stage]]
    evaluate: Callable[[R, Artefacts], Mapping[str, Any]]
    predict: Callable[[R, Artefacts, int], Sequence[Mapping[str, Any]]] | None = None
    cache: Callable[[R, Path], Mapping[str, Any]] | None = None
    read: Callable[[Path], Mapping[str, Any]] | None = None

    @property
    def card(self) -> Card:
        return Card.from_doc(self.key, self.doc, self.config.__module__.split(".")[0])


# ---------------------------------------------------------------- discovery


def installed() -> dict[str, EntryPoint]:
    """Key -> entry point of every installed method, sorted by package and key. Imports nothing."""
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.value.split(".")[0], point.name))
    return {point.name: point for point in points}


def card(point: EntryPoint) -> Card:
    """A method's card, read from the source of its module."""
    module, package = point.module, point.module.split(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"method '{point.name}': its package {package} cannot be found")
    source = Path(spec.submodule_search_locations[0], *module.split(".")[1:]).with_suffix(".py")
    try:
        doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    except OSError:
        raise InputError(f"method '{point.name}': its module {module} is missing from package {package}") from None
    return Card.from_doc(point.name, doc, package)


def get(key: str) -> Method[Any]:
    """The registered method; an unknown key raises InputError with a suggestion."""
    points = installed()
    if key not in points:
        raise InputError(f"method '{key}' is not installed{did_you_mean(key, points)}")
    return points[key].load()


def config_folder(key: str) -> Path:
    """Folder of the configs that ship with a method."""
    point = installed().get(key)
    if point is None:
        raise InputError(f"method '{key}' is not installed{did_you_mean(key, installed())}")
    spec = importlib.util.find_spec(point.module.split(".")[0])
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"method '{key}': its package cannot be found")
    return Path(spec.submodule_search_locations[0]) / "configs" / key


def find_config(name: str) -> Path:
    """A config file: a path to a YAML or Python file, or `key/name` for one that ships with a method."""
    path = Path(name)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise InputError(f"config '{name}': no such file")
        return path
    key, slash, config = name.partition("/")
    if not slash or "/" in config or not config:
        raise InputError(f"config '{name}': expected key/name (dhkd/small), or a path that ends in .yaml or .py")
    found = {file.stem: file for file in shipped_configs(key)}
    if config not in found:
        raise InputError(f"config '{name}': method '{key}' has no config '{config}'{did_you_mean(config, found)}")
    return found[config]


def shipped_configs(key: str) -> list[Path]:
    """The config files that come with a method, sorted by name."""
    return sorted(path for path in config_folder(key).glob("*") if path.suffix in SUFFIXES)


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a config file: a YAML file, or a Python file as the method that it names reads it.

    A Python config is a program of its ecosystem's. It has a line `method = "key"`, which is found without running it.
    """
    from kdcore.config import read_yaml

    if path.suffix != ".py":
        return read_yaml(path)
    try:
        statements = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"config {path}: cannot be read as Python ({error})") from None
    keys = [
        item.value.value
        for item in statements
        if isinstance(item, ast.Assign)
        and isinstance(item.value, ast.Constant)
        and "method" in map(_name, item.targets)
    ]
    if not keys or not isinstance(keys[-1], str):
        raise InputError(f"config {path}: needs a line method = 'key'; installed: {', '.join(installed())}")
    method = get(keys[-1])
    if method.read is None:
        raise InputError(f"config {path}: configs of method '{method.key}' are YAML files")
    return dict(method.read(path))


def _name(target: ast.expr) -> str | None:
    return target.id if isinstance(target, ast.Name) else None


def load_config(name: str, overrides: Sequence[str] = ()) -> tuple[Method[Any], Any]:
    """The method and the validated run config of a config name or path, with `key=value` overrides applied."""
    from kdcore.config import override, parse_override

    values = override(read_config(find_config(name)), dict(parse_override(text) for text in overrides))
    method = method_of(values, source=name)
    key, slash, _ = name.partition("/")
    if slash and not Path(name).suffix and key != method.key:
        raise InputError(f"config '{name}': it is a config of method '{method.key}', not of '{key}'")
    return method, config_of(method, values, source=name)


def method_of(values: Mapping[str, Any], *, source: str = "config") -> Method[Any]:
    """The method that a config's mapping names."""
    key = values.get("method")
    if not isinstance(key, str):
        raise InputError(f"{source}: 'method' is required; installed: {', '.join(installed())}")
    return get(key)


def config_of(method: Method[R], values: Mapping[str, Any], *, source: str = "config") -> R:
    """`values` validated as the method's run config."""
    from kdcore.config import parse

    return parse(method.config, values, source=source)


def arm_config(
    values: Mapping[str, Any], overrides: Mapping[str, Any], *, source: str = "compare"
) -> tuple[Method[Any], Any]:
    """Method and config of one arm of `kd compare`.

    An arm may name another `method`: then `method_args` starts from that method's defaults, and the networks, data
    and budget stay those of the config.
    """
    from kdcore.config import override

    values = {key: value for key, value in values.items() if key != "compare"}
    if overrides.get("method", values.get("method")) != values.get("method"):
        values = {key: value for key, value in values.items() if key != "method_args"}
    values = override(values, overrides)
    method = method_of(values, source=source)
    return method, config_of(method, values, source=source)
