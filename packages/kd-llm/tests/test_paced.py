"""PACED: its divergences, its objective, its stages from end to end."""

from __future__ import annotations

import json

import pytest
import torch

from kd_llm.engine.objective import StudentCall
from kd_llm.engine.rows import predicted, row_weights
from kd_llm.engine.teachers import LocalTeacher
from kd_llm.engine.token_loss import Divergence, on_logits
from kd_llm.methods.paced import METHOD, PacedConfig, PacedObjective, budgets
from kd_llm.testing import collate, examples, tiny_model
from kdcore.config import TrainConfig, override
from kdcore.errors import InputError
from kdcore.method import config_of, load_config
from kdcore.run import check, load_run, train

BODY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
BUDGET = {"steps": 4, "batch_size": 8, "optimizer": {"name": "adamw", "lr": 5e-3}}
SHORT = {"max_new_tokens": 4}
TINY = {
    "method": "paced",
    "tokenizer": {"vocab_size": 300},
    "teacher": {"config": {**BODY, "hidden_size": 24}, "train": BUDGET},
    "student": {"config": BODY},
    "data": {"name": "arithmetic", "domains": ["add1", "sub1"], "size": 20, "eval_size": 4, "length": 24},
    "method_args": {
        "samples": 4,
        "verifier": "exact",
        "weighting": "inverse",  # of an untrained student every pass rate is 0
        "sampling": SHORT,
        "teacher_sampling": SHORT,
        "test": {"sampling": {**SHORT, "temperature": 0}},
        "diagnostic": 3,
        "warmup": {"train": BUDGET, "domains": ["add1"]},
    },
    "train": {**BUDGET, "accumulation": 2},
}


def config(**changes):
    return config_of(METHOD, override(TINY, changes))


# ---------------------------------------------------------------- mathematics


def test_divergences_and_gradients_of_one_token():
    t = torch.tensor([[1 / 6, 1 / 3, 1 / 2]], dtype=torch.float64).log()
    for kind, value, gradient in (
        ("forward", 0.087208024, [1 / 6, 0.0, -1 / 6]),
        ("reverse", 0.095894024, [0.199084, -0.031965, -0.167120]),
    ):
        z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        found = on_logits(z, t, Divergence(kind)).sum()
        found.backward()
        assert found.item() == pytest.approx(value, abs=1e-9)
        assert torch.allclose(z.grad, torch.tensor([gradient], dtype=torch.float64), atol=1e-6)


