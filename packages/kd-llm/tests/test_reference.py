"""Teachers that see the reference solution, and problems as tokens."""

from __future__ import annotations

import pytest
import torch

from kd_llm.data import DataConfig, load_data
from kd_llm.engine.objective import DivergenceArgs, StudentCall, TokenObjective
from kd_llm.engine.problems import problems_of
from kd_llm.engine.reference import LENGTH, PROMPT, ReferenceTeacher, WithReference, behind_reference, with_reference
from kd_llm.engine.rollouts import Rollout
from kd_llm.engine.teachers import LocalTeacher
from kd_llm.testing import collate, tiny_model
from kd_llm.tokenizers import train_tokenizer
from kdcore.errors import InputError

ROWS = [
    {"input_ids": [4, 5, 6, 7, 1], "labels": [-100, -100, 6, 7, 1], "example": 0, PROMPT: [9, 4, 5]},
    {"input_ids": [8, 3, 1], "labels": [-100, 3, 1], "example": 1, PROMPT: [3, 9, 9, 9, 8]},
]


def batch():
    return WithReference(collate, 0)(ROWS)


def test_responses_follow_the_teachers_prompts():
    seen = behind_reference(batch(), 0)
    assert seen["input_ids"].tolist() == [[9, 4, 5, 6, 7, 1, 0], [3, 9, 9, 9, 8, 3, 1]]
    assert seen["labels"].tolist() == [[-100] * 3 + [6, 7, 1, -100], [-100] * 5 + [3, 1]]
    assert seen["attention_mask"].tolist() == [[1] * 6 + [0], [1] * 7]


def objective_of(kind="forward"):
    student = tiny_model("gpt2", seed=1).double().eval()
    teacher = ReferenceTeacher(tiny_model("gpt2", seed=2).double(), 0)
    objective = TokenObjective(teacher, DivergenceArgs(divergence=kind, reduction="sequence"))
    objective.prepare(student)
    return student, teacher, objective


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_the_loss_is_that_of_logits_aligned_on_the_response(kind):
    student, teacher, objective = objective_of(kind)
    terms = objective.loss(StudentCall(student, True, student.forward), batch(), None)
    expected = 0.0
    for row in ROWS:
        response = row["labels"][row["labels"].count(-100) :]
        n = len(response)
        with torch.no_grad():
            z = student(torch.tensor([row["input_ids"]])).logits[0, -n - 1 : -1].log_softmax(-1)
            t = teacher.model(torch.tensor([row[PROMPT] + response])).logits[0, -n - 1 : -1].log_softmax(-1)
        p, q = (t, z) if kind == "forward" else (z, t)
        expected += (p.exp() * (p - q)).sum(-1).mean() / 2
    assert terms.total().item() == pytest.approx(expected.item())


def test_prompts_alike_give_the_ordinary_teacher():
    student, teacher, objective = objective_of()
    rows = [{**row, PROMPT: row["input_ids"][: row["labels"].count(-100)]} for row in ROWS]
    same = objective.loss(StudentCall(student, True, student.forward), WithReference(collate, 0)(rows), None)
    plain = TokenObjective(LocalTeacher(teacher.model), DivergenceArgs(reduction="sequence"))
    plain.prepare(student)
    other = plain.loss(StudentCall(student, True, student.forward), collate(rows), None)
    assert same.total().item() == pytest.approx(other.total().item(), rel=1e-12)


def test_the_student_that_is_its_own_teacher_has_no_loss_and_no_gradient():
    student = tiny_model("gpt2", seed=1).double().eval()
    rows = [{**row, PROMPT: row["input_ids"][: row["labels"].count(-100)]} for row in ROWS]
    for kind in ("forward", "reverse"):
        teacher = ReferenceTeacher(tiny_model("gpt2", seed=1).double(), 0)
        objective = TokenObjective(teacher, DivergenceArgs(divergence=kind, reduction="sequence"))
        objective.prepare(student)
        student.zero_grad()
        loss = objective.loss(
            StudentCall(student, True, student.forward), WithReference(collate, 0)(rows), None
        ).total()
        loss.backward()
        assert abs(loss.item()) < 1e-12
        assert max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None) < 1e-12


def test_missing_and_empty_prompts_are_named():
    student, _, objective = objective_of()
    with pytest.raises(InputError, match="reference_ids"):
        objective.loss(StudentCall(student, True, student.forward), collate(ROWS), None)
    broken = {**batch(), LENGTH: torch.tensor([0, 5])}
    with pytest.raises(InputError, match="a prompt for both"):
        objective.loss(StudentCall(student, True, student.forward), broken, None)
    with pytest.raises(InputError, match="packed"):
        behind_reference({**batch(), "position_ids": batch()["input_ids"]}, 0)


def test_templates():
    assert with_reference("2+3=", "{prompt}", "{reference};{prompt}") == "{prompt};2+3="
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    shown = with_reference(chat, "y", "{prompt}\nSolution: {reference}")
    assert shown == [chat[0], {"role": "user", "content": "q\nSolution: y"}]
    assert chat[1]["content"] == "q"
    with pytest.raises(InputError, match="reference_template"):
        with_reference("q", "y", "{prompt}")


def test_problems_of_arithmetic():
    data = load_data(DataConfig(name="arithmetic", domains=["add1", "mul1"], size=20, eval_size=5, length=24), 0)
    tokenizer = train_tokenizer(data.texts(), 300)
    problems = problems_of(data.train, tokenizer, 24, template="{reference};{prompt}")
    assert len(problems) == 40
    first = tokenizer.decode(problems.prompts[0], skip_special_tokens=True)
    assert first == data.train[0]["prompt"]
    assert str(eval_sum(first)) == problems.answers[0]
    assert tokenizer.decode(problems.shown[0], skip_special_tokens=True) == f"{problems.answers[0]};{first}"
    few = problems_of(data.train, tokenizer, 24, limit=7, seed=1)
    assert len(few) == 7
    assert few.answers == problems_of(data.train, tokenizer, 24, limit=7, seed=1).answers
    assert few.answers != problems_of(data.train, tokenizer, 24, limit=7, seed=2).answers

    response = Rollout(
        torch.tensor([*problems.prompts[0].tolist(), 30, 1]), len(problems.prompts[0]), torch.zeros(2), True
    )
    (row,) = type(problems)(problems.prompts[:1], ["x"], [0]).rows([response])
    assert row["input_ids"][row["prompt_length"] :] == row["labels"][row["prompt_length"] :] == [30, 1]
    assert set(problems.rows()[0]["labels"]) == {-100}
    assert problems.rows()[0][PROMPT] == problems.shown[0].tolist()


def eval_sum(problem: str) -> int:
    for sign, operation in (("+", int.__add__), ("-", int.__sub__), ("*", int.__mul__)):
        a, found, b = problem.rstrip("=").partition(sign)
        if found:
            return operation(int(a), int(b))
    raise AssertionError(problem)


def test_plain_text_and_long_prompts_are_refused():
    from datasets import Dataset

    data = load_data(DataConfig(name="arithmetic", domains=["add1"], size=20, eval_size=5, length=24), 0)
    tokenizer = train_tokenizer(data.texts(), 300)
    with pytest.raises(InputError, match="plain text"):
        problems_of(Dataset.from_list([{"text": "a"}]), tokenizer, 24)
    with pytest.raises(InputError, match=r"data\.length = 8: 1 prompts are longer"):
        problems_of(Dataset.from_list([{"prompt": "1" * 20, "completion": "2"}]), tokenizer, 8)
