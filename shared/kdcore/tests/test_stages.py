"""Stages: what is finished is skipped, teachers come from the cache, files are whole or absent."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from kdcore import stages as s
from kdcore.config import RunConfig
from kdcore.stages import CachedStage, Procedure, RunContext, run_stages, write_atomically


@dataclass
class OneProcess:
    """What a stage sees of accelerate in a single process."""

    is_main_process: bool = True
    num_processes: int = 1

    def wait_for_everyone(self) -> None:
        return


def context(folder, **options) -> RunContext:
    folder.mkdir(parents=True, exist_ok=True)
    accelerator: Any = OneProcess()
    return RunContext(RunConfig(method="toy"), folder, accelerator, **options)


@dataclass
class Counting:
    """Writes its count into a folder and a file."""

    name: str = "teacher"
    runs: int = field(default=0)

    def run(self, context: RunContext) -> s.Artefacts:
        self.runs += 1
        (context.folder / self.name).mkdir()
        (context.folder / self.name / "weights").write_text(f"run {self.runs}")
        (context.folder / f"{self.name}.json").write_text("{}")
        return {self.name: context.folder / self.name, "list": context.folder / f"{self.name}.json"}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---------------------------------------------------------------- run_stages


def test_finished_stage_is_not_run_again(tmp_path, capsys):
    stage = Counting()
    first = run_stages([stage], context(tmp_path / "run"))
    again = run_stages([stage], context(tmp_path / "run"))
    assert stage.runs == 1
    assert first == again == {"teacher": tmp_path / "run/teacher", "list": tmp_path / "run/teacher.json"}
    assert "teacher: finished before, skipped" in capsys.readouterr().out


def test_stages_are_recorded_by_relative_path(tmp_path):
    run_stages([Counting()], context(tmp_path / "run"))
    record = json.loads((tmp_path / "run/stages.json").read_text())
    assert record == {"teacher": {"teacher": "teacher", "list": "teacher.json"}}


def test_run_goes_on_at_the_stage_that_failed(tmp_path):
    teacher, seen = Counting(), []

    def fail(_: RunContext) -> s.Artefacts:
        raise RuntimeError("power cut")

    def use(run: RunContext) -> s.Artefacts:
        seen.append(run.artefacts["teacher"])
        return {}

    with pytest.raises(RuntimeError, match="power cut"):
        run_stages([teacher, Procedure("student", fail)], context(tmp_path / "run"))
    run_stages([teacher, Procedure("student", use)], context(tmp_path / "run"))
    assert teacher.runs == 1
    assert seen == [tmp_path / "run/teacher"]


def test_quiet_context_says_nothing_and_logs(tmp_path, capsys):
    run = context(tmp_path / "run", quiet=True)
    run.say("hello")
    run.log(kind="eval", step=1)
    assert capsys.readouterr().out == ""
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line).items() >= {"kind": "eval", "step": 1}.items()


# ---------------------------------------------------------------- CachedStage


def test_cached_stage_is_shared_between_runs(tmp_path, cache, capsys):
    stage = Counting()
    for name in ("a", "b"):
        artefacts = CachedStage(stage, {"width": 3}).run(context(tmp_path / name))
        assert artefacts["teacher"] == tmp_path / name / "teacher"
        assert (tmp_path / name / "teacher/weights").read_text() == "run 1"
        assert artefacts["list"].read_text() == "{}"
    assert stage.runs == 1
    assert "teacher: taken from the cache" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"width": 4}, {"width": 3, "seed": 1}])
def test_another_fingerprint_is_another_entry(tmp_path, cache, other):
    stage = Counting()
    CachedStage(stage, {"width": 3}).run(context(tmp_path / "a"))
    CachedStage(stage, other).run(context(tmp_path / "b"))
    assert stage.runs == 2


def test_digest_does_not_depend_on_order():
    assert s.digest({"a": 1, "b": 2}) == s.digest({"b": 2, "a": 1}) != s.digest({"a": 2, "b": 1})


def cut_record(entry):
    (entry / "artefacts.json").unlink()


def break_record(entry):
    (entry / "artefacts.json").write_text('{"files": {}')


def change_weights(entry):
    (entry / "teacher/weights").write_text("run 0")


def lose_weights(entry):
    (entry / "teacher/weights").unlink()


@pytest.mark.parametrize("damage", [cut_record, break_record, change_weights, lose_weights])
def test_damaged_entry_is_made_again(tmp_path, cache, damage, capsys):
    stage = Counting()
    CachedStage(stage, {}).run(context(tmp_path / "a"))
    (entry,) = (cache / "teacher").iterdir()
    damage(entry)
    artefacts = CachedStage(stage, {}).run(context(tmp_path / "b"))
    assert (artefacts["teacher"] / "weights").read_text() == "run 2"
    assert f"the cache entry {entry} is made again" in capsys.readouterr().out
    CachedStage(stage, {}).run(context(tmp_path / "c"))  # and then it is good
    assert (tmp_path / "c/teacher/weights").read_text() == "run 2"
    assert stage.runs == 2


def test_failing_stage_leaves_no_entry(tmp_path, cache):
    def fail(_: RunContext) -> s.Artefacts:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        CachedStage(Procedure("teacher", fail), {}).run(context(tmp_path / "a"))
    assert not cache.exists() or not list(cache.rglob("artefacts.json"))


def test_two_runs_that_publish_the_same_entry(tmp_path, cache):
    stage = Counting()
    inner = Counting()

    def slow(run: RunContext) -> s.Artefacts:
        CachedStage(inner, {}).run(context(tmp_path / "b"))  # another process is faster
        return stage.run(run)

    artefacts = CachedStage(Procedure("teacher", slow), {}).run(context(tmp_path / "a"))
    assert (artefacts["teacher"] / "weights").is_file()
    assert [path.name for path in (cache / "teacher").iterdir()] == [s.digest({})]  # no temporary folder stays


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "x"))
    assert s.cache_folder() == tmp_path / "x"
    monkeypatch.delenv("KD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert s.cache_folder() == tmp_path / "kd"


def test_main_process_decides_about_the_cache(monkeypatch):
    import accelerate.utils

    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", lambda values: [True])
    assert s._agreed(SimpleNamespace(accelerator=OneProcess(num_processes=2)), False) is True
    assert s._agreed(SimpleNamespace(accelerator=OneProcess()), False) is False


# ---------------------------------------------------------------- atomic writes


def test_write_atomically_replaces(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_cut_off_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def power_cut(_: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        write_atomically(path, "new content")
    assert path.read_text() == "old"
