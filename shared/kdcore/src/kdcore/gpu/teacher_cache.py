"""Teacher outputs on disk, so that a training run holds no teacher.

A cache is a folder of safetensors shards and `index.json`. A row is either `full` (the C logits as given) or `topk`:
the k largest log-probabilities ln p_v at temperature 1, their ids, and the log of the probability that is missing,
ln(1 - P), P = sum over the support. 64 of 128k outputs take 64 (4 + 2) + 4 = 388 bytes instead of 512 KiB.

    index.json                 header, and for each shard: file, bytes, sha256, keys
    shard-00000.safetensors    row_offsets (n + 1), then values (rows, C), or ids, logp (rows, k), log_missing (rows,)

Every file is written under another name, flushed to the disk and renamed; the index names a shard only once it is
whole, so a killed writer loses at most the unfinished shard and `create` goes on from there. One writer, any number of
readers: shards are memory-mapped and a reader touches only the rows it asks for. `kdcore.gpu.topk.topk_kl` is the
divergence on topk rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdcore.errors import InputError, did_you_mean
from kdcore.gpu.fingerprint import data_fingerprint, module_fingerprint
from kdcore.gpu.topk import TopK, topk_kl

__all__ = ["CacheWriter", "TeacherCache", "TopK", "data_fingerprint", "module_fingerprint", "topk_kl"]

FORMAT_VERSION = 1
INDEX = "index.json"
KINDS = ("full", "topk")
HEADER_FIELDS = {"format_version", "kind", "k", "dtype", "num_outputs", "sequences", "teacher", "data"}
SHARD_FIELDS = {"file", "keys", "bytes", "sha256"}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

Key = int | str


class TeacherCache:
    """Reader of a cache folder: `cache[keys]`, `key in cache`, `len(cache)`, `cache.keys()`, `cache.lengths(keys)`.

    May be handed to data-loader workers: the memory maps are opened where they are used.
    """

    def __init__(self, folder: Path, header: dict[str, Any], shards: list[dict[str, Any]]):
        self.folder, self.header, self.shards = folder, header, shards
        self._rows: dict[Key, tuple[int, int, int]] = {}
        self._maps: dict[int, dict[str, Tensor]] = {}
        for number, shard in enumerate(shards):
            keys, offsets = _read_keys(folder / shard["file"], header)
            self._rows.update(zip(keys, zip([number] * len(keys), offsets[:-1], offsets[1:])))

    @staticmethod
    def create(
        folder: str | os.PathLike,
        *,
        kind: str,
        num_outputs: int,
        teacher: nn.Module | Mapping[str, Tensor] | str,
        data: str,
        k: int | None = None,
        dtype: str | None = None,
        sequences: bool = False,
        shard_size: int = 1024,
    ) -> CacheWriter:
        """A writer for `folder`; goes on where an earlier writer with the same header stopped.

        Args:
            kind: "full" or "topk" (then `k`). num_outputs: C, the classes or the vocabulary.
            teacher: the module, its state dict, or a fingerprint from `module_fingerprint`.
            data: a string that changes whenever the data does, `data_fingerprint(...)` for one.
            dtype: "float16", "bfloat16", "float32" or "float64"; float32 for full, float16 for topk by default
                (3 digits of a log-probability; log_missing is always float32).
            sequences: several rows per key (tokens), given as one (L, C) tensor per key.
            shard_size: keys per shard.
        """
        header = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "k": k,
            "dtype": dtype or ("float16" if kind == "topk" else "float32"),
            "num_outputs": num_outputs,
            "sequences": sequences,
            "teacher": _fingerprint(teacher),
            "data": data,
        }
        _check_header(header)
        if shard_size < 1:
            raise InputError(f"shard_size: given {shard_size}, allowed: an integer >= 1")
        return CacheWriter(Path(folder), header, shard_size)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        *,
        teacher: nn.Module | Mapping[str, Tensor] | str | None = None,
        data: str | None = None,
        verify: bool = False,
    ) -> TeacherCache:
        """The finished cache in `folder`, checked against the teacher and data the run has (None: not checked).

        Every shard's presence, length and header are checked; `verify` reads all of it and compares sha256.
        Raises: InputError that names the file, what was found and what was expected.
        """
        folder = Path(folder)
        header, shards, complete = _read_index(folder)
        for name, expected in (("teacher", teacher), ("data", data)):
            if expected is not None and header[name] != (expected := _fingerprint(expected)):
                raise InputError(f"{folder / INDEX}: {name}: found {header[name]!r}, expected {expected!r}")
        if not complete:
            raise InputError(
                f"{folder / INDEX}: found {len(shards)} shards of an unfinished cache, expected a finished one; "
                "run the writer again, it goes on from there"
            )
        for shard in shards:
            problem = _shard_problem(folder, shard, verify)
            if problem:
                raise InputError(problem)
        return cls(folder, header, shards)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def keys(self) -> Iterable[Key]:
        """All keys, in the order they were written."""
        return self._rows.keys()

    def lengths(self, keys: Sequence[Key] | Tensor) -> list[int]:
        """Rows of each key."""
        return [stop - start for _, start, stop in map(self._locate, _key_list(keys))]

    def __getitem__(self, keys: Key | Sequence[Key] | Tensor) -> Tensor | TopK:
        """The rows of the keys in their order, copied: (rows, C), or a TopK of (rows, k).

        One key instead of a list gives its row without the leading dimension, (C,) or (k,), or its (L, ...) rows in a
        cache of sequences. Raises: InputError for an unknown key.
        """
        keys = keys.tolist() if isinstance(keys, Tensor | np.ndarray | np.generic) else keys
        single = isinstance(keys, int | str)
        wanted = _key_list([keys] if single else keys)
        if not wanted:
            raise InputError(f"{self.folder}: keys: given none, allowed: at least one")
        places = [self._locate(key) for key in wanted]
        names = ("ids", "logp", "log_missing") if self.header["kind"] == "topk" else ("values",)
        columns = [self._column(name, places) for name in names]
        if single and not self.header["sequences"]:
            columns = [column.squeeze(0) for column in columns]
        return TopK(*columns) if self.header["kind"] == "topk" else columns[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def _locate(self, key: Key) -> tuple[int, int, int]:
        if key not in self._rows:
            raise InputError(f"{self.folder}: key {key!r}: not among the {len(self)} keys of this cache")
        return self._rows[key]

    def _column(self, name: str, places: list[tuple[int, int, int]]) -> Tensor:
        return torch.cat([self._map(shard)[name][start:stop] for shard, start, stop in places])

    def _map(self, number: int) -> dict[str, Tensor]:
        if number not in self._maps:
            with safe_open(self.folder / self.shards[number]["file"], "pt") as file:
                self._maps[number] = {name: file.get_tensor(name) for name in file.keys() if name != "keys"}  # noqa: SIM118
        return self._maps[number]


class CacheWriter:
    """What `TeacherCache.create` returns; a context manager. Leaving it after an error keeps the whole shards only."""

    def __init__(self, folder: Path, header: dict[str, Any], shard_size: int):
        self.folder, self.header, self.shard_size = folder, header, shard_size
        self._shards: list[dict[str, Any]] = []
        self._stored: set[Key] = set()
        self._pending: list[tuple[Key, dict[str, Tensor]]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / INDEX).exists():
            self._resume()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()

    def __contains__(self, key: object) -> bool:
        """Whether the key is stored already, so that its teacher forward can be left out."""
        return key in self._stored

    def add(self, keys: Sequence[Key] | Tensor, logits: Tensor | Sequence[Tensor]) -> int:
        """Stores teacher logits (n, C), or one (L, C) tensor per key for sequences; returns how many keys were new."""
        new = self._new(keys, logits, "logits")
        if not new:
            return 0
        parts = [logits[i].detach().cpu() for i in new.values()]
        for key, part in zip(new, parts):
            self._check(key, part)
        columns = self._encode(torch.cat(parts) if self.header["sequences"] else torch.stack(parts))
        lengths = [len(part) if self.header["sequences"] else 1 for part in parts]
        return self._store(new, columns, lengths)

    def add_topk(self, keys: Sequence[Key] | Tensor, rows: Sequence[TopK]) -> int:
        """`add` for a cache of topk sequences whose top-k has been taken where the logits are: one (L, k) per key."""
        k = self.header["k"]
        if self.header["kind"] != "topk" or not self.header["sequences"]:
            raise InputError("add_topk: allowed for a cache of kind 'topk' with sequences")
        new = self._new(keys, rows, "rows")
        parts = [rows[i] for i in new.values()]
        for key, part in zip(new, parts):
            shapes = [tuple(x.shape) for x in (part.ids, part.logp, part.log_missing)]
            if shapes != [(n := len(part.ids), k), (n, k), (n,)] or bool(part.logp.isnan().any()):
                raise InputError(f"rows of key {key!r}: given {shapes}, allowed: (L, {k}), (L, {k}), (L,) without NaN")
        if not new:
            return 0
        ids, logp, missing = (torch.cat([getattr(p, x) for p in parts]) for x in ("ids", "logp", "log_missing"))
        return self._store(new, self._topk_columns(TopK(ids, logp, missing)), [len(p.ids) for p in parts])

    def _new(self, keys: Sequence[Key] | Tensor, rows: Sequence[Any] | Tensor, name: str) -> dict[Key, int]:
        keys = _key_list(keys)
        if len(keys) != len(rows):
            raise InputError(f"keys, {name}: given {len(keys)} and {len(rows)}, allowed: equally many")
        return {key: i for i, key in enumerate(keys) if key not in self._stored}

    def _store(self, new: Mapping[Key, int], columns: Mapping[str, Tensor], lengths: list[int]) -> int:
        split = {name: column.split(lengths) for name, column in columns.items()}
        for i, key in enumerate(new):
            self._stored.add(key)
            self._pending.append((key, {name: pieces[i] for name, pieces in split.items()}))
            if len(self._pending) == self.shard_size:
                self._flush()
        return len(new)

    def close(self) -> None:
        """Writes the last shard and marks the cache as finished."""
        if self._pending:
            self._flush()
        self._write_index(complete=True)

    def _check(self, key: Key, rows: Tensor) -> None:
        sequences, c = self.header["sequences"], self.header["num_outputs"]
        if rows.ndim != 1 + sequences or rows.shape[-1] != c or not rows.is_floating_point():
            given, one = f"{rows.dtype} {tuple(rows.shape)}", f"(L, {c})" if sequences else f"({c},)"
            raise InputError(f"logits of key {key!r}: given {given}, allowed: floating-point {one}")
        if bool(rows.isnan().any()):
            raise InputError(f"logits of key {key!r}: given NaN, allowed: numbers")

    def _encode(self, rows: Tensor) -> dict[str, Tensor]:
        dtype = DTYPES[self.header["dtype"]]
        if self.header["kind"] == "topk":
            return self._topk_columns(TopK.from_logits(rows, self.header["k"]))
        values = rows.to(dtype)
        if bool((values.isinf() & ~rows.isinf()).any()):
            largest = rows[rows.isfinite()].abs().max().item()
            raise InputError(f"logits: given {largest:g}, allowed: what {self.header['dtype']} holds; use float32")
        return {"values": values}

    def _topk_columns(self, top: TopK) -> dict[str, Tensor]:
        columns = {"ids": top.ids.int(), "logp": top.logp.to(DTYPES[self.header["dtype"]])}
        return {name: x.detach().cpu() for name, x in {**columns, "log_missing": top.log_missing.float()}.items()}

    def __len__(self) -> int:
        """Keys that are stored."""
        return len(self._stored)

    def _flush(self) -> None:
        keys = [key for key, _ in self._pending]
        columns = {name: torch.cat([row[name] for _, row in self._pending]) for name in self._pending[0][1]}
        lengths = torch.tensor([0, *(len(next(iter(row.values()))) for _, row in self._pending)])
        columns["row_offsets"] = lengths.cumsum(0)
        columns["keys"] = torch.frombuffer(bytearray(json.dumps(keys).encode()), dtype=torch.uint8)
        content = save(columns, metadata={name: json.dumps(value) for name, value in self.header.items()})
        used = {shard["file"] for shard in self._shards}
        name = next(n for i in range(len(used) + 1) if (n := f"shard-{i:05d}.safetensors") not in used)
        _write_atomically(self.folder / name, content)
        sha256 = hashlib.sha256(content).hexdigest()
        self._shards.append({"file": name, "keys": len(keys), "bytes": len(content), "sha256": sha256})
        self._pending = []
        self._write_index(complete=False)

    def _write_index(self, complete: bool) -> None:
        index = {**self.header, "complete": complete, "shards": self._shards}
        _write_atomically(self.folder / INDEX, json.dumps(index, indent=1).encode())

    def _resume(self) -> None:
        header, shards, _ = _read_index(self.folder)
        for name, expected in self.header.items():
            if header[name] != expected:
                raise InputError(
                    f"{self.folder / INDEX}: {name}: found {header[name]!r}, expected {expected!r}; "
                    "choose another folder or remove this one"
                )
        for shard in shards:
            if _shard_problem(self.folder, shard, verify=False) is None:  # a lost or cut one is written again
                self._shards.append(shard)
                self._stored.update(_read_keys(self.folder / shard["file"], header)[0])


def _fingerprint(source: nn.Module | Mapping[str, Tensor] | str) -> str:
    return source if isinstance(source, str) else module_fingerprint(source)


def _key_list(keys: Any) -> list[Key]:
    keys = [key.item() if isinstance(key, Tensor | np.generic) else key for key in keys]
    for key in keys:
        if not isinstance(key, int | str) or isinstance(key, bool):
            raise InputError(f"keys: given {key!r} ({type(key).__name__}), allowed: integers and strings")
    return keys


def _check_header(header: Mapping[str, Any]) -> None:
    if header["kind"] not in KINDS:
        raise InputError(f"kind: given {header['kind']!r}{did_you_mean(str(header['kind']), KINDS)}")
    if header["dtype"] not in DTYPES:
        raise InputError(f"dtype: given {header['dtype']!r}{did_you_mean(str(header['dtype']), DTYPES)}")
    if header["num_outputs"] < 1:
        raise InputError(f"num_outputs: given {header['num_outputs']}, allowed: an integer >= 1")
    k = header["k"]
    if header["kind"] == "topk" and not (isinstance(k, int) and 1 <= k <= header["num_outputs"]):
        raise InputError(f"k: given {k}, allowed: 1 to the {header['num_outputs']} outputs")
    if header["kind"] == "full" and k is not None:
        raise InputError(f"k: given {k} with kind 'full', allowed: None")


def _read_index(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    """Header, shards, finished."""
    path = folder / INDEX
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected the index of a teacher cache")
    unreadable = InputError(f"{path}: found no readable index, expected the JSON that a cache's writer leaves")
    try:
        index = json.loads(path.read_text())
        if index["format_version"] != FORMAT_VERSION:
            raise InputError(f"{path}: format_version: found {index['format_version']}, expected {FORMAT_VERSION}")
        shards, complete = index.pop("shards"), index.pop("complete")
        whole = all(set(s) >= SHARD_FIELDS and Path(s["file"]).name == s["file"] for s in shards)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable from error
    if not whole or set(index) != HEADER_FIELDS:
        raise unreadable
    return index, shards, complete


def _shard_problem(folder: Path, shard: Mapping[str, Any], verify: bool) -> str | None:
    path = folder / shard["file"]
    if not path.is_file():
        return f"{path}: found no such shard, expected {shard['bytes']} bytes"
    if path.stat().st_size != shard["bytes"]:
        return f"{path}: found {path.stat().st_size} bytes, expected {shard['bytes']}"
    if verify:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard["sha256"]:
            return f"{path}: found sha256 {found}, expected {shard['sha256']}"
    return None


def _read_keys(path: Path, header: Mapping[str, Any]) -> tuple[list[Key], list[int]]:
    """Keys and row offsets of a shard whose own header must be the index's."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            keys = json.loads(file.get_tensor("keys").numpy().tobytes())
            offsets = file.get_tensor("row_offsets").tolist()
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path}: found no readable shard ({error}), expected one of this cache") from error
    if found != header:
        raise InputError(f"{path}: found a shard of {found}, expected one of {header}")
    return keys, offsets


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must be on the disk too
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
