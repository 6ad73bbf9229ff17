"""Runs: what is in the folder, which folders are refused, resume, moved runs."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from kdcore import run
from kdcore.config import parse
from kdcore.errors import InputError, NonFiniteLoss
from kdcore.method import load_config
from kdcore.run import check_folder, evaluate, load_run, plain, scalars, to_json

FILES = {"config.yaml", "environment.json", "stages.json", "metrics.jsonl", "metrics.json", "teacher", "student"}


def train(folder, *overrides, **options):
    method, config = load_config("toy/small", overrides)
    return run.train(method, config, folder, quiet=True, cpu=True, **options)


def weights(folder):
    return load_file(folder / "student/model.safetensors")


def log(folder):
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "samples_per_second")} for line in lines]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def cut(toy, monkeypatch):
    """`cut(step)`: the next training is killed before that step, without a trace in the config."""
    from kd_toy.methods.toy import ToyKD

    whole = ToyKD.loss

    def at(step: int) -> None:
        def loss(self, batch, player="student"):
            if self.progress.step == step:
                monkeypatch.setattr(ToyKD, "loss", whole)
                raise KeyboardInterrupt
            return whole(self, batch, player)

        monkeypatch.setattr(ToyKD, "loss", loss)

    return at


# ---------------------------------------------------------------- a whole run


def test_run_directory(toy):
    metrics = train(toy / "run", "seed=2")
    folder = toy / "run"
    assert {path.name for path in folder.iterdir()} == FILES | {"checkpoints"}
    method, config = load_config("toy/small", ["seed=2"])
    assert parse(method.config, yaml.safe_load((folder / "config.yaml").read_text())) == config
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics.keys() == {"student/accuracy", "teacher/accuracy", "agreement", "confusion_matrix"}
    assert sum(map(sum, metrics["confusion_matrix"])) == 48
    assert json.loads((folder / "stages.json").read_text()) == {
        "teacher": {"teacher": "teacher"},
        "student": {"student": "student"},
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]


def test_environment(toy):
    train(toy / "run")
    found = json.loads((toy / "run/environment.json").read_text())
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert (found["device"], found["processes"], found["commit"]) == ("cpu", 1, None)
    assert found["packages"]["kd-toy"] == "0.1"
    assert {"kdcore", "torch", "accelerate", "safetensors"} <= found["packages"].keys()


def test_run_is_a_function_of_config_and_seed(toy):
    torch.manual_seed(5)
    first = train(toy / "a")
    torch.manual_seed(6)
    assert train(toy / "b") == first
    assert same(weights(toy / "a"), weights(toy / "b"))
    train(toy / "c", "seed=1")
    assert not same(weights(toy / "a"), weights(toy / "c"))


def test_accelerate_is_left_as_it_was_found(toy):
    train(toy / "a")
    assert not PartialState._shared_state
    train(toy / "b", "train.precision=bf16")  # accelerate refuses another precision in a process that has one
    try:
        mine = Accelerator(cpu=True)
        train(toy / "c")
        assert mine.num_processes == 1
        mine.wait_for_everyone()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [0, 3, 4, 7, 11])
def test_cut_run_goes_on_to_the_same_weights(toy, cut, step):
    whole = train(toy / "whole")
    cut(step)
    with pytest.raises(KeyboardInterrupt):
        train(toy / "cut")
    assert train(toy / "cut", resume=True) == whole
    assert same(weights(toy / "whole"), weights(toy / "cut"))
    assert log(toy / "whole") == log(toy / "cut")  # nothing logged twice, nothing lost


def test_resumed_run_says_what_has_changed_around_it(toy, cut, monkeypatch):
    cut(5)
    with pytest.raises(KeyboardInterrupt):
        train(toy / "run")
    monkeypatch.setattr("platform.python_version", lambda: "9.9.9")
    train(toy / "run", resume=True)
    found = run.read_environment(toy / "run")
    (resumed,) = found["resumed"]
    assert found["python"] != "9.9.9"
    assert resumed.keys() == {"time", "python"}
    assert resumed["python"] == "9.9.9"


def test_resume_of_a_finished_run_trains_nothing(toy, cut):
    first = train(toy / "run")
    cut(0)
    assert train(toy / "run", resume=True) == first


def test_resume_without_a_run_starts_one(toy):
    assert train(toy / "run", resume=True)["student/accuracy"] >= 0
    assert (toy / "run/metrics.json").is_file()


def test_resume_with_another_config_names_the_field(toy):
    train(toy / "run")
    with pytest.raises(InputError, match=r"'train\.optimizer\.lr' was 0\.02 and is 0\.1 now"):
        train(toy / "run", "train.optimizer.lr=0.1", resume=True)
    with pytest.raises(InputError, match="'seed' was 0 and is 1 now"):
        train(toy / "run", "seed=1", resume=True)
    (toy / "plain.yaml").write_text("method: plain\ntrain: {steps: 3}\n")
    other, plain_config = load_config("plain.yaml")
    with pytest.raises(InputError, match="'method' was 'toy' and is 'plain' now"):
        run.train(other, plain_config, toy / "run", resume=True, cpu=True)


def test_arms_of_comparisons_do_not_matter_for_resume(toy):
    train(toy / "run")
    method, config = load_config("toy/small", ["compare={}"])
    check_folder(method, config, toy / "run", resume=True)


# ---------------------------------------------------------------- folders that are refused


def test_folder_with_another_run(toy, cut):
    cut(5)
    with pytest.raises(KeyboardInterrupt):
        train(toy / "run")
    with pytest.raises(InputError, match="holds an unfinished run; give --resume"):
        train(toy / "run")
    train(toy / "run", resume=True)
    with pytest.raises(InputError, match="holds a finished run; give --resume"):
        train(toy / "run")


@pytest.mark.parametrize("resume", [False, True])
def test_folder_with_foreign_files(toy, resume):
    (toy / "run").mkdir()
    (toy / "run/thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds other files and no run"):
        train(toy / "run", resume=resume)
    assert [path.name for path in (toy / "run").iterdir()] == ["thesis.tex"]


def test_output_that_is_a_file(toy):
    (toy / "run").write_text("")
    with pytest.raises(InputError, match="is a file"):
        train(toy / "run")


def test_bad_input_leaves_no_folder(toy):
    with pytest.raises(InputError, match=r"student\.width = 20"):
        train(toy / "new/deep/run", "student.width=20")
    assert not (toy / "new").exists()


def test_bad_input_that_a_stage_finds_leaves_no_folder(toy, monkeypatch):
    def bad(module, folder):
        raise InputError("teacher: no good")

    method, config = load_config("toy/small")
    monkeypatch.setattr("kd_toy.runs.save", bad)
    with pytest.raises(InputError, match="no good"):
        run.train(method, config, toy / "new/run", quiet=True, cpu=True)
    assert not (toy / "new").exists()


def test_bad_input_leaves_an_empty_folder_empty(toy):
    (toy / "run").mkdir()
    with pytest.raises(InputError):
        train(toy / "run", "student.width=20")
    assert list((toy / "run").iterdir()) == []


def test_bad_input_on_resume_removes_nothing(toy, cut, monkeypatch):
    cut(5)
    with pytest.raises(KeyboardInterrupt):
        train(toy / "run")
    before = sorted(path.name for path in (toy / "run").rglob("*"))
    monkeypatch.setattr("kd_toy.runs.load", lambda *_: (_ for _ in ()).throw(InputError("no good")))
    with pytest.raises(InputError, match="no good"):
        train(toy / "run", resume=True)
    assert sorted(path.name for path in (toy / "run").rglob("*")) == before


def test_failed_run_keeps_its_last_good_checkpoint(toy):
    with pytest.raises(NonFiniteLoss, match="step 7: loss term 'kd' of player 'student' is nan") as error:
        train(toy / "run", "method_args.nan_at=7")
    assert error.value.checkpoint == toy / "run/checkpoints/student/step-00000004"
    assert error.value.checkpoint.is_dir()
    assert not (toy / "run/metrics.json").exists()


# ---------------------------------------------------------------- reading a run back


def test_moved_run_is_read_and_evaluated(toy):
    metrics = train(toy / "run")
    shutil.move(toy / "run", toy / "elsewhere")
    method, config, artefacts = load_run(toy / "elsewhere")
    assert (method.key, config.train.steps) == ("toy", 12)
    assert artefacts == {"teacher": toy / "elsewhere/teacher", "student": toy / "elsewhere/student"}
    assert evaluate(toy / "elsewhere") == metrics


def test_what_cannot_be_read_back(toy, cut):
    with pytest.raises(InputError, match="no such folder"):
        load_run(toy / "absent")
    with pytest.raises(InputError, match="not a run directory"):
        load_run(toy)
    cut(5)
    with pytest.raises(KeyboardInterrupt):
        train(toy / "run")
    with pytest.raises(InputError, match=r"not finished \(finished stages: teacher\); go on with `kd train .*--resume"):
        load_run(toy / "run")
    train(toy / "run", resume=True)
    shutil.rmtree(toy / "run/student")
    with pytest.raises(InputError, match=r"its artefact 'student' is missing \(student\)"):
        load_run(toy / "run")


def test_run_with_a_broken_record(toy):
    train(toy / "run")
    (toy / "run/stages.json").write_text("{")
    with pytest.raises(InputError, match=r"stages\.json: not readable as JSON"):
        load_run(toy / "run")


def test_run_of_a_method_that_is_not_installed(toy):
    train(toy / "run")
    text = (toy / "run/config.yaml").read_text().replace("method: toy", "method: gone")
    (toy / "run/config.yaml").write_text(text)
    with pytest.raises(InputError, match="method 'gone' is not installed"):
        load_run(toy / "run")


# ---------------------------------------------------------------- numbers


def test_metrics_become_plain_values_and_strict_json():
    values = {"a": torch.tensor(0.5), "b": torch.tensor([[1, 2]]), "c": (1, float("inf")), 3: math.nan, "n": "x"}
    assert plain({k: values[k] for k in "abn"}) == {"a": 0.5, "b": [[1, 2]], "n": "x"}
    assert json.loads(to_json(values)) == {"a": 0.5, "b": [[1, 2]], "c": [1, None], "3": None, "n": "x"}


def test_scalars():
    found = scalars({"a": 1, "b": 0.5, "nan": None, "flag": True, "names": ["x"], "text": "x"})
    assert found.keys() == {"a", "b", "nan"}
    assert (found["a"], found["b"]) == (1.0, 0.5)
    assert math.isnan(found["nan"])
