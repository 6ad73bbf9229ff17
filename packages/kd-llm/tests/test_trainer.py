"""DistillTrainer against the losses written out on whole logits; accumulation, processes, auxiliaries, checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainingArguments

from kd_llm.engine.objective import DivergenceArgs, Objective, TokenObjective
from kd_llm.engine.rows import model_inputs, predicted, shifts_labels
from kd_llm.engine.teachers import LocalTeacher
from kd_llm.engine.token_loss import Divergence, on_logits
from kd_llm.integrations.trainer import DistillTrainer
from kd_llm.testing import collate, examples, gradients, packed, tiny_model
from kdcore.distiller import LossTerms
from kdcore.errors import InputError, NonFiniteLoss

KINDS = ("forward", "reverse", "js", "skew", "skew_reverse", "total_variation")


def arguments(folder, **fields):
    values = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "log_level": "error", "save_strategy": "no"}
    return TrainingArguments(str(folder), **{**values, **fields})


def make(tmp_path, student, teacher=None, data=None, objective=None, distill=None, kwargs=None, **fields):
    return DistillTrainer(
        student,
        arguments(tmp_path, **fields),
        teacher=teacher,
        distill=distill,
        objective=objective,
        train_dataset=data or examples(16),
        data_collator=collate,
        **(kwargs or {}),
    )


def naive(student, teacher, batch, args: DivergenceArgs):
    """The objective on whole logits in float64."""
    shift = shifts_labels(student)
    mask = predicted(batch, shift)
    z = student(**model_inputs(student, batch)).logits[mask].double()
    with torch.no_grad():
        t = teacher(**model_inputs(teacher, batch)).logits[mask].double()
    labels = (batch["labels"][:, 1:] if shift else batch["labels"])[mask[:, :-1] if shift else mask]
    weights = torch.ones(len(z), dtype=torch.float64) / len(z)
    if "kd_weight" in batch:
        weights = weights * batch["kd_weight"].double()[mask.nonzero()[:, 0]]
    soft = on_logits(z, t, Divergence(args.divergence, args.temperature, args.beta, args.alpha))
    hard = F.cross_entropy(z, labels, reduction="none")
    return args.soft_weight * (soft * weights).sum() + args.hard_weight * (hard * weights).sum()


def compare(trainer, teacher, batch, args, tolerance=2e-4):
    student = trainer.model
    student.zero_grad()
    naive(student, teacher, batch, args).backward()
    expected = gradients(student)
    student.zero_grad()
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    found = gradients(student)
    assert expected.keys() == found.keys()
    scale = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name)
    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_divergence(tmp_path, kind):
    args = DivergenceArgs(divergence=kind, temperature=1.7, beta=0.3, alpha=0.2, hard_weight=0.5)
    teacher = tiny_model("llama", width=24, seed=2).eval()
    trainer = make(tmp_path, tiny_model("llama").eval(), teacher, distill=args)
    compare(trainer, teacher, collate(examples(5)), args)


@pytest.mark.parametrize("kind", ["gemma2", "granite", "gpt2", "gptj", "t5", "bart", "bert"])
def test_gradients_of_every_architecture(tmp_path, kind):
    args = DivergenceArgs(divergence="js", hard_weight=0.5)
    teacher = tiny_model(kind, width=24, seed=2).eval()
    trainer = make(tmp_path, tiny_model(kind).eval(), teacher, distill=args)
    compare(trainer, teacher, collate(examples(5)), args)


@pytest.mark.parametrize("fields", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"]}])
def test_gradients_with_adapters(tmp_path, fields):
    from peft import LoraConfig, get_peft_model

    args = DivergenceArgs(hard_weight=0.3)
    student = get_peft_model(tiny_model("llama"), LoraConfig(r=3, init_lora_weights=False, **fields)).eval()
    teacher = tiny_model("llama", width=24, seed=2).eval()
    trainer = make(tmp_path, student, teacher, distill=args)
    compare(trainer, teacher, collate(examples(5)), args)
    assert all("lora_" in name for name in gradients(student))


def test_gradients_with_packing_and_weights(tmp_path):
    args = DivergenceArgs(divergence="reverse", hard_weight=0.5)
    teacher = tiny_model("llama", width=24, seed=2).eval()
    trainer = make(tmp_path, tiny_model("llama").eval(), teacher, distill=args)
    rows = examples(4, prompt=0)
    loss = compare(trainer, teacher, packed(rows), args)
    # The same texts one by one: packing changes nothing, neither by attention nor by labels across a border.
    apart = trainer.compute_loss(trainer.model, collate(rows))
    torch.testing.assert_close(apart, loss, rtol=1e-5, atol=1e-6)
    weighted = collate([{**row, "kd_weight": 0.5 * row["example"]} for row in rows])
    compare(trainer, teacher, weighted, args)


@pytest.mark.filterwarnings("ignore:.*the logits of the predicting rows")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_head_that_is_not_linear(tmp_path, kind):
    args = DivergenceArgs(divergence=kind, temperature=1.7, beta=0.3, alpha=0.2, hard_weight=0.5)
    teacher = tiny_model("llama", width=24, seed=2).eval()
    student = tiny_model("llama").eval()
    torch.manual_seed(0)
    student.lm_head = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 61))
    trainer = make(tmp_path, student, teacher, distill=args)
    compare(trainer, teacher, collate(examples(5)), args)
    mirrored = make(tmp_path, teacher.requires_grad_(True), student, distill=args)
    compare(mirrored, student, collate(examples(5)), args)


def test_sequence_reduction(tmp_path):
    args = DivergenceArgs(soft_weight=0, hard_weight=1, reduction="sequence")
    student = tiny_model("llama").eval()
    trainer = make(tmp_path, student, distill=args)
    rows = examples(4)
    each = []
    for row in rows:
        batch = collate([row])
        labels = batch.pop("labels")
        batch.pop("example")
        each.append(F.cross_entropy(student(**batch).logits[0, :-1], labels[0, 1:]))
    torch.testing.assert_close(trainer.compute_loss(student, collate(rows)), torch.stack(each).mean())


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_accumulation_does_not_change_the_gradient(tmp_path, reduction):
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1 with uneven token counts."""
    teacher, found = tiny_model("llama", width=24, seed=2), []
    args = DivergenceArgs(hard_weight=0.5, reduction=reduction)
    for size in (8, 4, 2, 1):
        student = tiny_model("llama")
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        trainer = make(
            tmp_path,
            student,
            teacher,
            data=examples(8),
            distill=args,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            kwargs={"optimizers": (optimizer, None)},
        )
        output = trainer.train()
        found.append((output.training_loss, {n: p.detach().clone() for n, p in student.named_parameters()}))
    for loss, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, found[0][1][name], rtol=1e-4, atol=1e-5)


