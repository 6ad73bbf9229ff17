"""SquareHead and the masks: the paper's values, gradients, padding; the objective in a Trainer; a whole run."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kd_llm.engine.blocks import block_linears, hidden_layers, real_positions
from kd_llm.engine.masks import load_masks, masks_of
from kd_llm.engine.objective import StudentCall
from kd_llm.engine.pruning import prune_model
from kd_llm.engine.teachers import CachedTeacher, LocalTeacher
from kd_llm.methods.sparse_finetuning import (
    EPS,
    METHOD,
    SparseFinetuning,
    SparseFinetuningConfig,
    SquareHead,
    relative_error,
)
from kd_llm.testing import TINY_RUN, collate, examples, packed, tiny_model
from kdcore import run
from kdcore.config import override, parse, read_yaml
from kdcore.errors import InputError
from kdcore.method import arm_config, config_of, find_config

ALL = torch.ones(1, 3, dtype=torch.bool)


def states(seed=0, shape=(2, 5, 4)):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    return student.requires_grad_(), teacher, real


def written_out(student, teacher, real, eps=EPS):
    """Eqs. (1) and (2) of one block, term by term."""
    s, t = student[real], teacher[real]
    return (s - t).square().mean() / (t.square().mean() + eps)


# ---------------------------------------------------------------- the loss


def test_epsilon_is_bfloat16s():
    assert EPS == 2**-7 == 0.0078125


def test_zeros_against_ones():
    value = relative_error(torch.zeros(1, 3, 2).double(), torch.ones(1, 3, 2).double(), ALL)
    assert value.item() == pytest.approx(1 / (1 + 2**-7), abs=1e-15)
    assert value.item() == pytest.approx(0.992248062, abs=5e-10)


def test_hand_value():
    teacher = torch.tensor([[[1, 1], [1, 1], [2, 2]]]).double()
    student = torch.tensor([[[1, 2], [0, 1], [2, 0]]]).double()
    assert relative_error(student, teacher, ALL).item() == pytest.approx(0.498054475, abs=5e-10)
    assert relative_error(student, teacher, ALL, normalise=False).item() == pytest.approx(1.0, abs=1e-12)


def test_gradient_is_equation_6_and_autograds():
    student, teacher, real = states()
    (got,) = torch.autograd.grad(relative_error(student, teacher, real), student)
    (expected,) = torch.autograd.grad(written_out(student, teacher, real), student)
    size = teacher[real].square().mean()
    formula = 2 * (student - teacher) / (real.sum() * 4 * (size + EPS)) * real.unsqueeze(-1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, formula.detach(), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda h: relative_error(h, teacher, real), student)


@settings(deadline=None, max_examples=40)
@given(scale=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_scale_acts_through_epsilon_alone(scale, seed):
    student, teacher, real = states(seed)
    mse, size = (student - teacher)[real].square().mean(), teacher[real].square().mean()
    scaled = relative_error(scale * student, scale * teacher, real)
    torch.testing.assert_close(scaled, mse / (size + EPS / scale**2))
    exact = relative_error(scale * student, scale * teacher, real, eps=0.0)
    torch.testing.assert_close(exact, relative_error(student, teacher, real, eps=0.0))
    plain = relative_error(scale * student, scale * teacher, real, normalise=False)
    torch.testing.assert_close(plain, scale**2 * mse)


@pytest.mark.parametrize("junk", [1e6, float("nan"), float("inf")])
def test_padding_is_not_read(junk):
    student, teacher, real = states()
    value = relative_error(student, teacher, real)
    (gradient,) = torch.autograd.grad(value, student)
    for which in range(2):
        both = [student.detach().clone(), teacher.clone()]
        both[which][~real] = junk
        both[0].requires_grad_()
        again = relative_error(*both, real)
        (got,) = torch.autograd.grad(again, both[0])
        assert torch.equal(again, value)
        assert torch.equal(got, gradient)


def test_nothing_reaches_the_teacher_and_half_precision_is_summed_in_float32():
    student, teacher, real = states()
    teacher = teacher.requires_grad_()
    relative_error(student, teacher, real).backward()
    assert teacher.grad is None
    half = relative_error(student.bfloat16(), teacher.bfloat16(), real)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(relative_error(student, teacher, real).item(), rel=0.02)


def test_shapes_and_empty_batches():
    student, teacher, real = states()
    with pytest.raises(InputError, match=r"student, teacher, real: shapes"):
        relative_error(student, teacher[:, :4], real)
    assert relative_error(student, teacher, torch.zeros_like(real)).item() == 0


# ---------------------------------------------------------------- what counts


def test_prompts_count_and_padding_does_not():
    batch, decoder_only = collate(examples(4)), tiny_model("gpt2")
    layer = hidden_layers(decoder_only)[0]
    assert torch.equal(real_positions(batch, layer), batch["attention_mask"].bool())
    assert (batch["labels"][real_positions(batch, layer)] == -100).any()


def test_packed_documents_count_once_and_their_padding_not():
    batch = packed(examples(3))
    layer = hidden_layers(tiny_model("llama"))[0]
    n = batch["input_ids"].shape[1]
    assert real_positions(batch, layer).all()
    padded = {
        "input_ids": F.pad(batch["input_ids"], (0, 4)),
        "labels": F.pad(batch["labels"], (0, 4), value=-100),
        "position_ids": torch.cat([batch["position_ids"], torch.arange(4)[None]], 1),
    }
    assert real_positions(padded, layer)[0].tolist() == [True] * n + [False] * 4


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "t5", "bart", "bert"])
def test_hooks_read_what_transformers_calls_hidden_states(kind):
    """Sum over l = 1..L, the embeddings left out, the last entry after the final norm."""
    student, teacher = tiny_model(kind, seed=1).double().eval(), tiny_model(kind, seed=2).double().eval()
    batch = collate(examples(4))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    two = kind in ("t5", "bart")
    if two:
        inputs["labels"] = batch["labels"]
    head = SquareHead(student, teacher)
    with head.student():
        found = student(**inputs, output_hidden_states=True)
    with torch.no_grad(), head.teacher(batch) as terms:
        theirs = teacher(**inputs, output_hidden_states=True)
    expected = []
    for part, mask in (("encoder_", "attention_mask"), ("decoder_", "labels")) if two else (("", "attention_mask"),):
        real = batch["labels"] != -100 if mask == "labels" else batch[mask].bool()
        pairs = zip(found[f"{part}hidden_states"][1:], theirs[f"{part}hidden_states"][1:], strict=True)
        expected += [written_out(s, t, real) for s, t in pairs]
    assert len(terms) == len(expected) == (4 if two else 2)
    torch.testing.assert_close(torch.stack(terms), torch.stack(expected))
    sum(terms).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not head.tap.as_dict.__self__._values, "no hidden state is held after the terms exist"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    student, teacher = tiny_model("llama", seed=1).double(), tiny_model("llama", seed=2).double()
    batch = collate(examples(4))
    objective = SparseFinetuning(LocalTeacher(teacher), config(), {})
    plain = copy.deepcopy(student)
    expected = gradients_of(objective, plain, batch)
    student.activation_checkpointing_enable({"use_reentrant": reentrant})
    student.train()
    got = gradients_of(SparseFinetuning(LocalTeacher(teacher), config(), {}), student, batch)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


# ---------------------------------------------------------------- the objective


def config(**values):
    return parse(SparseFinetuningConfig, values)


def terms_of(objective, student, batch, items=None):
    objective.prepare(student)
    return objective.loss(StudentCall(student, objective.shift, student.forward), batch, items)


def gradients_of(objective, student, batch):
    student.zero_grad()
    terms_of(objective, student, batch).total().backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def test_student_equal_to_teacher_has_no_distance_and_no_gradient():
    teacher = tiny_model("gpt2").double().eval()
    student = copy.deepcopy(teacher)
    terms = terms_of(SparseFinetuning(LocalTeacher(teacher), config(c_ce=0, c_kl=1), {}), student, collate(examples(4)))
    assert set(terms) == {"soft", "squarehead"}
    assert terms["squarehead"][1].item() == 0
    assert abs(terms["soft"][1].item()) < 1e-12
    terms.total().backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-12


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({}, {"hard": 1, "squarehead": 1}),
        ({"c_kl": 0.5, "temperature": 2.0}, {"soft": 0.5, "hard": 1, "squarehead": 1}),
        ({"c_sq": 0}, {"hard": 1}),
        ({"c_ce": 0, "c_sq": 2.0}, {"squarehead": 2.0}),
    ],
)
def test_weights_choose_the_terms(values, names):
    teacher, student = tiny_model("gpt2", seed=1).double().eval(), tiny_model("gpt2", seed=2).double().eval()
    batch = collate(examples(4))
    terms = terms_of(SparseFinetuning(LocalTeacher(teacher), config(**values), {}), student, batch)
    assert {name: weight for name, (weight, _) in terms.items()} == names
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    mine, theirs = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
    z, t, rows = mine.logits, theirs.logits, batch["labels"][:, 1:] != -100
    if "squarehead" in terms:  # the sum over the blocks, not their mean
        pairs = zip(mine.hidden_states[1:], theirs.hidden_states[1:], strict=True)
        expected = [written_out(s, h, batch["attention_mask"].bool()) for s, h in pairs]
        assert len(expected) == 2
        torch.testing.assert_close(terms["squarehead"][1], sum(expected))
    if "hard" in terms:
        torch.testing.assert_close(terms["hard"][1], F.cross_entropy(z[:, :-1][rows], batch["labels"][:, 1:][rows]))
    if "soft" in terms:  # on the rows that predict an answer token, shifted as the cross-entropy is
        z, t = z[:, :-1][rows] / 2, t[:, :-1][rows] / 2
        kl = 4 * F.kl_div(z.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")
        torch.testing.assert_close(terms["soft"][1], kl)


def test_prompts_count_in_squarehead_and_not_in_the_token_terms():
    student, teacher = tiny_model("gpt2", seed=2).double().eval(), tiny_model("gpt2", seed=1).double().eval()
    batch = collate(examples(4, prompt=3))

    def terms(labels):
        objective = SparseFinetuning(LocalTeacher(teacher), config(c_kl=1), {})
        return terms_of(objective, student, {**batch, "labels": labels})

    fewer = batch["labels"].clone()
    fewer[:, 3] = -100
    a, b = terms(batch["labels"]), terms(fewer)
    torch.testing.assert_close(a["squarehead"][1], b["squarehead"][1])
    assert abs(a["hard"][1] - b["hard"][1]) > 1e-3


def test_bad_fields_are_named(tmp_path):
    for values, message in (
        ({"sparsity": 124}, "quotes"),  # what YAML makes of a bare 2:4
        ({"sparsity": "5:4"}, "'N:M'"),
        ({"sparsity": -0.5}, "a share of zeros"),
        ({"c_ce": 0, "c_sq": 0}, "nothing to minimise"),
        ({"pruner": "wanda"}, "allowed: 'sparsegpt', 'magnitude' or 'none'"),
    ):
        with pytest.raises(InputError, match=message):
            config(**values)
    cached = CachedTeacher.__new__(CachedTeacher)
    with pytest.raises(InputError, match="SquareHead needs the teacher itself"):
        SparseFinetuning(cached, config(), {})
    other = tiny_model("gpt2", n_layer=3)
    with pytest.raises(InputError, match="teacher: 3 blocks"):
        terms_of(SparseFinetuning(LocalTeacher(other), config(), {}), tiny_model("gpt2"), collate(examples(2)))


# ---------------------------------------------------------------- in a Trainer


def test_masks_hold_after_every_step_of_a_trainer(tmp_path):
    from transformers import TrainerCallback, TrainingArguments

    from kd_llm.integrations.trainer import DistillTrainer

    teacher = tiny_model("gpt2", seed=1)
    student = copy.deepcopy(teacher)
    masks = prune_model(student, [collate(examples(8))], config(sparsity="2:4").pattern)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(all(torch.equal(model.get_parameter(n) != 0, mask) for n, mask in masks.items()))

    args = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=2, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    objective = SparseFinetuning(LocalTeacher(teacher), config(sparsity="2:4"), masks)
    trainer = DistillTrainer(
        student, args, objective=objective, train_dataset=examples(24), data_collator=collate, callbacks=[Look()]
    )
    trainer.train()
    assert seen == [True] * 6
    assert all(torch.equal(mask, (before[name] != 0)) for name, mask in masks.items())
    assert all(not torch.equal(before[name], student.get_parameter(name)) for name in masks)
    assert masks_of(student, masks).keys() == masks.keys()


# ---------------------------------------------------------------- whole runs

SMALL = read_yaml(find_config("sparse_finetuning/small"))
TINY = {**TINY_RUN, "train.batch_size": 4, "method_args.calibration": 8}


def tiny(**more):
    return config_of(METHOD, override({k: v for k, v in SMALL.items() if k != "compare"}, {**TINY, **more}))


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.8, "2:4"])
def test_a_run_leaves_a_stock_model_with_its_zeros_and_masks(cache, tmp_path, sparsity):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = tiny(**{"method_args.sparsity": sparsity, "train.ema": {"decay": 0.5} if sparsity == "2:4" else None})
    metrics = run.train(METHOD, config, tmp_path / "run", quiet=True, cpu=True)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    masks = load_masks(tmp_path / "run" / "student" / "masks.safetensors")
    before = load_masks(tmp_path / "run" / "pruned" / "masks.safetensors")
    assert masks.keys() == before.keys() == {f"{name}.weight" for name in block_linears(student)}
    for name, mask in masks.items():
        assert torch.equal(mask, before[name])
        assert torch.equal(student.get_parameter(name) != 0, mask)
    share = 0.5 if sparsity == "2:4" else sparsity
    assert metrics["student/sparsity"] == pytest.approx(share, abs=2e-3)
    report = json.loads((tmp_path / "run" / "student" / "sparsity.json").read_text())
    assert report["pattern"] == str(sparsity)
    assert {"pruned/perplexity", "student/perplexity", "student/relative_error/2"} <= metrics.keys()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train" and line["stage"] == "student"]
    assert set(trained[-1]["terms"]) == {"hard", "squarehead"}
    assert run.evaluate(tmp_path / "run") == metrics


@pytest.mark.slow
def test_a_student_that_comes_sparse_keeps_its_zeros(cache, tmp_path):
    run.train(METHOD, tiny(), tmp_path / "first", quiet=True, cpu=True)
    folder = str(tmp_path / "first" / "student")
    config = tiny(**{"student": {"pretrained": folder}, "method_args.pruner": "none", "train.steps": 2})
    run.train(METHOD, config, tmp_path / "second", quiet=True, cpu=True)
    first, second = (load_masks(tmp_path / name / "student" / "masks.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"student": {"cut": {}, "adapters": {"rank": 2}}}, r"student\.adapters"),
        ({"teacher.cache": "x"}, r"teacher\.cache: SquareHead needs"),
        ({"train.compile": True}, r"train\.compile"),
        ({"student": {"config": {"model_type": "llama"}}}, r"give student\.cut: \{\}"),
    ],
)
def test_what_cannot_work_is_said_before_training(cache, tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        run.train(METHOD, tiny(**values), tmp_path / "run", quiet=True, cpu=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["small", "paper"])
def test_configs_and_their_arms_are_valid(name):
    values = read_yaml(find_config(f"sparse_finetuning/{name}"))
    config_of(METHOD, values)
    for overrides in values["compare"].values():
        arm_config(values, overrides)


@pytest.mark.parametrize("kind", ["t5", "bart", "bert"])
def test_encoder_decoders_and_encoders_are_pruned_and_finetuned(kind):
    teacher, batch = tiny_model(kind, seed=1), collate(examples(6))
    student, pattern = copy.deepcopy(teacher), config(sparsity="2:4").pattern
    masks = prune_model(student, [batch], pattern)
    objective = SparseFinetuning(LocalTeacher(teacher), config(sparsity="2:4", c_kl=1), masks)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    student.eval()  # without dropout, which would decide whether eight steps lower the loss
    values = []
    for _ in range(8):
        terms = terms_of(objective, student, batch)
        optimizer.zero_grad()
        terms.total().backward()
        optimizer.step()
        objective.on_step_end(None)
        values.append(terms["squarehead"][1].item())
    assert set(terms) == {"soft", "hard", "squarehead"}
    assert values[-1] < values[0]
    assert all((student.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
