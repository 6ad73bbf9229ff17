"""Who may import whom, read from the source of every workspace package.

    uv run python tools/check_boundaries.py

Prints one line `file:line: what is wrong` for each import that crosses a boundary; exit 1 if there is one.

- A package imports the standard library, itself, kdcore, and what its pyproject.toml (or kdcore's) declares.
- kdcore imports no domain library; its `losses` import torch and one another; what `kd list` needs loads no torch.
- A domain package imports no other domain package. `engine` never imports `methods`, and a method no other method.
- Importing a domain package costs nothing, and its heavy libraries are imported inside functions, except under
  `integrations`, whose classes derive from the ecosystem's.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CORE_LIBRARIES = {"torch", "accelerate", "numpy", "pydantic", "yaml", "rich", "safetensors", "typer"}
LOSS_LIBRARIES = {"torch"}
# What `kd list` loads: modules that must answer before torch, with whatever they import at module level.
QUICK = ("kdcore", "kdcore.errors", "kdcore.method", "kdcore.cli", "kdcore.cli.app", "kdcore.cli.listing")
SLOW_LIBRARIES = {"torch", "accelerate", "numpy", "safetensors"}
# Cheap beside torch, which every module of a domain package but its __init__ may load.
LIGHT = CORE_LIBRARIES | {"PIL"}
# Parts of a declared library that have import names of their own.
PARTS = {"annotated_types": "pydantic", "pydantic_core": "pydantic"}
# What a user installs beside a package, imported where it is used: as an extra, its pins would bind the workspace.
BESIDE = {"kd_llm": {"vllm"}}
IMPORT_NAMES = {
    "mmcv-lite": "mmcv",
    "mmsegmentation": "mmseg",
    "opencv-python": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
}


@dataclass(frozen=True)
class Import:
    """One import of `target` (dotted, absolute) by `module`; `deferred` when not executed on import of the module."""

    module: str
    target: str
    path: Path
    line: int
    deferred: bool

    @property
    def library(self) -> str:
        name = self.target.split(".")[0]
        return PARTS.get(name, name)


@dataclass(frozen=True)
class Package:
    """A workspace package: its import name, the import names its pyproject declares, and its imports."""

    name: str
    declared: frozenset[str]
    modules: dict[str, Path]
    imports: tuple[Import, ...]


# ---------------------------------------------------------------- reading


def packages(root: Path) -> list[Package]:
    """The workspace packages under shared/ and packages/."""
    return [
        read_package(file.parent) for file in sorted(root.glob("*/*/pyproject.toml")) if (file.parent / "src").is_dir()
    ]


def read_package(folder: Path) -> Package:
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    requirements = [*project.get("dependencies", []), *(requirement for extra in extras for requirement in extra)]
    declared = frozenset(import_name(requirement) for requirement in requirements)
    name = project["name"].replace("-", "_")
    modules = {module_name(path, folder / "src"): path for path in sorted((folder / "src" / name).rglob("*.py"))}
    imports = tuple(item for module, path in modules.items() for item in read_imports(module, path))
    return Package(name, declared, modules, imports)


def import_name(requirement: str) -> str:
    """`"scikit-learn>=1.5"` -> `"sklearn"`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, f"not a requirement: {requirement!r}"
    distribution = match[0].lower()
    return IMPORT_NAMES.get(distribution, distribution.replace("-", "_"))


def module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(module: str, path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    inside = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        for target in targets(node, inside):
            yield Import(module, target, path, node.lineno, deferred)  # type: ignore[attr-defined]
        if is_type_checking(node):
            for child in node.body:  # type: ignore[attr-defined]
                yield from visit(child, True)
            for child in node.orelse:  # type: ignore[attr-defined]
                yield from visit(child, deferred)
            return
        deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred)

    return visit(tree, False)