class Feature(TokenObjective):
    def __init__(self, teacher, reads=("example",)):
        super().__init__(teacher, DivergenceArgs.model_validate({}))
        self.auxiliary["projection"] = nn.Linear(16, 24)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.seen, self.columns = [], reads

    def loss(self, call, batch, items):
        rows = call.hidden_rows(batch, output_hidden_states=True)
        assert len(rows.output.hidden_states) == 3
        self.seen.append(sorted(batch))
        signal, output = self.teacher.run(batch, rows, output_hidden_states=True)
        assert output.hidden_states[1].shape[-1] == 24
        terms = self.token_terms(rows, batch, items)
        distance = F.mse_loss(self.auxiliary["projection"](rows.hidden), signal.hidden_t)
        terms["feature"] = (0.5, distance * self.share(batch, items))
        terms["watched"] = (0.0, distance.detach())
        return terms

    def on_step_end(self, trainer):
        self.steps += 1

    def extra_state(self):
        return {"note": int(self.steps)}

    def load_extra_state(self, state):
        self.note = state["note"]


def test_auxiliaries_train_are_saved_and_never_shipped(tmp_path):
    teacher = tiny_model("llama", width=24, seed=2)

    def trainer(steps):
        torch.manual_seed(0)
        objective = Feature(LocalTeacher(teacher))
        return make(
            tmp_path,
            tiny_model("llama"),
            objective=objective,
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
        )

    whole = trainer(4)
    start = whole.objective.auxiliary["projection"].weight.detach().clone()
    whole.train()
    assert not torch.equal(start, whole.objective.auxiliary["projection"].weight)
    assert "example" in whole.objective.seen[0]
    log = whole.state.log_history[0]
    assert {"term/soft", "term/feature", "term/feature/weighted", "term/watched"} <= set(log)
    assert log["loss"] == pytest.approx(log["term/soft/weighted"] + log["term/feature/weighted"], rel=1e-5)
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as file:
        assert not any("projection" in key for key in file.keys())  # noqa: SIM118
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert int(resumed.objective.steps) == 4
    assert resumed.objective.note == 2
    for a, b in zip(whole.objective.state_dict().values(), resumed.objective.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_objectives_with_hidden_parameters_are_refused(tmp_path):
    class Wrong(Objective):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(2, 2)

    with pytest.raises(InputError, match=r"outside of `auxiliary`: projection\.weight"):
        make(tmp_path, tiny_model("llama"), objective=Wrong())
    student = tiny_model("llama")
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    objective = Feature(LocalTeacher(tiny_model("llama", width=24)))
    with pytest.raises(InputError, match=r"does not hold the parameters of objective\.auxiliary"):
        make(tmp_path, student, objective=objective, kwargs={"optimizers": (optimizer, None)})


def test_clear_refusals(tmp_path):
    student, teacher = tiny_model("llama"), tiny_model("llama", vocab_size=70)
    with pytest.raises(InputError, match="give an Objective, or teacher"):
        make(tmp_path, student)
    with pytest.raises(InputError, match="61 outputs, the teacher 70"):
        make(tmp_path, student, teacher)
    with pytest.raises(InputError, match="no teacher to diverge from"):
        make(tmp_path, student, distill=DivergenceArgs.model_validate({}))
    with pytest.raises(InputError, match="given with teacher or distill"):
        make(tmp_path, student, student, objective=Objective())
    with pytest.raises(InputError, match="allowed: as the student"):
        make(tmp_path, student, tiny_model("bert"))
    with pytest.raises(InputError, match="label_smoothing_factor"):
        make(tmp_path, student, student, label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="give processing_class too"):
        make(tmp_path, student, tiny_model("llama"), kwargs={"teacher_processing_class": Vocabulary(61)})
    with pytest.raises(InputError, match=r"model\.model\.compile"):
        make(tmp_path, student, student, torch_compile=True)


class Vocabulary:
    def __init__(self, size):
        self.size = size

    def get_vocab(self):
        return {str(i): i for i in range(self.size)}


def test_padded_vocabularies_are_cut_to_what_both_have(tmp_path):
    args = DivergenceArgs(hard_weight=0.5)
    student, teacher = tiny_model("llama", vocab_size=70).eval(), tiny_model("llama", width=24, seed=2).eval()
    objective = TokenObjective(LocalTeacher(teacher), args, tokenizers=(Vocabulary(61), Vocabulary(61)))
    trainer = make(tmp_path, student, objective=objective)
    assert objective.vocabulary == 61
    batch = collate(examples(4))
    student.lm_head.weight.grad = None
    trainer.compute_loss(student, batch).backward()
    assert student.lm_head.weight.grad[61:].abs().max() == 0
    mask = predicted(batch, True)
    z = student(**model_inputs(student, batch)).logits[mask][:, :61].double()
    t = teacher(**model_inputs(teacher, batch)).logits[mask].double()
    labels = batch["labels"][:, 1:][mask[:, :-1]]
    expected = on_logits(z, t, Divergence()).mean() + 0.5 * F.cross_entropy(z, labels)
    assert trainer.compute_loss(student, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_damaged_checkpoint_names_the_newest_good_one_before_it(tmp_path):
    """By step, not by name: 8 comes before 10; what is newer does not count."""
    teacher = tiny_model("llama", width=24, seed=2)
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
    make(tmp_path, tiny_model("llama"), teacher, **options).train()
    file = tmp_path / "checkpoint-10" / "objective.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    (tmp_path / "checkpoint-old").mkdir()
    trainer = make(tmp_path, tiny_model("llama"), teacher, **options)
    with pytest.raises(InputError, match=r"objective.pt is corrupt.*checkpoint-8 is good: remove checkpoint-10"):
        trainer.train(resume_from_checkpoint=str(file.parent))
    (tmp_path / "checkpoint-2" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest.json is missing or unreadable; no older one is good"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(InputError, match="no such folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_batch_without_labels_has_a_gradient_of_zero(tmp_path):
    teacher = tiny_model("llama", width=24, seed=2)
    trainer = make(tmp_path, tiny_model("llama"), teacher, distill=DivergenceArgs(hard_weight=1.0))
    batch = collate(examples(2))
    batch["labels"][:] = -100
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(5))
    loss.backward()
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(trainer.model).values())


def test_evaluation_and_metrics(tmp_path):
    teacher = tiny_model("llama", width=24, seed=2)
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"seen": 1.0}

    def last(logits, labels):
        return logits.argmax(-1)

    trainer = make(
        tmp_path,
        tiny_model("llama"),
        teacher,
        kwargs={"eval_dataset": examples(6, seed=3), "compute_metrics": metrics, "preprocess_logits_for_metrics": last},
        per_device_eval_batch_size=8,
    )
    found = trainer.evaluate()
    batch = collate(examples(6, seed=3))
    args = DivergenceArgs.model_validate({})
    assert found["eval_loss"] == pytest.approx(naive(trainer.model, teacher, batch, args).item(), rel=1e-4)
    assert shapes == [batch["input_ids"].shape]


