"""The stage around DistillTrainer: resume after a kill, two processes, records, non-finite losses, averages."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcore.checkpoint import last_good
from kdcore.config import TrainConfig
from kdcore.errors import InputError, NonFiniteLoss

TOY = Path(__file__).with_name("toy_stage.py")
TIMES = ("time", "samples_per_second")
STUDENT = Path("student") / "model.safetensors"
TWO_PROCESSES = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("toy_stage", TOY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(*arguments: str, launcher: tuple[str, ...] = (sys.executable,), **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*launcher, str(TOY), *arguments], env=environment, text=True, **options)


def finish(*arguments: str, **options) -> str:
    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def records(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one / STUDENT), load_file(other / STUDENT)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.slow
def test_resume_after_kill_is_bit_identical(tmp_path):
    finish(str(tmp_path / "whole"))
    step = random.SystemRandom().randrange(4, 23)
    process = start(str(tmp_path / "cut"), "--say", stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1]) >= step:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "cut" / STUDENT).exists()
    finish(str(tmp_path / "cut"), "--resume")
    same_weights(tmp_path / "whole", tmp_path / "cut")
    for kind in ("train", "eval"):
        kept = [
            [
                {k: v for k, v in line.items() if k not in ("time", "samples_per_second")}
                for line in records(folder, kind)
            ]
            for folder in (tmp_path / "whole", tmp_path / "cut")
        ]
        assert kept[0] == kept[1], f"killed at step {step}"


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path):
    options = ("--dropout", "0")  # dropout masks are drawn per process
    finish(str(tmp_path / "one"), *options)
    finish(str(tmp_path / "two"), *options, launcher=TWO_PROCESSES)
    assert [(tmp_path / name / "processes").read_text() for name in ("one", "two")] == ["1", "2"]
    one, two = load_file(tmp_path / "one" / STUDENT), load_file(tmp_path / "two" / STUDENT)
    for name in one:
        # The same sums in another order: float32 rounding over 24 AdamW steps.
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-5)
    for a, b in zip(records(tmp_path / "one", "train"), records(tmp_path / "two", "train"), strict=True):
        for name, term in a["terms"].items():
            assert b["terms"][name]["raw"] == pytest.approx(term["raw"], rel=1e-4)


def test_records_artefact_and_silence(tmp_path, toy, capfd):
    config = TrainConfig(steps=6, batch_size=8, log_every=2, checkpoint_every=100, optimizer={"lr": 0.01})
    artefacts = toy.run(tmp_path, config=config)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    train, validation = records(tmp_path, "train"), records(tmp_path, "eval")
    assert [line["step"] for line in train] == [2, 4, 5, 6]  # a validation flushes at the end of an epoch
    assert [line["step"] for line in validation] == [5, 6]
    line = train[0]
    assert set(line["terms"]) == {"soft", "hard", "feature"}
    assert line["total"] == pytest.approx(sum(term["weighted"] for term in line["terms"].values()))
    assert line["terms"]["hard"]["weighted"] == pytest.approx(0.5 * line["terms"]["hard"]["raw"])
    assert line["player"] == "student"
    assert line["stage"] == "student"
    assert line["epoch"] == 0
    assert line["lr"] == pytest.approx(0.01)
    assert line["samples_per_second"] > 0
    names = set(load_file(artefacts["student"] / "model.safetensors"))
    assert names
    assert not any("projection" in name for name in names)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(artefacts["student"]).config.model_type == "gpt2"


def test_progress_is_shown_unless_quiet(tmp_path, toy, capfd):
    config = TrainConfig(steps=2, batch_size=8, log_every=1, optimizer={"lr": 0.01})
    toy.run(tmp_path, config=config, quiet=False)
    assert "student" in capfd.readouterr().out


def test_non_finite_loss_names_step_and_term_and_keeps_the_checkpoint(tmp_path, toy):
    config = TrainConfig(steps=12, batch_size=4, log_every=4, checkpoint_every=3, optimizer={"lr": 0.01})
    with pytest.raises(NonFiniteLoss) as caught:
        toy.run(tmp_path, config=config, poison=7)
    assert (caught.value.step, caught.value.term, caught.value.player) == (7, "feature", "student")
    assert caught.value.checkpoint == tmp_path / "checkpoints" / "student" / "checkpoint-6"
    assert caught.value.checkpoint.is_dir()
    assert last_good(tmp_path) == caught.value.checkpoint  # what the command line names after any failure
    assert not (tmp_path / "student").exists()


def test_a_broken_checkpoint_is_refused_by_name(tmp_path, toy):
    config = TrainConfig(steps=8, batch_size=4, checkpoint_every=3, optimizer={"lr": 0.01})
    with pytest.raises(NonFiniteLoss):
        toy.run(tmp_path, config=config, poison=7)
    file = tmp_path / "checkpoints" / "student" / "checkpoint-6" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"optimizer.pt is corrupt.*checkpoint-3 is good: remove checkpoint-6"):
        toy.run(tmp_path, config=config, resume=True)


def test_the_runs_accelerator_survives_a_stage_of_another_precision(tmp_path):
    from kd_llm.integrations.stage import _own_accelerator
    from kdcore.accelerator import make_accelerator

    train = TrainConfig(steps=1)
    mine = make_accelerator(train, cpu=True)
    with _own_accelerator():
        from accelerate import Accelerator

        inner = Accelerator(mixed_precision="bf16", cpu=True)
        assert inner.mixed_precision == "bf16"
        mine.wait_for_everyone()
    assert mine.mixed_precision == "no"
    assert mine.is_main_process


def test_early_stopping_and_best_weights(tmp_path, toy):
    config = TrainConfig(
        steps=60,
        batch_size=36,
        checkpoint_every=100,
        log_every=100,
        optimizer={"lr": 5.0},  # worse with every epoch
        monitor="loss",
        mode="min",
        patience=2,
        restore_best=True,
    )
    artefacts = toy.run(tmp_path, config=config)
    validation = records(tmp_path, "eval")
    best = min(range(len(validation)), key=lambda i: validation[i]["metrics"]["loss"])
    assert len(validation) == best + 3  # two bad ones after the best
    from transformers import AutoModelForCausalLM

    from kd_llm.testing import collate, examples

    batch = collate(examples(4, seed=9))
    batch.pop("example")
    model = AutoModelForCausalLM.from_pretrained(artefacts["student"]).eval()
    assert model(**batch).loss.item() == pytest.approx(validation[best]["metrics"]["loss"], rel=1e-5)


def test_unknown_monitor_and_empty_data(tmp_path, toy):
    config = TrainConfig(steps=2, batch_size=36, monitor="accuracy", mode="max")
    with pytest.raises(InputError, match="'accuracy': validation gives loss"):
        toy.run(tmp_path / "a", config=config)
    with pytest.raises(InputError, match="has no validation"):
        toy.run(tmp_path / "b", config=config, evaluate=False)


def test_two_stages_in_a_run_and_its_resume(tmp_path, toy):
    """kdcore.run holds an accelerator of its own; a teacher in bf16 and a student in fp32 are trained under it."""
    from transformers import AutoModelForCausalLM

    from kd_llm.engine.objective import TokenObjective
    from kd_llm.engine.teachers import LocalTeacher
    from kd_llm.integrations.stage import LMSetup, TransformersStage
    from kd_llm.testing import collate, examples, tiny_model
    from kdcore import run
    from kdcore.config import RunConfig
    from kdcore.method import Method

    budget = {"steps": 4, "batch_size": 8, "checkpoint_every": 2, "log_every": 1}
    config = RunConfig(method="toy", train={**budget, "optimizer": {"name": "adamw", "lr": 0.01}})
    fail = []

    def teacher(_):
        return LMSetup(tiny_model("llama", width=24, seed=2), None, TokenObjective(None), examples(16), collate)

    def student(context):
        assert context.accelerator.mixed_precision == "no"
        model = AutoModelForCausalLM.from_pretrained(context.artefacts["teacher"])
        if fail:
            raise KeyboardInterrupt
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
        return LMSetup(adapted, None, TokenObjective(LocalTeacher(model)), examples(16), collate)

    def stages(config, context):
        half = TrainConfig(**budget, precision="bf16", optimizer={"name": "adamw", "lr": 0.01})
        first = TransformersStage("teacher", half, teacher, artefact="teacher")
        return [first, TransformersStage("student", config.train, student)]

    def evaluate(config, artefacts):
        return {"peft": float((artefacts["student"] / "adapter_model.safetensors").exists())}

    method = Method("toy", "Toy (none, 2026).", RunConfig, stages, evaluate)
    fail.append(True)
    with pytest.raises(KeyboardInterrupt):
        run.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    fail.clear()
    assert run.train(method, config, tmp_path / "run", quiet=True, cpu=True, resume=True) == {"peft": 0.0}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    steps = [(line["stage"], line["step"]) for line in records(tmp_path / "run", "train")]
    assert steps == [(stage, step) for stage in ("teacher", "student") for step in (1, 2, 3, 4)]


@pytest.mark.parametrize(("data", "workers"), [("list", 0), ("hugging face", 1), ("stream", 0)])
def test_kinds_of_data_and_their_resume(tmp_path, toy, data, workers):
    config = TrainConfig(
        steps=7,
        batch_size=4,
        accumulation=2,
        num_workers=workers,
        checkpoint_every=3,
        log_every=100,
        optimizer={"name": "adamw", "lr": 0.01},
    )
    toy.run(tmp_path / "whole", config=config, data=data)
    with pytest.raises(NonFiniteLoss):
        toy.run(tmp_path / "cut", config=config, data=data, poison=4)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints" / "student").iterdir()] == ["checkpoint-3"]
    toy.run(tmp_path / "cut", config=config, data=data, resume=True)
    same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_stream_needs_a_budget_in_steps(tmp_path, toy):
    with pytest.raises(InputError, match=r"train\.epochs: the data set has no length"):
        toy.run(tmp_path, config=TrainConfig(epochs=1, batch_size=4), data="stream")


def test_adapters_that_cannot_be_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    from kd_llm.integrations.stage import _check_merge
    from kd_llm.testing import tiny_model

    def adapted(tied, *modules):
        config = LoraConfig(r=2, target_modules=list(modules))
        return get_peft_model(tiny_model("llama", tie_word_embeddings=tied), config)

    with pytest.raises(InputError, match="tied to the embedding cannot be merged"):
        _check_merge(adapted(True, "q_proj", "lm_head"))
    for model in (adapted(True, "q_proj"), adapted(False, "lm_head"), tiny_model("llama")):
        _check_merge(model)
