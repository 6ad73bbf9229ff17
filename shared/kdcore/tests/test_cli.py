"""The `kd` command: what it prints, where it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdcore.cli import main

TOY_PACKAGE = Path(__file__).with_name("toy_package")


@pytest.fixture
def kd(toy, capsys):
    """`kd("train", ...)` -> exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(TOY_PACKAGE), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=240, check=False
    )


# ---------------------------------------------------------------- list, show, help


def test_list_by_domain(kd):
    code, out, err = kd("list", "--domain", "toy")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["toy"]
    assert ["toy", "Toy", "Distillation", "arXiv", "0000.00000,", "2000", "small"] in rows
    assert ["plain", "Plain", "Training", "Journal", "of", "Nothing,", "1999"] in rows
    assert not any(row and row[0] == "ghost" for row in rows)
    assert "note: method 'ghost': its module kd_toy.methods.ghost is missing" in err


def test_list_of_an_unknown_domain(kd):
    code, out, err = kd("list", "--domain", "cooking")
    assert (code, out) == (2, "")
    assert "error: domain 'cooking': no installed method; allowed: " in err
    assert "toy" in err
    assert "did you mean 'toy'?" in kd("list", "--domain", "toi")[2]


@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["train", "--help"], ["train", "toy/absent"]])
def test_torch_is_not_imported(arguments):
    heavy = "('torch', 'numpy', 'kd_toy', 'accelerate')"
    code = (
        f"import sys; from kdcore.cli import main; main({arguments!r}); print([n for n in {heavy} if n in sys.modules])"
    )
    assert start("-c", code).stdout.splitlines()[-1] == "[]"


def test_help_without_arguments(kd):
    code, out, _ = kd()
    assert code == 0
    for command in ("list", "show", "train", "compare", "eval", "report", "cache"):
        assert f"\n  {command} " in out


def test_show(kd):
    code, out, _ = kd("show", "toy")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == ["toy  (kd_toy)", "Toy Distillation (arXiv 0000.00000, 2000)."]
    assert "L = (1 - alpha) CE(z_s, y) + alpha KL(softmax(z_t) || softmax(z_s))" in lines
    assert "teacher: A network with one hidden layer." in lines
    assert "class ToyKD(teacher, student, config=None): A student beside its frozen teacher." in lines
    table = [line.split(maxsplit=2) for line in lines if line.strip()]
    assert ["alpha", "0.5", "number, >= 0, <= 1"] in [
        [*row[:2], row[2].split("  ")[0]] for row in table if len(row) > 2
    ]
    names = [row[0] for row in table]
    assert names.index("method_args") < names.index("method") < names.index("train") < names.index("train.optimizer")
    assert next(line.split()[:3] for line in lines if line.startswith(" student ")) == ["student", "section,", "fields"]
    assert lines[-1] == "configs: toy/small"


def test_show_of_an_unknown_method(kd):
    code, _, err = kd("show", "toi")
    assert (code, err) == (2, "error: method 'toi' is not installed; did you mean 'toy'?\n")


# ---------------------------------------------------------------- train, eval, report, cache


def test_train_eval_report(kd, toy):
    code, out, err = kd("train", "toy/small", "--cpu", "--quiet", "method_args.alpha=0.5")
    assert (code, err) == (0, "")
    folder = Path("runs/toy-small-seed0")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"{metrics['student/accuracy']:.4f}" in out
    assert f"{metrics['teacher/accuracy']:.4f}" in out
    assert f"run     {folder}" in out
    assert "<!DOCTYPE html>" in (folder / "report.html").read_text()
    assert "alpha: 0.5" in (folder / "config.yaml").read_text()

    folder.rename("moved")
    code, out, _ = kd("eval", "moved", "--json")
    assert (code, json.loads(out)) == (0, metrics)
    code, out, _ = kd("eval", "moved")
    assert f"{metrics['agreement']:.4f}" in out

    assert kd("train", "toy/small", "--cpu", "-q", "--seed", "3", "--output", "other")[0] == 0
    assert "seed: 3" in Path("other/config.yaml").read_text()
    code, out, _ = kd("report", "moved", "other", "--output", "both.html")
    assert (code, out) == (0, "both.html\n")
    assert "Comparison of moved, other" in Path("both.html").read_text()


def test_train_from_a_file(kd, toy):
    (toy / "mine.yaml").write_text("method: plain\ntrain: {steps: 2}\n")
    code, out, _ = kd("train", "mine.yaml", "--cpu", "--seed", "1")
    assert code == 0
    assert "runs/plain-mine-seed1" in out
    assert "student" in out


def test_resume_with_the_resolved_config(kd):
    assert kd("train", "toy/small", "--cpu", "-q", "--output", "run")[0] == 0
    assert kd("train", "run/config.yaml", "--cpu", "-q", "--output", "run", "--resume")[0] == 0