def test_activation_checkpointing_changes_nothing(tmp_path):
    teacher, found = tiny_model("llama", width=24, seed=2), []
    for on in (False, True):
        student = tiny_model("llama")
        trainer = make(
            tmp_path, student, teacher, max_steps=2, per_device_train_batch_size=4, activation_checkpointing=on
        )
        found.append((trainer.train().training_loss, student.model.layers[0].mlp.up_proj.weight.detach()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_best_checkpoint_is_loaded_at_the_end(tmp_path):
    teacher = tiny_model("llama", width=24, seed=2)
    trainer = make(
        tmp_path,
        tiny_model("llama"),
        teacher,
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.5,  # worse with every step
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        kwargs={"eval_dataset": examples(4, seed=5)},
    )
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_an_objective_without_labels_is_a_mean_over_examples(tmp_path):
    class Body(Objective):
        """Mean square of the first position's embedding."""

        def loss(self, call, batch, items):
            hidden = call.outputs(batch, output_hidden_states=True).hidden_states[0]
            return LossTerms(pooled=(1.0, hidden[:, 0].square().mean() * self.share(batch, items)))

    def unlabelled(rows):
        batch = collate(rows)
        del batch["labels"]
        return batch

    found = []
    for size in (8, 2):
        student = tiny_model("llama")
        trainer = make(
            tmp_path,
            student,
            objective=Body(),
            data=examples(8),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        trainer.data_collator = unlabelled
        found.append(trainer.train().training_loss)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_model_made_by_model_init_is_the_student(tmp_path):
    made = []

    def init():
        made.append(tiny_model("llama"))
        return made[-1]

    trainer = make(tmp_path, None, tiny_model("llama", seed=2), max_steps=1, kwargs={"model_init": init})
    trainer.train()
    assert trainer.student is made[-1]
    assert not torch.equal(made[-1].lm_head.weight, made[0].lm_head.weight)


def test_window_hook_comes_before_the_count(tmp_path):
    teacher, calls = tiny_model("llama", width=24, seed=2), []

    def hook(student, batches, step):
        torch.rand(4)
        calls.append((step, len(batches)))
        return [collate(examples(2, seed=step)) for _ in batches]

    items = []

    class Spy(TokenObjective):
        def loss(self, call, batch, found):
            items.append(int(found))
            return super().loss(call, batch, found)

    trainer = make(
        tmp_path,
        tiny_model("llama"),
        objective=Spy(LocalTeacher(teacher)),
        kwargs={"window_hook": hook},
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert calls == [(0, 2), (1, 2)]
    counts = [int(predicted(collate(examples(2, seed=step)), True).sum()) for step in (0, 1)]
    assert items == [2 * counts[0]] * 2 + [2 * counts[1]] * 2


def test_a_non_finite_term_stops_the_training(tmp_path):
    class Bad(TokenObjective):
        def loss(self, call, batch, items):
            terms = super().loss(call, batch, items)
            return LossTerms({**terms, "extra": (0.1, terms["soft"][1].detach() * float("inf"))})

    trainer = make(tmp_path, tiny_model("llama"), objective=Bad(LocalTeacher(tiny_model("llama", seed=1))), max_steps=3)
    with pytest.raises(NonFiniteLoss, match="step 0: loss term 'extra' of player 'student' is inf"):
        trainer.train()


def test_bfloat16_autocast_stays_near_float32(tmp_path):
    teacher = tiny_model("llama", width=24, seed=2)
    losses = []
    for fields in ({}, {"bf16": True}):
        trainer = make(tmp_path, tiny_model("llama"), teacher, max_steps=1, per_device_train_batch_size=16, **fields)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]


def test_importing_the_engine_imports_no_transformers():
    code = (
        "import sys, kd_llm.engine.objective, kd_llm.integrations.stage; "
        "sys.exit(any(m in sys.modules for m in ('transformers', 'peft', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_sharded_student_has_the_same_gradients_and_its_training_resumes(tmp_path):
    script = Path(__file__).with_name("sharded_student.py")
    launch = [*(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
