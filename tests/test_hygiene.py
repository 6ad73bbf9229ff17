"""What must not be in the repository: lock files, machine paths, index addresses, secrets, unsafe loading."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEBIBYTE = 2**20


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


FILES = tracked()
TEXTS = {path: path.read_bytes().decode("utf-8", errors="replace") for path in FILES}

UNWANTED = re.compile(
    r"(^|/)(uv\.lock|\.env|\.DS_Store|.*\.(pyc|pkl|pickle|pt|pth|ckpt|whl)|(\.venv|__pycache__|runs|dist)/.*)$"
)
# The patterns are put together from parts, so that this file does not hold what it looks for.
FOLDERS = "|".join(["work", "root", "home", "Users", "opt"])
INDEXES = "|".join(["py" + "pi", "/sim" + "ple", "artifactory"])
TOKENS = r"AKIA[0-9A-Z]{16}|gh[pousr]_\w{30,}|github_pat_\w{20,}|hf_\w{30,}|glpat-[\w-]{20,}|xox[abp]-[\w-]{10,}"
NAMES = "password|passwd|secret|api_?key|access_token"
FORBIDDEN = {
    "an absolute path of one machine": rf"(?<![\w./$}}-])/(?:{FOLDERS})/\w",
    "the address of a package index": rf"(?:https?|file)://[^\s\"')]*(?:{INDEXES})",
    "a merge marker": r"^(?:<{7}|>{7}|\|{7})(?: |$)",
    "a private key": "-----BEGIN [A-Z ]*PRIVATE" + " KEY-----",
    "an access token": rf"\b(?:{TOKENS}|sk-\w{{32,}})",
    "a password": rf"(?i)\b(?:{NAMES})\b[\"']?\s*[:=]\s*[\"'][^\"'$\s]{{6,}}[\"']",
    "credentials in an address": r"\w+://[^\s/:@\"']+:[^\s/:@\"']+@",
}


def test_the_listing_is_not_empty():
    assert ROOT / "pyproject.toml" in FILES
    assert len(FILES) > 50


def test_no_unwanted_files():
    names = [path.relative_to(ROOT).as_posix() for path in FILES]
    assert [name for name in names if UNWANTED.search(name)] == []


def test_no_file_is_larger_than_a_mebibyte():
    assert [path for path in FILES if path.stat().st_size > MEBIBYTE] == []


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what):
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    found = []
    for path, text in TEXTS.items():
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(ROOT)}:{line}: {match[0][:40]}")
    assert found == []


SAMPLES = {
    "an absolute path of one machine": ["x = '/" + "home/me/data'", "/" + "work/main"],
    "the address of a package index": ["https://" + "pypi.org/simple", "file:///mnt" + "/simple"],
    "a merge marker": ["<" * 7 + " HEAD", ">" * 7 + " branch"],
    "a private key": ["-----BEGIN RSA PRIVATE" + " KEY-----"],
    "an access token": ["AKIA" + "A" * 16, "ghp_" + "a" * 36, "hf_" + "a" * 34],
    "a password": ["pass" + 'word = "hunter22"', '"api_' + 'key": "abcdefgh"'],
    "credentials in an address": ["https://me:" + "hunter2@example.org"],
}
HARMLESS = ["runs/work/x", "$HOME/data", "https://arxiv.org/abs/2401.00001", "/usr/bin/env", "a" * 40, "=" * 7]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_patterns_find_what_they_are_for(what):
    for sample in SAMPLES[what]:
        assert re.search(FORBIDDEN[what], sample, re.MULTILINE), sample
    for sample in HARMLESS:
        assert not re.search(FORBIDDEN[what], sample, re.MULTILINE), sample


# ---------------------------------------------------------------- unsafe loading

SOURCES = [path for path in FILES if path.suffix == ".py" and "src" in path.relative_to(ROOT).parts]


def unsafe(tree: ast.AST) -> list[str]:
    """Calls that run or unpickle what they are given."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = getattr(node, "module", None)
            names = [f"{source}.{alias.name}" if source else alias.name for alias in node.names]
            unpicklers = [name for name in names if name.split(".")[0] in {"dill", "joblib", "cloudpickle"}]
            unpicklers += [name for name in names if name.startswith("pickle.") and not name.endswith("Error")]
            found += [f"{node.lineno}: {name}" for name in unpicklers]
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and not node.attr.endswith("Error"):
            found.append(f"{node.lineno}: pickle.{node.attr}")
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        bad = called in {"eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"}
        bad = bad or (called == "torch.load" and keywords.get("weights_only") != "True")
        bad = bad or (called.endswith(("np.load", "numpy.load")) and keywords.get("allow_pickle", "False") != "False")
        bad = bad or keywords.get("shell") == "True"
        if bad:
            found.append(f"{node.lineno}: {called}")
    return found


def test_sources_neither_unpickle_nor_evaluate():
    found = {path.relative_to(ROOT).as_posix(): unsafe(ast.parse(TEXTS[path])) for path in SOURCES}
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, map_location='cpu', weights_only=True)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path)", False),
        ("import pickle\npickle.load(file)", True),
        ("import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    pass", False),
        ("import joblib", True),
        ("from pickle import loads", True),
        ("eval(text)", True),
        ("model.eval()", False),
        ("subprocess.run(text, shell=True)", True),
    ],
)
def test_unsafe_calls_are_found(source, bad):
    assert bool(unsafe(ast.parse(source))) is bad
