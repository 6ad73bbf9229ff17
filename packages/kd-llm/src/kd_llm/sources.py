"""The sources of `DataConfig.name`: each gives the rows of three splits, the names of domains and of classes."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_llm.data import SPLITS, ColumnsConfig, DataConfig, by_hash, existing, share, split_of
from kdcore.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
Parts = dict[str, "list[Row] | Dataset"]


@dataclass
class Source:
    """Rows of train, validation and test; `domain` and `label` are indices into the two lists of names."""

    parts: Parts
    domains: list[str]
    label_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def stdlib(config: DataConfig, seed: int) -> Source:
    """The sources of the running Python's standard library, in `kd_llm.stdlib_corpus`."""
    from kd_llm.stdlib_corpus import read_corpus

    kept = None if config.domains is None else tuple(config.domains)
    documents, domains, notes = read_corpus(config.held_out, config.size, config.eval_size, kept)
    parts: Parts = {name: [{"text": d.text, "domain": domains.index(d.domain)} for d in documents[name]]
                    for name in SPLITS}  # fmt: skip
    return Source(parts, domains, notes=notes)


# ---------------------------------------------------------------- classification


TREC_LABELS = ["description", "entity", "abbreviation", "human", "location", "number"]
SST2_LABELS = ["negative", "positive"]


def trec(config: DataConfig, seed: int) -> Source:
    """Questions of six types: `TREC.train.all` and `TREC.test.all`, a line is "label text"."""
    folder = text_folder(config)
    train = list(_labelled(folder / "TREC.train.all", TREC_LABELS))
    parts: Parts = {"train": [], "validation": [], "test": list(_labelled(folder / "TREC.test.all", TREC_LABELS))}
    for row in train:
        parts["validation" if share(row["text"]) < config.held_out else "train"].append(row)  # type: ignore[union-attr]
    return Source(parts, ["questions"], TREC_LABELS)


def sst2(config: DataConfig, seed: int) -> Source:
    """Sentences of film reviews: `stsa.binary.train`, `.dev` and `.test`, a line is "label text"."""
    folder = text_folder(config)
    files = {"train": "train", "validation": "dev", "test": "test"}
    parts: Parts = {name: list(_labelled(folder / f"stsa.binary.{end}", SST2_LABELS)) for name, end in files.items()}
    return Source(parts, ["reviews"], SST2_LABELS)


def text_folder(config: DataConfig) -> Path:
    """data.root, or the folder `text` in the one that KD_DATA names."""
    if config.root is not None:
        return config.path
    if not os.environ.get("KD_DATA"):
        raise InputError(
            f"data.name = '{config.name}': its files are not here; give data.root, or set KD_DATA to a folder that "
            "holds text/"
        )
    return existing(Path(os.environ["KD_DATA"]) / "text", "KD_DATA", os.environ["KD_DATA"])


def _labelled(path: Path, names: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        label, _, text = line.partition(" ")
        if not label.isdigit() or int(label) >= len(names) or not text.strip():
            raise InputError(f"{path}, line {number}: expected a label of 0 to {len(names) - 1}, a blank and text")
        yield {"text": text.strip(), "label": int(label), "domain": 0}


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="strict")
    except UnicodeDecodeError:
        return path.read_text(encoding="latin-1")  # the releases of TREC and SST are not all UTF-8
    except OSError as error:
        raise InputError(f"data file {path}: cannot be read ({error.strerror})") from None


# ---------------------------------------------------------------- plain text


def shakespeare(config: DataConfig, seed: int) -> Source:
    """The plays in one file (`tinyshakespeare/input.txt`), about 600 characters of whole speeches a document.

    The last shares of the file are validation and test: neighbouring speeches are not torn apart.
    """
    folder = text_folder(config)
    candidates = [folder] if folder.is_file() else [folder / "tinyshakespeare" / "input.txt", folder / "input.txt"]
    path = next((file for file in candidates if file.is_file()), None)
    if path is None:
        raise InputError(f"data.root = {folder}: no tinyshakespeare/input.txt and no input.txt in it")
    documents, current = [], ""
    for speech in read_text(path).split("\n\n"):
        current = f"{current}\n\n{speech}" if current else speech
        if len(current) >= 600:
            documents.append({"text": current, "domain": 0})
            current = ""
    if current:
        documents.append({"text": current, "domain": 0})
    count = max(1, round(config.held_out * len(documents)))
    parts: Parts = {
        "train": documents[: -2 * count],
        "validation": documents[-2 * count : -count],
        "test": documents[-count:],
    }
    return Source(parts, ["plays"])