def targets(node: ast.AST, inside: list[str]) -> list[str]:
    """What a node imports; `from a import b` is `a.b`, as b may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = inside[: len(inside) - node.level + 1] if node.level else []
        start = ".".join([*base, *([node.module] if node.module else [])])
        return [f"{start}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called, name = node.func, node.args[0].value
        function = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if function in {"import_module", "__import__"} and isinstance(name, str) and not name.startswith("."):
            return [name]
    return []


def is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")) == "TYPE_CHECKING"


# ---------------------------------------------------------------- rules


def violations(root: Path = ROOT) -> list[str]:
    """`file:line: message` of every import that crosses a boundary."""
    found = packages(root)
    core = next((package for package in found if package.name == "kdcore"), None)
    if core is None:
        raise SystemExit(f"check_boundaries: no package kdcore under {root}")
    wrong: list[tuple[Import, str]] = []
    for package in found:
        allowed = package.declared | core.declared | {"kdcore", package.name}
        rules = core_rules if package is core else domain_rules
        for item in package.imports:
            message = rules(item, allowed) or layer_rules(item)
            if message:
                wrong.append((item, message))
    wrong += quick_rules(core)
    lines = {f"{item.path.relative_to(root)}:{item.line}: {item.module} {message}" for item, message in wrong}
    return sorted(lines)


def core_rules(item: Import, allowed: frozenset[str] | set[str]) -> str | None:
    library = item.library
    if library in sys.stdlib_module_names or library == "kdcore":
        return None
    if library not in CORE_LIBRARIES:
        return f"imports {library}: kdcore knows {', '.join(sorted(CORE_LIBRARIES))} only"
    return None if library in allowed else f"imports {library}, which pyproject.toml does not declare"


def domain_rules(item: Import, allowed: frozenset[str] | set[str]) -> str | None:
    library, own = item.library, item.module.split(".")[0]
    if library in sys.stdlib_module_names or library == own:
        return None
    if library.startswith("kd_"):
        return f"imports {library}: a domain package imports no other one"
    if library in BESIDE.get(own, ()) and item.deferred:
        return None
    if library not in allowed:
        return f"imports {library}, which pyproject.toml does not declare"
    if item.deferred or library == "kdcore":
        return None
    if item.module == own:
        return f"imports {library} at module level: importing {own} has to cost nothing"
    if library not in LIGHT and not item.module.startswith(f"{own}.integrations"):
        return f"imports {library} at module level: heavy libraries belong inside functions"
    return None


def layer_rules(item: Import) -> str | None:
    package, *rest = item.module.split(".")
    layer = rest[0] if rest else ""
    if layer == "losses" and item.library not in sys.stdlib_module_names:
        sibling = item.target.startswith(f"{package}.losses")
        return None if sibling or item.library in LOSS_LIBRARIES else f"imports {item.target}: losses import torch only"
    if not item.target.startswith(f"{package}.methods"):
        return None
    if layer == "engine":
        return f"imports {item.target}: engine never imports methods"
    if layer == "methods" and len(rest) > 1 and not item.target.startswith(item.module):
        return f"imports {item.target}: what two methods share belongs in engine"
    return None


def quick_rules(core: Package) -> list[tuple[Import, str]]:
    """Slow libraries that the quick modules load, in themselves or through other modules of kdcore."""
    wrong = []
    todo = [name for name in QUICK if name in core.modules]
    seen = set(todo)
    while todo:
        module = todo.pop()
        for item in core.imports:
            if item.module != module or item.deferred:
                continue
            if item.library in SLOW_LIBRARIES:
                wrong.append((item, f"imports {item.library} at module level: `kd list` would load it"))
            for name in loaded(item.target, core.modules):
                if name not in seen:
                    seen.add(name)
                    todo.append(name)
    return wrong


def loaded(target: str, modules: dict[str, Path]) -> list[str]:
    """The modules of a package that importing `target` executes: the parents' __init__ too."""
    parts = target.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return [name for name in prefixes if name in modules]


if __name__ == "__main__":
    problems = violations()
    print("\n".join(problems) or f"boundaries hold in {len(packages(ROOT))} packages")
    sys.exit(1 if problems else 0)
