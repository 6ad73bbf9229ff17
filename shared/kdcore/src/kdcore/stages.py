"""Stage, RunContext, run_stages: a run is a list of stages, and a finished stage is never run again.

Run directory: `config.yaml` (resolved), `environment.json`, `stages.json` (finished stages and their artefacts),
`metrics.jsonl`, `checkpoints/<stage>/`, one folder per artefact (`student/`, `teacher/`), `report.html`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kdcore.config import RunConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

Artefacts = dict[str, Path]
"""Name -> path of what a stage leaves for later stages and for the user, inside the run directory."""


@dataclass
class RunContext:
    """What a stage may use: the run's folder and seed, the accelerator, and what earlier stages left."""

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    resume: bool = False
    quiet: bool = False
    artefacts: Artefacts = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def log(self, **record: Any) -> None:
        """Appends one line to metrics.jsonl, on the main process."""
        if self.is_main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")

    def say(self, text: str) -> None:
        """One line for the person at the terminal."""
        if self.is_main and not self.quiet:
            print(text, flush=True)


class Stage(Protocol):
    """A step of a run. `run` returns artefacts; a stage that is recorded as finished is not run again."""

    name: str

    def run(self, context: RunContext) -> Artefacts: ...


@dataclass
class Procedure:
    """A stage without gradient training: mining, closed forms, search, selection, measuring."""

    name: str
    function: Callable[[RunContext], Artefacts]

    def run(self, context: RunContext) -> Artefacts:
        return self.function(context)


@dataclass
class CachedStage:
    """A stage whose artefacts are kept under the hash of `fingerprint` and reused by later runs.

    For the teachers that `small` configs train on the spot: every arm and method that names the same teacher, data
    and seed shares one. The artefacts are copied into the run, so that a run directory stands alone. An entry whose
    files do not have the recorded SHA-256 is made again.
    """

    stage: Stage
    fingerprint: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.stage.name

    def run(self, context: RunContext) -> Artefacts:
        entry = cache_folder() / self.name / digest(self.fingerprint)
        if _agreed(context, context.is_main and _is_whole(entry, context)):
            context.say(f"{self.name}: taken from the cache")
            return _copy_from_cache(context, entry)
        artefacts = self.stage.run(context)
        if context.is_main:
            _publish(artefacts, entry)
        context.accelerator.wait_for_everyone()
        return artefacts


def cache_folder() -> Path:
    """`KD_CACHE`, or `kd` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kd"
    return Path(os.environ.get("KD_CACHE") or default)


def digest(value: Any) -> str:
    """Short stable hash of a JSON-like value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _agreed(context: RunContext, hit: bool) -> bool:
    """The main process decides, so that no rank trains while another one skips."""
    if context.accelerator.num_processes == 1:
        return hit
    from accelerate.utils import broadcast_object_list

    return bool(broadcast_object_list([hit])[0])


def _is_whole(entry: Path, context: RunContext) -> bool:
    """Whether the cache has the entry, undamaged; a damaged one is removed."""
    if not entry.is_dir():
        return False
    try:
        expected = json.loads((entry / "artefacts.json").read_text())["files"]
        if expected == _checksums(entry):
            return True
        problem = "its files have changed"
    except (OSError, ValueError, KeyError, TypeError):
        problem = "artefacts.json is missing or unreadable"
    context.say(f"{entry.parent.name}: the cache entry {entry} is made again: {problem}")
    shutil.rmtree(entry, ignore_errors=True)
    return False


def _checksums(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file, without artefacts.json itself."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / "artefacts.json":
            with open(path, "rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _copy_from_cache(context: RunContext, entry: Path) -> Artefacts:
    names = json.loads((entry / "artefacts.json").read_text())["artefacts"]
    artefacts = {name: context.folder / relative for name, relative in names.items()}
    if context.is_main:
        for path in artefacts.values():
            source = entry / path.relative_to(context.folder)
            if source.is_dir():
                shutil.copytree(source, path, dirs_exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, path)
    context.accelerator.wait_for_everyone()
    return artefacts


def _publish(artefacts: Artefacts, entry: Path) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".tmp-"))
    try:
        for path in artefacts.values():
            target = temporary / path.name
            if path.is_dir():
                shutil.copytree(path, target)
            else:
                shutil.copy2(path, target)
        names = {name: path.name for name, path in artefacts.items()}
        record = {"artefacts": names, "files": _checksums(temporary)}
        (temporary / "artefacts.json").write_text(json.dumps(record, indent=2))
        os.rename(temporary, entry)
    except OSError:
        if not entry.is_dir():  # another process published the same stage first: theirs is as good
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------- running


def run_stages(stages: Sequence[Stage], context: RunContext) -> Artefacts:
    """Runs the stages in order, skips those that stages.json holds, and returns every artefact by name."""
    record = context.folder / "stages.json"
    finished: dict[str, dict[str, str]] = json.loads(record.read_text()) if record.is_file() else {}
    for stage in stages:
        if stage.name in finished:
            context.say(f"{stage.name}: finished before, skipped")
            artefacts = {name: context.folder / path for name, path in finished[stage.name].items()}
        else:
            artefacts = stage.run(context)
            names = {name: path.relative_to(context.folder).as_posix() for name, path in artefacts.items()}
            finished[stage.name] = names
            if context.is_main:
                write_atomically(record, json.dumps(finished, indent=2))
            context.accelerator.wait_for_everyone()
        context.artefacts.update(artefacts)
    return dict(context.artefacts)


def stage_seed(context: RunContext, name: str, seed: int | None = None) -> int:
    """The seed of a stage, by the run's (or `seed`) and its name: independent of what ran before."""
    return ((context.seed if seed is None else seed) * 1_000_003 + zlib.crc32(name.encode())) % 2**31


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a new folder, which then takes the place of `target`."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)


def forget_lines_after(context: RunContext, stage: str, step: int, *, evaluates_again: bool) -> None:
    """Drops from metrics.jsonl what a killed process logged for `stage` beyond its last checkpoint, that of `step`;
    with `evaluates_again` the validation of that step too."""
    path = context.folder / "metrics.jsonl"
    if not context.is_main or not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut off by the kill
        last = step - 1 if evaluates_again and record.get("kind") == "eval" else step
        if record.get("stage") != stage or record.get("step", 0) <= last:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
