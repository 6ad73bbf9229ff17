"""Metrics against the naive computation with all logits in memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from kd_llm import metrics as m
from kd_llm.engine.objective import run_body
from kd_llm.engine.rows import predicted
from kd_llm.testing import collate, examples, tiny_model
from kdcore.errors import InputError


def batches(count=12, size=5):
    rows = examples(count)
    for start in range(0, count, size):
        batch = collate(rows[start : start + size])
        batch["domain"] = batch["example"] % 2
        yield batch


def naive(student, teacher):
    """domain -> lists of -ln q(y), KL, agreement, hits; from whole logits in float64."""
    found = {0: [], 1: []}
    for batch in batches():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            z, t = (model(**inputs).logits[:, :-1].double() for model in (student, teacher))
        labels = batch["labels"][:, 1:]
        nll = cross_entropy(z.transpose(1, 2), labels, reduction="none")
        kl = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1)
        for row, domain in enumerate(batch["domain"].tolist()):
            for place in (labels[row] != -100).nonzero().flatten().tolist():
                best = int(z[row, place].argmax())
                same, hit = best == int(t[row, place].argmax()), best == int(labels[row, place])
                found[domain].append((float(nll[row, place]), float(kl[row, place]), same, hit))
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_language_metrics_are_token_weighted_means(kind):
    student, teacher = tiny_model(kind).eval(), tiny_model(kind, seed=1).eval()
    found = naive(student, teacher)
    every = found[0] + found[1]
    metrics = m.language_metrics(student, batches(), ["a", "b"], teacher=teacher)
    expected = {
        "perplexity": math.exp(sum(row[0] for row in every) / len(every)),
        "perplexity/a": math.exp(sum(row[0] for row in found[0]) / len(found[0])),
        "perplexity/b": math.exp(sum(row[0] for row in found[1]) / len(found[1])),
        "token_accuracy": sum(row[3] for row in every) / len(every),
        "agreement": sum(row[2] for row in every) / len(every),
        "kl_to_teacher": sum(row[1] for row in every) / len(every),
    }
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert list(metrics) == list(expected)


def test_a_model_is_at_no_distance_from_itself():
    model = tiny_model().eval()
    metrics = m.language_metrics(model, batches(), teacher=model)
    assert metrics["agreement"] == 1
    assert metrics["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert "perplexity/a" not in metrics


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_do_not_change_the_rows(chunk):
    student, teacher = tiny_model().eval(), tiny_model(seed=1).eval()
    batch = next(batches())
    index = predicted(batch, True).nonzero()
    ours, theirs = run_body(student, batch, index, True), run_body(teacher, batch, index, True)
    whole, parts = m.row_statistics(ours, theirs), m.row_statistics(ours, theirs, chunk_rows=chunk)
    for name in ("nll", "correct", "kl", "agree"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_no_tensor_of_all_tokens_and_the_vocabulary_is_made(monkeypatch):
    """The largest product with the head that is ever asked for has as many rows as a chunk."""
    model = tiny_model().eval()
    batch = collate(examples(32))
    index = predicted(batch, True).nonzero()
    rows = run_body(model, batch, index, True)
    monkeypatch.setattr(m, "CHUNK", 4 * len(rows.head.weight))
    sizes = []
    logits = type(rows.head).logits
    monkeypatch.setattr(type(rows.head), "logits", lambda head, h: sizes.append(len(h)) or logits(head, h))
    m.row_statistics(rows)
    assert max(sizes) == 4
    assert sum(sizes) == len(index)


def test_data_without_a_predicted_token_is_refused():
    batch = next(batches())
    batch["labels"].fill_(-100)
    with pytest.raises(InputError, match="no token is predicted"):
        m.language_metrics(tiny_model().eval(), [batch])


def test_classification_metrics_of_a_small_table():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
    labels = torch.tensor([0, 1, 1, 1])
    metrics = m.classification_metrics(logits, labels, logits)
    assert metrics["accuracy"] == 0.75
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert metrics["nll"] == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-6)
    assert metrics["agreement"] == 1
    assert metrics["kl_to_teacher"] == pytest.approx(0, abs=1e-12)


def test_pass_rate_is_exact_but_for_blanks():
    assert m.pass_rate([" 12", "13", "1 2"], ["12", "12", "12"]) == pytest.approx(1 / 3)


def test_batches_for_measuring_hold_every_row_once():
    rows = examples(13)
    lengths = [len(row["input_ids"]) for row in rows]

    class Table(list):
        def __getitem__(self, key):
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    made = list(m.evaluation_batches(Table(rows), collate, 4))
    assert sorted(i for batch in made for i in batch["example"].tolist()) == list(range(13))
    assert [batch["input_ids"].shape[1] for batch in made] == sorted(
        (b["input_ids"].shape[1] for b in made), reverse=True
    )
    assert made[0]["input_ids"].shape[1] == max(lengths)


def test_the_teacher_judges_what_the_student_writes():
    from types import SimpleNamespace

    from kd_llm.engine.rollouts import HFRollouts, Sampling

    student, teacher = tiny_model("gpt2").eval(), tiny_model("gpt2", seed=1).eval()
    special, prompts = SimpleNamespace(eos_token_id=2, pad_token_id=0), [[4, 5], [6], [7, 8, 9]]
    found = m.text_metrics(student, teacher, special, prompts, 6, seed=3, batch_size=2)
    made = HFRollouts(special).generate(
        student, [torch.tensor(ids) for ids in prompts], 1, Sampling(max_new_tokens=6), 3
    )
    nll, kl, tokens = 0.0, 0.0, 0
    for one in made:
        with torch.no_grad():
            q, p = (model(one.ids[None]).logits[0, one.completion_start - 1 : -1].log_softmax(1)
                    for model in (student, teacher))  # fmt: skip
        nll -= p.gather(1, one.completion[:, None]).sum().item()
        kl += (q.exp() * (q - p)).sum().item()
        tokens += len(one.completion)
    assert found == pytest.approx({"text_nll": nll / tokens, "text_kl": kl / tokens}, rel=1e-4)
    own = m.text_metrics(teacher, teacher, special, prompts, 6, seed=3)
    assert own["text_kl"] == pytest.approx(0, abs=1e-6)