def text(config: DataConfig, seed: int) -> Source:
    """A text file or a folder of *.txt; paragraphs are documents, the subfolders of a folder are domains.

    With files (or folders) train, validation and test they are the splits, else files are split by their paragraphs.
    """
    root = config.path
    files = [root] if root.is_file() else sorted(root.rglob("*.txt"))
    if not files:
        raise InputError(f"data.root = {root}: no *.txt in it")
    rows: list[tuple[str, str, str]] = []  # split or "", domain, text
    for file in files:
        inside = [] if root.is_file() else list(file.relative_to(root).with_suffix("").parts)
        split = inside.pop(0) if inside and inside[0] in SPLITS else ""
        domain = inside[0] if len(inside) > 1 else "text"
        rows += [(split, domain, part.strip()) for part in re.split(r"\n\s*\n", read_text(file)) if part.strip()]
    domains = sorted({domain for _, domain, _ in rows})
    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    given = {split for split, _, _ in rows if split}
    for split, domain, paragraph in rows:
        row = {"text": paragraph, "domain": domains.index(domain)}
        parts[split or split_of(paragraph, config.held_out)].append(row)
    _take_missing(parts, given, config.held_out)
    return Source({**parts}, domains)


def _take_missing(parts: dict[str, list[Row]], given: set[str], held_out: float) -> None:
    """Where files give some splits, the missing ones come from the training rows, by their hash."""
    if not given:
        return
    train = parts["train"]
    for name, low in (("validation", 0.0), ("test", held_out)):
        if name not in given and not parts[name]:
            parts[name] = [row for row in train if low <= share(_key(row)) < low + held_out]
            parts["train"] = [row for row in parts["train"] if not low <= share(_key(row)) < low + held_out]


def _key(row: Row) -> str:
    return json.dumps({name: value for name, value in row.items() if name != "domain"}, sort_keys=True)


# ---------------------------------------------------------------- tables


def jsonl(config: DataConfig, seed: int) -> Source:
    """A file with a JSON object a line, or a folder with train.jsonl and optionally validation.jsonl and test.jsonl."""
    root = config.path
    files = (
        {"": root} if root.is_file() else {n: root / f"{n}.jsonl" for n in SPLITS if (root / f"{n}.jsonl").is_file()}
    )
    if not files or (root.is_dir() and "train" not in files):
        raise InputError(f"data.root = {root}: no train.jsonl in it")
    rows = {split: list(_json_rows(path)) for split, path in files.items()}
    columns = guessed_columns(config.columns, next(iter(next(iter(rows.values()))), {}), f"data.root = {root}")
    named = {split: [_row(values, columns, root) for values in part] for split, part in rows.items()}
    if "" in named:
        parts = by_hash(named[""], [_key(row) for row in named[""]], config.held_out)
    else:
        parts = {name: named.get(name, []) for name in SPLITS}
        _take_missing(parts, set(named), config.held_out)
    domains = _numbered(parts, "domain", "text")
    labels = _numbered(parts, "label", None)
    return Source({**parts}, domains, labels)


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"data file {path}, line {number}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"data file {path}, line {number}: expected an object, got {type(values).__name__}")
        yield values


def guessed_columns(columns: ColumnsConfig, first: Row, where: str) -> ColumnsConfig:
    """The config's columns, or those of the usual names; InputError where one is not in the data."""
    given = columns.model_dump(exclude_none=True)
    for field_name, name in given.items():
        if name not in first:
            raise InputError(
                f"data.columns.{field_name} = '{name}': {where} has no such column{did_you_mean(name, first)}"
            )
    if not {"text", "prompt", "messages"} & given.keys():
        usual = (("prompt", "completion"), ("messages",), ("text",))
        form = next((names for names in usual if all(name in first for name in names)), None)
        if form is None:
            raise InputError(f"data.columns: required, {where} has {', '.join(first) or 'no rows'}")
        given.update({name: name for name in form})
    given.update({name: name for name in ("label", "domain") if name in first and name not in given})
    return ColumnsConfig.model_validate(given)


def _row(values: Row, columns: ColumnsConfig, root: Path | str) -> Row:
    """A row with our names; the last message of a chat is its completion."""
    row: Row = {}
    for name, column in columns.model_dump(exclude_none=True).items():
        if values.get(column) is None:
            raise InputError(f"data.columns.{name} = '{column}': missing in a row of {root}")
        row[name] = values[column]
    messages = row.pop("messages", None)
    if messages is not None:
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise InputError(f"data.columns.messages: a chat in {root} does not end with a message of the assistant")
        row["prompt"] = [{"role": m["role"], "content": m["content"]} for m in messages[:-1]]
        row["completion"] = messages[-1]["content"]
    for name in ("text", "completion"):
        if name in row and not isinstance(row[name], str):
            raise InputError(f"data.columns.{name}: a row of {root} holds {type(row[name]).__name__}, expected text")
    return row


def _numbered(parts: dict[str, list[Row]], name: str, default: str | None) -> list[str]:
    """Replaces names (or sparse numbers) by indices into the sorted list of names, which is returned."""
    values = {row[name] for part in parts.values() for row in part if name in row}
    if not values and default is None:
        return []
    order = sorted(values, key=lambda value: (isinstance(value, str), value)) or [default]
    if name == "label" and all(isinstance(value, int) for value in order):
        order = list(range(max(order) + 1))
    number = {value: index for index, value in enumerate(order)}
    for part in parts.values():
        for row in part:
            row[name] = number[row.get(name, order[0])]
    return [str(value) for value in order]