def test_cache(kd, toy):
    code, out, _ = kd("cache", "toy/small", "logits", "size=20")
    assert (code, out) == (0, "samples: 20\n")
    assert (toy / "logits/logits.pt").is_file()
    assert "output logits: exists and is not empty" in kd("cache", "toy/small", "logits")[2]
    (toy / "plain.yaml").write_text("method: plain\n")
    assert kd("cache", "plain.yaml", "x")[2] == "error: method 'plain' has no teacher outputs to cache\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "toy/smal"], "method 'toy' has no config 'smal'; did you mean 'small'?"),
        (["train", "toi/small"], "did you mean 'toy'?"),
        (["train", "toy/small", "train.stepz=3"], "unknown key 'train.stepz'; did you mean 'steps'?"),
        (["train", "toy/small", "method_args.alpha=7"], "'method_args.alpha' = 7: should be less than or equal to 1"),
        (["train", "toy/small", "alpha"], "override 'alpha': expected key=value"),
        (["train", "toy/small", "seed=1", "--seed", "2"], "seed: given both as --seed and as an override"),
        (["train", "toy/small", "--seed", "-1"], "'seed' = -1"),
        (["train", "toy/small", "--seed", "x"], "Invalid value for '--seed'"),
        (["train", "toy/small", "--sed", "1"], "No such option: --sed"),
        (["train", "toy/small", "--cpu", "train.precision=fp16"], "train.precision = 'fp16': needs an accelerator"),
        (["train"], "Missing argument 'CONFIG'"),
        (["trian"], "No such command 'trian'"),
        (["compare", "toy/small", "--seeds", "0"], "--seeds = 0: expected 1 or more"),
        (["compare", "toy/small", "compare={x: {method_args.alpha: 2}}"], "arm 'x': 'method_args.alpha' = 2"),
        (["eval", "absent"], "run 'absent': no such folder"),
        (["report", "absent"], "run 'absent': no such folder"),
        (["cache", "toy/absent", "x"], "has no config 'absent'"),
    ],
)
def test_bad_input_is_exit_2_and_one_message(kd, toy, arguments, message):
    code, out, err = kd(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(toy.iterdir()) == []


def test_output_that_is_taken(kd, toy):
    assert kd("train", "toy/small", "--cpu", "-q", "--output", "run")[0] == 0
    code, _, err = kd("train", "toy/small", "--cpu", "-q", "--output", "run")
    assert code == 2
    assert "output run: holds a finished run; give --resume" in err
    code, _, err = kd("train", "toy/small", "--cpu", "-q", "--output", "run", "--resume", "train.steps=13")
    assert code == 2
    assert "'train.steps' was 12 and is 13 now" in err


# ---------------------------------------------------------------- failures


def test_non_finite_loss(kd):
    code, _, err = kd("train", "toy/small", "--cpu", "-q", "--output", "run", "method_args.nan_at=7")
    assert code == 1
    assert err.splitlines() == [
        "error: step 7: loss term 'kd' of player 'student' is nan",
        "last good checkpoint: run/checkpoints/student/step-00000004",
    ]
    assert Path("run/checkpoints/student/step-00000004").is_dir()


def test_failure_before_the_first_checkpoint(kd):
    code, _, err = kd("train", "toy/small", "--cpu", "-q", "--output", "run", "method_args.nan_at=1")
    assert code == 1
    assert err.splitlines()[1:] == ["no checkpoint yet in run"]


def test_unforeseen_failure(kd, monkeypatch):
    arguments = ("train", "toy/small", "--cpu", "-q", "method_args.crash_at=5", "--output")
    code, _, err = kd(*arguments, "run")
    assert code == 1
    assert err.splitlines() == [
        "error: RuntimeError: the cable is unplugged",
        "last good checkpoint: run/checkpoints/student/step-00000004",
        "KD_DEBUG=1 shows where",
    ]
    monkeypatch.setenv("KD_DEBUG", "1")
    code, _, err = kd(*arguments, "again")
    assert code == 1
    assert "Traceback" in err
    assert 'RuntimeError("the cable is' in err


def test_interrupt_and_resume(kd, toy, monkeypatch):
    arguments = ("train", "toy/small", "--cpu", "-q", "--output", "run", "method_args.interrupt_at=6")
    code, _, err = kd(*arguments)
    assert code == 1
    assert err.splitlines() == [
        "error: interrupted",
        "last good checkpoint: run/checkpoints/student/step-00000004",
        "give --resume to go on with it",
    ]
    from kd_toy.methods.toy import ToyKD

    loss = ToyKD.loss
    monkeypatch.setattr(ToyKD, "loss", lambda self, *batch: loss(_without_interrupt(self), *batch))
    assert kd(*arguments, "--resume")[0] == 0
    assert Path("run/metrics.json").is_file()


def _without_interrupt(distiller):
    distiller.config = distiller.config.model_copy(update={"interrupt_at": None})
    return distiller


def test_failure_in_a_comparison_names_the_run(kd):
    arms = "compare={broken: {method_args.nan_at: 6}}"
    code, _, err = kd("compare", "toy/small", "--cpu", "-q", "--output", "out", arms)
    assert code == 1
    assert "last good checkpoint: out/broken/seed-0/checkpoints/student/step-00000004" in err
    assert Path("out/toy/seed-0/metrics.json").is_file()


def test_interrupted_comparison(kd):
    arms = "compare={cut: {method_args.interrupt_at: 6}}"
    code, _, err = kd("compare", "toy/small", "--cpu", "-q", "--output", "out", arms)
    assert code == 1
    assert err.splitlines() == [
        "error: interrupted",
        "last good checkpoint: out/cut/seed-0/checkpoints/student/step-00000004",
        "the same command goes on with it",
    ]


# ---------------------------------------------------------------- compare


def test_compare(kd):
    arguments = ("compare", "toy/small", "--cpu", "--seeds", "2")
    code, out, err = kd(*arguments)
    assert (code, err) == (0, "")
    folder = Path("runs/toy-small-compare")
    result = json.loads((folder / "comparison.json").read_text())
    mean, std = (result["arms"]["ce"][part]["student/accuracy"] for part in ("mean", "std"))
    assert f"{mean:.4f} ± {std:.4f}" in out
    paired = result["differences"]["smooth"]["student/accuracy"]
    assert f"{paired['mean']:+.4f} ± {paired['standard_error']:.4f}" in out
    assert "run 6 of 6: smooth, seed 1" in out
    (teacher,) = [line for line in out.splitlines() if "teacher/accuracy" in line]
    assert "all arms" in teacher
    code, out, _ = kd(*arguments, "--quiet")
    assert code == 0
    assert "run 1 of" not in out
    assert "student/accuracy" in out


def test_verdicts_look_at_what_is_better():
    from kdcore.cli.running import _against

    clear = {"mean": 0.25, "standard_error": 0.03125, "n": 3, "within_noise": False}
    assert _against("student/accuracy", clear) == ("+0.2500 ± 0.0312", "better")
    assert _against("student/nll", clear) == ("+0.2500 ± 0.0312", "worse")
    assert _against("feature_norm", clear) == ("+0.2500 ± 0.0312", "differs")
    assert _against("student/parameters", clear) == ("+0.2500 ± 0.0312", "differs")
    assert _against("x", {**clear, "within_noise": True})[1] == "within noise"
    assert _against("x", {"mean": 1.0, "standard_error": None, "n": 1, "within_noise": True}) == ("+1.0000", "one seed")
    assert _against("x", {"mean": 0.0, "standard_error": 0.0, "n": 2, "within_noise": True})[1] == "same"


# ---------------------------------------------------------------- processes


def test_module_entry_point_gives_the_exit_code(toy):
    done = start("-m", "kdcore", "show", "toi")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: method 'toi' is not installed; did you mean 'toy'?\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "compare"])
