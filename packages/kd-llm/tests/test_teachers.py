"""Teacher sources: what they say of the rows is what the teacher's whole logits say."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_llm.engine.objective import DivergenceArgs, TokenObjective, run_body
from kd_llm.engine.rows import predicted, row_weights
from kd_llm.engine.teachers import AdapterOffTeacher, CachedTeacher, LocalTeacher, data_identity, write_cache
from kd_llm.testing import VOCABULARY, collate, examples, gradients, packed, tiny_model
from kdcore.errors import InputError
from kdcore.gpu import TopK


def batches(count=10, size=4, **options):
    rows = examples(count, **options)
    return lambda: (collate(rows[i : i + size]) for i in range(0, count, size))


def rows_of(model, batch, shift=True):
    return run_body(model, batch, predicted(batch, shift).nonzero(), shift)


def whole(model, batch, shift=True):
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[predicted(batch, shift)]


def test_local_teacher_is_frozen_and_right():
    teacher = tiny_model("gpt2", width=24, seed=2).train()
    source, batch = LocalTeacher(teacher), collate(examples(4))
    assert not teacher.training
    student = tiny_model("llama")
    source.prepare(student)
    signal = source.signal(batch, rows_of(student, batch))
    assert not signal.hidden_t.requires_grad
    assert not signal.weight_t.requires_grad
    assert signal.hidden_t.shape[1] == 24
    torch.testing.assert_close(signal.logits(), whole(teacher, batch), rtol=1e-4, atol=1e-4)


def test_adapters_off_is_the_base_model():
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama").eval()
    batch = collate(examples(4))
    expected = whole(base, batch)
    config = LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False, lora_dropout=0.5)
    student = get_peft_model(base, config).train()
    source = AdapterOffTeacher(student)
    source.prepare(student)
    signal = source.signal(batch, rows_of(student, batch))
    torch.testing.assert_close(signal.logits(), expected, rtol=1e-4, atol=1e-4)
    assert student.training
    assert student.base_model.model.lm_head.lora_dropout["default"].training
    with pytest.raises(InputError, match="the student itself"):
        source.prepare(tiny_model("llama"))
    with pytest.raises(InputError, match="has no adapters"):
        AdapterOffTeacher(tiny_model("llama"))


def test_self_distillation_in_the_trainer(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import TrainingArguments

    from kd_llm.integrations.trainer import DistillTrainer

    base = tiny_model("llama").eval()
    batch = collate(examples(4))
    student = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = DistillTrainer(student, args, teacher=AdapterOffTeacher(student), data_collator=collate)
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    with student.disable_adapter():
        t = whole(student, batch).log_softmax(-1)
    z = whole(student, batch).log_softmax(-1)
    assert loss.item() == pytest.approx((t.exp() * (t - z)).sum(-1).mean().item(), rel=1e-4)
    assert gradients(student)
    assert all("lora_" in name for name in gradients(student))


@pytest.mark.parametrize(("kind", "shift"), [("llama", True), ("t5", False)])
def test_a_cache_says_what_the_teacher_says(tmp_path, kind, shift):
    teacher = tiny_model(kind, width=24, seed=2).eval()
    found = write_cache(tmp_path, teacher, batches(), k=VOCABULARY)
    assert found["examples"] == 10
    assert found["rows"] == sum(int(predicted(batch, shift).sum()) for batch in batches()())
    source = CachedTeacher(tmp_path, teacher=teacher, data=data_identity(batches()()), verify=True)
    assert source.num_outputs == VOCABULARY
    student = tiny_model(kind).eval()
    rows = examples(10)
    mixed = collate([rows[i] for i in (7, 0, 3)])  # another order, another padding
    losses = []
    for signal in (source, LocalTeacher(teacher)):
        objective = TokenObjective(signal, DivergenceArgs(hard_weight=0.3))
        objective.prepare(student)
        body = rows_of(student, mixed, shift)
        losses.append(objective.token_terms(body, mixed, None).total().item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # float16 log-probabilities


@pytest.mark.parametrize("mode", ["tail", "truncated", "renormalised"])
@pytest.mark.filterwarnings("ignore:.*the logits of the predicting rows")
def test_top_k_on_a_head_that_is_not_linear_is_the_same_loss(tmp_path, mode):
    teacher = tiny_model("llama", width=24, seed=2).eval()
    write_cache(tmp_path, teacher, batches(4), k=5)
    student, other = tiny_model("llama").eval(), tiny_model("llama").eval()

    class Plain(torch.nn.Module):  # the same head, but no linear layer to the eye
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x)

    other.lm_head = Plain(other.lm_head)
    batch, found = collate(examples(4)), []
    for model in (student, other):
        args = DivergenceArgs(topk_mode=mode, temperature=1.5, hard_weight=0.2)
        objective = TokenObjective(CachedTeacher(tmp_path), args)
        objective.prepare(model)
        rows = rows_of(model, batch)
        terms = objective.token_terms(rows, batch, None)
        terms.total().backward()
        found.append(({k: v.item() for k, (_, v) in terms.items()}, model.model.layers[0].mlp.up_proj.weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


def test_writing_goes_on_where_it_stopped(tmp_path):
    teacher, calls = tiny_model("llama", width=24, seed=2), []
    handle = teacher.model.register_forward_hook(lambda module, inputs, output: calls.append(1))

    def cut():
        yield from list(batches()())[:2]
        raise KeyboardInterrupt

    passes = iter([batches()(), cut()])
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, teacher, lambda: next(passes), k=4, shard_size=4)
    with pytest.raises(InputError, match="unfinished"):
        CachedTeacher(tmp_path)
    done = len(calls)
    write_cache(tmp_path, teacher, batches(), k=4, shard_size=4)
    assert len(calls) - done == 1  # the last batch alone
    handle.remove()
    whole_folder = tmp_path / "whole"
    write_cache(whole_folder, teacher, batches(), k=4, shard_size=4)
    a, b = CachedTeacher(tmp_path).cache, CachedTeacher(whole_folder).cache
    for key in range(10):
        assert torch.equal(a[key].ids, b[key].ids)
        assert torch.equal(a[key].logp, b[key].logp)


def test_foreign_stale_and_broken_caches_are_refused(tmp_path):
    teacher = tiny_model("llama", width=24, seed=2)
    write_cache(tmp_path, teacher, batches(), k=4)
    with pytest.raises(InputError, match="teacher: found"):
        CachedTeacher(tmp_path, teacher=tiny_model("llama", width=24, seed=3))
    with pytest.raises(InputError, match="data: found"):
        CachedTeacher(tmp_path, data=data_identity(batches(seed=5)()))
    with pytest.raises(InputError, match="choose another folder"):
        write_cache(tmp_path, teacher, batches(seed=5), k=4)
    source, student = CachedTeacher(tmp_path), tiny_model("llama")
    batch = collate(examples(4, longest=8, seed=9))
    with pytest.raises(InputError, match="rows there and"):
        source.signal(batch, rows_of(student, batch))
    batch = collate(examples(4))
    batch["example"] += 100
    with pytest.raises(InputError, match="key 100: not among"):
        source.signal(batch, rows_of(student, batch))
    del batch["example"]
    with pytest.raises(InputError, match="no 'example' column"):
        source.signal(batch, rows_of(student, batch))
    with pytest.raises(InputError, match=r"allowed with cache .*: 'forward'"):
        TokenObjective(source, DivergenceArgs(divergence="reverse")).prepare(student)
    shard = next(tmp_path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="sha256"):
        CachedTeacher(tmp_path, verify=True)
    index = tmp_path / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "kind": "full"}))
    with pytest.raises(InputError):
        CachedTeacher(tmp_path)


def test_cache_input_is_checked(tmp_path):
    teacher = tiny_model("llama")
    with pytest.raises(InputError, match="k: given 62"):
        write_cache(tmp_path, teacher, batches(), k=62)
    with pytest.raises(InputError, match="packed"):
        write_cache(tmp_path, teacher, lambda: [packed(examples(3))], k=4)


def test_identity_is_of_the_texts_and_not_of_their_batches():
    assert data_identity(batches(10, 4)()) == data_identity(batches(10, 3)())
    assert data_identity(batches(10)()) != data_identity(batches(9)())
    assert data_identity(batches(10)()) != data_identity(batches(10, prompt=3)())


@given(st.lists(st.integers(3, 9), min_size=1, max_size=5), st.integers(0, 2), st.booleans())
def test_row_weights_add_up(lengths, prompt, weighted):
    """Over any split into micro-batches: to the mean of the example weights over tokens, or over sequences."""
    rows = [
        {"input_ids": [5] * n, "labels": [-100] * prompt + [5] * (n - prompt), "example": i, "kd_weight": 0.5 + i}
        for i, n in enumerate(lengths)
    ]
    if not weighted:
        rows = [{k: v for k, v in row.items() if k != "kd_weight"} for row in rows]
    tokens = [min(n - prompt, n - 1) for n in lengths]
    importance = [0.5 + i if weighted else 1.0 for i in range(len(rows))]
    for reduction, expected, items in (
        ("token", sum(w * n for w, n in zip(importance, tokens)) / sum(tokens), sum(tokens)),
        ("sequence", sum(importance) / len(rows), len(rows)),
    ):
        for size in (1, 2, len(rows)):
            total = 0.0
            for i in range(0, len(rows), size):
                batch = collate(rows[i : i + size])
                index = predicted(batch, True).nonzero()
                total += row_weights(batch, index, items, reduction, torch.float64).sum().item()
            assert total == pytest.approx(expected)


def test_top_k_of_a_cache_is_the_top_k_of_its_logits(tmp_path):
    teacher = tiny_model("llama", width=24, seed=2).eval()
    write_cache(tmp_path, teacher, batches(4), k=6, chunk_bytes=4 * VOCABULARY * 3)
    batch = collate(examples(4))
    found = CachedTeacher(tmp_path).signal(batch, rows_of(tiny_model("llama"), batch))
    expected = TopK.from_logits(whole(teacher, batch), 6)
    assert torch.equal(found.ids.long(), expected.ids)
    torch.testing.assert_close(found.logp.float(), expected.logp, rtol=2e-3, atol=2e-3)