def loss_of(kind, rows, weights=None, *, teacher_seed=2, items=None):
    """The fused loss of a tiny student, its gradient, and the objective's teacher."""
    student, teacher = tiny_model("gpt2", seed=1).double().eval(), tiny_model("gpt2", seed=teacher_seed).double()
    objective = PacedObjective(LocalTeacher(teacher), kind)
    objective.prepare(student)
    batch = collate(rows)
    if weights is not None:
        batch["kd_weight"] = torch.tensor(weights, dtype=torch.float64)
    loss = objective.loss(StudentCall(student, True, student.forward), batch, items).total()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]), teacher


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_no_loss_and_no_gradient_where_the_student_is_the_teacher(kind):
    loss, gradient, _ = loss_of(kind, examples(3), teacher_seed=1)
    assert abs(loss) < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_exponents_of_0_are_the_unweighted_run(kind):
    rows = examples(4)
    rates = torch.tensor([0.0, 0.25, 1.0, 0.5], dtype=torch.float64)
    weights = PacedConfig(a=0, b=0).weighter().weights(rates).tolist()
    plain, weighted = loss_of(kind, rows), loss_of(kind, rows, weights)
    assert plain[0] == weighted[0]
    assert torch.equal(plain[1], weighted[1])


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_mastered_and_hopeless_problems_contribute_exactly_nothing(kind):
    rows = examples(3)
    weights = PacedConfig(normalise="none").weighter().weights(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    whole, gradient, teacher = loss_of(kind, rows, weights.tolist())
    alone, other, _ = loss_of(kind, rows[1:2], [0.25])
    assert whole == pytest.approx(alone / 3)
    assert torch.allclose(gradient, other / 3, atol=1e-14)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_long_response_counts_as_much_as_a_short_one():
    """Equal token losses, one response twice as long: their shares are equal."""
    rows = [
        {"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "example": 0},
        {"input_ids": [3, 4, 5, 4, 5], "labels": [-100, 4, 5, 4, 5], "example": 1},
    ]
    batch = collate(rows)
    index = predicted(batch, True).nonzero()
    weights = row_weights(batch, index, 2, "sequence", torch.float64)
    assert [weights[index[:, 0] == row].sum().item() for row in (0, 1)] == [0.5, 0.5]
    both = loss_of("forward", rows)[0]
    assert both == pytest.approx(sum(loss_of("forward", [row])[0] for row in rows) / 2)


def test_weights_over_a_step_do_not_depend_on_the_cut():
    rows, weights = examples(6), [0.1, 0.4, 0.0, 1.0, 0.2, 0.3]
    objective = PacedObjective(LocalTeacher(tiny_model("gpt2", seed=2)), "forward", over_step=True)

    def seen(sizes):
        start, batches = 0, []
        for size in sizes:
            part = slice(start, start + size)
            batches.append({**collate(rows[part]), "kd_weight": torch.tensor(weights[part])})
            start += size
        return torch.cat([batch["kd_weight"] for batch in objective.window(None, batches, 0)])

    assert torch.allclose(seen([6]), seen([1, 2, 3]))
    assert seen([2, 4]).mean().item() == pytest.approx(1.0)
    plain = collate(rows)
    assert objective.window(None, [plain], 0) == [plain]  # unweighted rows have no column


# ---------------------------------------------------------------- config


def test_configs_that_ship():
    for name in ("small", "arithmetic", "paper", "paper_self"):
        method, found = load_config(f"paced/{name}")
        assert method is METHOD
        assert found.compare


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method_args.stages": []}, "stages = "),
        ({"method_args.stages": ["forward", "forward"]}, "stages = "),
        ({"method_args.low": 0.9}, "low = 0.9"),
        ({"method_args.weighting": "pased"}, "method_args.weighting"),
        ({"method_args.reference_template": "{prompt}"}, "reference_template"),
        ({"method_args.warmup.hints": 0.5}, "warmup.hints"),
        ({"method_args.a": -1}, "method_args.a"),
        ({"method_args.samples": 0}, "method_args.samples"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method_args.verifier": "exakt"}, "did you mean 'exact'"),
        ({"data.name": "stdlib", "data.domains": None, "method_args.warmup.domains": None}, "plain text"),
        ({"teacher.cache": "folder"}, "teacher.cache"),
        ({"method_args.warmup.domains": ["add2"]}, "warmup.domains: 'add2'"),
        ({"method_args.warmup": None, "method_args.variant": "self", "student": {"cut": {"layers": 1}}}, "student.cut"),
    ],
)
def test_bad_combinations_are_named_before_anything_trains(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        check(METHOD, config(**changes), tmp_path / "run", cpu=True)


def test_two_stages_share_the_budget():
    steps, epochs = TrainConfig(steps=100), TrainConfig(epochs=5)
    two, one = PacedConfig(first_share=0.3), PacedConfig(stages=["reverse"])
    assert [b.steps for b in budgets(two, steps)] == [30, 70]
    assert [b.epochs for b in budgets(two, epochs)] == [2, 4]
    assert [b.steps for b in budgets(one, steps)] == [100]


# ---------------------------------------------------------------- end to end


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_two_stages_from_end_to_end(cache, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metrics = train(METHOD, config(), tmp_path / "run", quiet=True, cpu=True)
    assert {"student/accuracy/add1", "base/accuracy", "teacher/accuracy", "snr/edge_share"} <= metrics.keys()
    assert 0 <= metrics["passrate1/mean"] <= 1
    _, _, artefacts = load_run(tmp_path / "run")
    assert {"base", "forward", "student", "passrate1", "passrate2", "snr"} <= artefacts.keys()
    student = AutoModelForCausalLM.from_pretrained(artefacts["student"])
    AutoTokenizer.from_pretrained(artefacts["student"])
    base = AutoModelForCausalLM.from_pretrained(artefacts["base"])
    pairs = zip(student.parameters(), base.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reverse = [line for line in lines if line["kind"] == "train" and line["stage"] == "student"]
    assert reverse[-1]["rollout/share"] == 1
    assert len(list((cache / "responses").iterdir())) == 1
    rows = METHOD.predict(config(), artefacts, 2)
    assert [set(row) for row in rows] == [{"prompt", "truth", "teacher", "student"}] * 2


@pytest.mark.slow
def test_the_same_run_twice_is_the_same_student(cache, tmp_path):
    from safetensors.torch import load_file

    changes = {"method_args.stages": ["reverse"], "method_args.normalise": "batch"}
    for name in ("a", "b"):
        train(METHOD, config(**changes), tmp_path / name, quiet=True, cpu=True)
    a, b = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_self_distillation_with_adapters(cache, tmp_path):
    changes = {
        "method_args.variant": "self",
        "method_args.stages": ["reverse", "forward"],
        "method_args.reference_template": "{reference};{prompt}",
        "method_args.warmup.hints": 0.5,
        "student.adapters": {"rank": 2},
        "method_args.weighting": "unweighted",
        "method_args.diagnostic": 0,
    }
    metrics = train(METHOD, config(**changes), tmp_path / "run", quiet=True, cpu=True)
    _, _, artefacts = load_run(tmp_path / "run")
    assert not {"teacher", "passrate1", "snr"} & artefacts.keys()
    assert metrics["student/parameters"] == metrics["teacher/parameters"]  # adapters are merged
    assert not (artefacts["student"] / "adapter_config.json").exists()


@pytest.mark.slow
def test_a_student_without_a_frontier_is_said_so(cache, tmp_path):
    with pytest.raises(InputError, match="every problem has weight 0"):
        train(METHOD, config(**{"method_args.weighting": "paced"}), tmp_path / "run", quiet=True, cpu=True)