def test_two_processes_write_and_print_once(toy, command):
    """Under accelerate's launcher: one run directory, one table, and the metrics of one process."""
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--module", "kdcore")
    arguments = (command, "toy/small", "--cpu", "--quiet", "--output")
    two = start(*launch, *options, *arguments, "two", CUDA_VISIBLE_DEVICES="")
    assert two.returncode == 0, two.stderr
    one = start("-m", "kdcore", *arguments, "one", CUDA_VISIBLE_DEVICES="")
    assert one.returncode == 0, one.stderr
    assert two.stdout.count("agreement") == one.stdout.count("agreement")
    runs = [path.parent.relative_to("two") for path in Path("two").rglob("metrics.json")]
    assert len(runs) == (1 if command == "train" else 9)
    for name in runs:
        assert json.loads(("two" / name / "environment.json").read_text())["processes"] == 2
        found, expected = (json.loads((Path(w) / name / "metrics.json").read_text()) for w in ("two", "one"))
        # The same sums in another order; of 48 points one may fall on the other side.
        assert found["student/accuracy"] == pytest.approx(expected["student/accuracy"], abs=1.5 / 48)
        assert found["teacher/accuracy"] == expected["teacher/accuracy"]


@pytest.mark.slow
def test_bad_input_on_two_processes(toy):
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--module", "kdcore")
    done = start(*launch, *options, "train", "toy/small", "--cpu", "-q", "student.width=20", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert done.stderr.count("error: student.width = 20") == 1
    assert not Path("runs").exists()