def hub(config: DataConfig, seed: int) -> Source:
    """A data set by hub name, or a local folder of its files, through `datasets.load_dataset`."""
    from datasets import load_dataset

    if config.root is None:
        raise InputError("data.root: required for data.name = 'hub', the data set's name or a folder")
    root = os.path.expandvars(config.root)
    try:
        found = load_dataset(root, config.subset, revision=config.revision)
    except Exception as error:  # ConnectionError, DatasetNotFoundError, ValueError, OSError: all about the name
        raise InputError(f"data.root = '{config.root}': datasets cannot load it ({_first_line(error)})") from None
    splits = {name: config.splits.get(name, name) for name in SPLITS}
    for name, given in config.splits.items():
        if given not in found:
            raise InputError(f"data.splits.{name} = '{given}': no such split{did_you_mean(given, found)}")
    if splits["train"] not in found:
        raise InputError(f"data.splits.train: required, the data set has {', '.join(found)}")
    train = found[splits["train"]]
    columns = guessed_columns(config.columns, train[0] if len(train) else {}, config.root)
    parts: dict[str, Dataset] = {n: found[s] for n, s in splits.items() if s in found}
    for name in SPLITS[1:]:
        if name not in parts:
            pieces = parts["train"].train_test_split(test_size=config.held_out, seed=0)
            parts["train"], parts[name] = pieces["train"], pieces["test"]
    features = train.features
    label_names = list(getattr(features.get(columns.label or ""), "names", None) or [])
    return _hub_source(parts, columns, label_names, config)


def _hub_source(
    parts: dict[str, Dataset], columns: ColumnsConfig, label_names: list[str], config: DataConfig
) -> Source:
    names = {column: {v for part in parts.values() for v in part.unique(column)}
             for column in (columns.domain, columns.label) if column is not None}  # fmt: skip
    domains = sorted(map(str, names[columns.domain])) if columns.domain else ["text"]
    if columns.label and not label_names:
        values = names[columns.label] - {-1}  # the hidden labels of a benchmark's test split
        numbers = all(isinstance(value, int) for value in values)
        label_names = [str(v) for v in (range(max(values) + 1) if numbers else sorted(values))]

    def renamed(values: Row) -> Row:
        row = _row(values, columns, config.root or "")
        row["domain"] = domains.index(str(row["domain"])) if columns.domain else 0
        if isinstance(row.get("label"), str):
            row["label"] = label_names.index(row["label"])
        return row

    result: Parts = {
        name: part.map(renamed, remove_columns=part.column_names, desc=None) for name, part in parts.items()
    }
    return Source(result, domains, label_names)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ---------------------------------------------------------------- arithmetic


FAMILIES: dict[str, tuple[str, int, int]] = {
    "add1": ("+", 1, 1),
    "add2": ("+", 2, 2),
    "add3": ("+", 3, 3),
    "sub1": ("-", 1, 1),
    "sub2": ("-", 2, 2),
    "sub3": ("-", 3, 3),
    "mul1": ("*", 1, 1),
    "mul21": ("*", 2, 1),
    "mul2": ("*", 2, 2),
}
"""Family -> operation, most digits of a, most digits of b: nine difficulties, which are the domains."""


def answer(a: int, operation: str, b: int) -> int:
    return a + b if operation == "+" else a - b if operation == "-" else a * b


def arithmetic(config: DataConfig, seed: int) -> Source:
    """Problems `a+b=`, `a-b=`, `a*b=` with their exact answers; no problem is in two splits.

    A family with fewer problems than `size` asks for gives all it has. Splits are by the hash of the problem, so they
    are the same for every seed; the seed draws which problems are taken, and their order.
    """
    names = config.domains or list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise InputError(f"data.domains: '{name}' is not a family of arithmetic{did_you_mean(name, FAMILIES)}")
    wanted = {"train": config.size or 1000, "validation": config.eval_size or 100, "test": config.eval_size or 100}
    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for index, family in enumerate(names):
        operation, digits_a, digits_b = FAMILIES[family]
        counts = dict.fromkeys(SPLITS, 0)
        for a, b in _pairs(10**digits_a, 10**digits_b, random.Random(f"{seed} {family}")):
            problem = f"{a}{operation}{b}="
            split = split_of(problem, config.held_out)
            if counts[split] < wanted[split]:
                counts[split] += 1
                completion = str(answer(a, operation, b))
                parts[split].append({"prompt": problem, "completion": completion, "domain": index})
            if counts == wanted:
                break
    return Source({**parts}, names)


def _pairs(count_a: int, count_b: int, generator: random.Random) -> Iterator[tuple[int, int]]:
    """Every pair once, in a drawn order; a pair is one number, so that the largest family is not listed in memory."""
    total = count_a * count_b
    for number in generator.sample(range(total), total) if total <= 10_000 else generator.sample(range(total), 40_000):
        yield divmod(number, count_b)


SOURCES: dict[str, Callable[[DataConfig, int], Source]] = {
    "stdlib": stdlib,
    "trec": trec,
    "sst2": sst2,
    "shakespeare": shakespeare,
    "arithmetic": arithmetic,
    "jsonl": jsonl,
    "text": text,
    "hub": hub,
}
