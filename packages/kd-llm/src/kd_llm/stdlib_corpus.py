"""A text corpus that is on every machine: the running interpreter's standard library, read where it is installed.

Three domains: `prose` (docstrings and blocks of comments), `code` (functions without docstring and comments) and
`tests` (functions test_* of the test packages). Nothing of it is copied anywhere. The documents depend on the version
of Python; the split of a file depends on its name alone.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kd_llm.data import SPLITS, split_of

DOMAINS = ["prose", "code", "tests"]
SHORTEST, LONGEST = 80, 6000
PER_FILE = 25
"""Characters of a document; documents of a domain that one file gives at most."""

SKIPPED = {"site-packages", "dist-packages", "__pycache__", "lib2to3", "idlelib", "turtledemo", "pydoc_data"}
TEST_FOLDERS = {"test", "tests"}


@dataclass(frozen=True)
class Document:
    text: str
    domain: str
    file: str


def library_folder() -> Path:
    """Where the standard library is installed."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(folder: Path) -> list[Path]:
    """Python files of the library, in the order of the hash of their names: any beginning of it is a fair sample."""
    files = [p for p in folder.rglob("*.py") if not SKIPPED & set(p.relative_to(folder).parts)]
    return sorted(files, key=lambda path: hashlib.sha256(_name(path, folder).encode()).hexdigest())


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def is_test(name: str) -> bool:
    return bool(TEST_FOLDERS & set(name.split("/")[:-1]))


@cache
def read_corpus(
    held_out: float,
    size: int | None,
    eval_size: int | None,
    domains: tuple[str, ...] | None,
    folder: Path | None = None,
) -> tuple[dict[str, list[Document]], list[str], list[str]]:
    """Split -> documents, the domains, and notes. At most `size` (`eval_size`) documents of each domain a split.

    Reading stops as soon as every wanted domain has its documents. Equal documents are kept once. Where the interpreter
    has no test package, `tests` are the doctests of docstrings and the functions of `unittest`, and a note says so.
    """
    folder = folder or library_folder()
    files = source_files(folder)
    packaged = any(is_test(_name(path, folder)) for path in files)
    notes = [] if packaged else [f"{folder} has no test package: domain 'tests' is doctests and the unittest package"]
    wanted = [name for name in DOMAINS if domains is None or name in domains]
    limits = {"train": size, "validation": eval_size, "test": eval_size}
    documents: dict[str, list[Document]] = {name: [] for name in SPLITS}
    counts = {(split, domain): 0 for split in SPLITS for domain in wanted}
    seen: set[str] = set()

    def full(split: str, domain: str) -> bool:
        limit = limits[split]
        return limit is not None and counts[split, domain] >= limit

    for path in files:
        name = _name(path, folder)
        split = split_of(name, held_out)
        given = ["tests"] if is_test(name) else ["prose", "code"] + ([] if packaged else ["tests"])
        open_domains = [domain for domain in given if domain in wanted and not full(split, domain)]
        if not open_domains:
            continue
        for document in file_documents(path, name, open_domains, packaged):
            key = " ".join(document.text.split())
            if key not in seen and not full(split, document.domain):
                seen.add(key)
                counts[split, document.domain] += 1
                documents[split].append(document)
    return documents, list(DOMAINS), notes


def file_documents(path: Path, name: str, domains: list[str], packaged: bool) -> Iterator[Document]:
    """The documents of one file; none where it is not valid Python (some tests are broken on purpose)."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like, in sources that are not ours
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError, OSError, RecursionError):
        return
    lines = source.splitlines()
    makers = {"prose": _prose, "code": _code, "tests": _tests if packaged else _other_tests}
    for domain in domains:
        found = [text for text in makers[domain](tree, lines, name) if SHORTEST <= len(text) <= LONGEST]
        step = max(1.0, len(found) / PER_FILE)
        for index in range(min(len(found), PER_FILE)):
            yield Document(found[int(index * step)], domain, name)


Functions = (ast.FunctionDef, ast.AsyncFunctionDef)


def _prose(tree: ast.Module, lines: list[str], name: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and ">>>" not in doc:
                yield inspect.cleandoc(doc)
    yield from _comments(tree, lines)


def _comments(tree: ast.Module, lines: list[str]) -> Iterator[str]:
    """Blocks of neighbouring comment lines, without the sign."""
    inside = _string_lines(tree)
    block: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        stripped = line.strip()
        if stripped.startswith("#") and number not in inside:
            block.append(stripped.lstrip("#").removeprefix(" ").rstrip())
        elif block:
            yield "\n".join(block).strip("\n")
            block = []


def _string_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines inside strings of several lines: a sign # there starts no comment."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.end_lineno != node.lineno:
            inside.update(range(node.lineno + 1, (node.end_lineno or node.lineno) + 1))
    return inside


def _code(tree: ast.Module, lines: list[str], name: str) -> Iterator[str]:
    inside = _string_lines(tree)
    for node in _outer_functions(tree):
        yield _function_text(node, lines, inside)


def _tests(tree: ast.Module, lines: list[str], name: str) -> Iterator[str]:
    inside = _string_lines(tree)
    for node in _outer_functions(tree):
        if node.name.startswith("test"):
            yield _function_text(node, lines, inside)


def _other_tests(tree: ast.Module, lines: list[str], name: str) -> Iterator[str]:
    if name.startswith("unittest/") or name == "doctest.py":
        yield from _code(tree, lines, name)
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and ">>>" in doc:
                yield inspect.cleandoc(doc)


def _outer_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of the module and methods of its classes, not those inside of functions."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop(0)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Functions):
                yield child
            elif isinstance(child, ast.ClassDef | ast.If | ast.Try):
                waiting.append(child)


def _function_text(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], inside: set[int]) -> str:
    """The function without its docstring and without lines of comment, dedented."""
    end = node.end_lineno or node.lineno
    skipped: set[int] = set()
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1:
        skipped.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    kept = [
        lines[number - 1].rstrip()
        for number in range(node.lineno, end + 1)
        if number not in skipped and (number in inside or not lines[number - 1].lstrip().startswith("#"))
    ]
    return textwrap.dedent("\n".join(kept)).strip("\n")
