"""The baselines: losses of a whole text against the paper's formula, the arms end to end, the student in stock code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_llm.engine.objective import DivergenceArgs, StudentCall, TokenObjective
from kd_llm.engine.rollouts import HFRollouts, Sampling
from kd_llm.engine.teacher_texts import read_rows, teacher_rows, write_rows
from kd_llm.engine.teachers import LocalTeacher
from kd_llm.methods.token_kd import METHOD, TokenKDConfig
from kd_llm.testing import TINY_RUN, TINY_STUDENT, collate, examples, tiny_model
from kd_llm.tokenizers import train_tokenizer
from kdcore import run
from kdcore.config import override, parse, read_yaml
from kdcore.errors import InputError
from kdcore.method import arm_config, config_of, find_config, load_config

pytestmark = pytest.mark.usefixtures("cache")

SMALL = read_yaml(find_config("token_kd/small"))
TINY = {**TINY_RUN, **TINY_STUDENT, "method_args.sampling.max_new_tokens": 4}


def tiny(**more):
    return config_of(METHOD, override({k: v for k, v in SMALL.items() if k != "compare"}, {**TINY, **more}))


# ---------------------------------------------------------------- the mathematics


def divergence(p: torch.Tensor, q: torch.Tensor, kind: str, beta: float, alpha: float) -> torch.Tensor:
    """D of the paper's section 2 and of its relatives, from probabilities."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    m = beta * p + (1 - beta) * q
    return {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "js": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse": lambda: kl(q, alpha * q + (1 - alpha) * p),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[kind]()


@pytest.mark.parametrize("kind", ["forward", "reverse", "js", "skew", "skew_reverse", "total_variation"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_loss_of_a_text_is_the_mean_of_its_tokens(kind, reduction):
    student, teacher = (tiny_model(seed=seed).double().eval() for seed in (0, 1))
    batch = collate(examples(5))
    args = DivergenceArgs(divergence=kind, beta=0.3, alpha=0.2, reduction=reduction)
    objective = TokenObjective(LocalTeacher(teacher), args)
    objective.prepare(student)
    found = objective.loss(StudentCall(student, True, student.forward), batch, None).total()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    p, q = (model(**inputs).logits[:, :-1].softmax(-1) for model in (teacher, student))
    mask = (batch["labels"][:, 1:] != -100).double()
    values = divergence(p, q, kind, 0.3, 0.2) * mask
    of_texts = values.sum(1) / mask.sum(1)
    expected = of_texts.mean() if reduction == "sequence" else values.sum() / mask.sum()
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found, student.model.layers[0].mlp.up_proj.weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected, student.model.layers[0].mlp.up_proj.weight)[0]
    torch.testing.assert_close(ours, theirs)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(0, 10_000))
def test_js_lies_between_nothing_and_its_entropy(beta, seed):
    """0 <= D_JS(beta) <= H(beta), with equality at 0 for equal distributions."""
    p, q = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(3).softmax(-1)
    bound = -(beta * torch.tensor(beta).log() + (1 - beta) * torch.tensor(1 - beta).log())
    values = divergence(p, q, "js", beta, 0.1)
    assert (values >= 0).all()
    assert (values <= bound + 1e-6).all()
    assert divergence(p, p, "js", beta, 0.1).abs().max() < 1e-12


# ---------------------------------------------------------------- texts of the teacher


def test_the_teachers_texts_start_with_the_prompts_and_come_back_from_the_file(tmp_path):
    tokenizer = train_tokenizer(["x y z"] * 9, 300)
    rows = [{"input_ids": [3 + i, 9, 12, 5], "prompt_length": 2, "domain": i % 2} for i in range(5)]
    rollouts = HFRollouts(tokenizer)
    made = teacher_rows(tiny_model().eval(), rollouts, rows, Sampling(temperature=0.0, max_new_tokens=6), 0, n=2)
    assert len(made) == 10
    write_rows(tmp_path / "texts.jsonl", made)
    read = read_rows(tmp_path / "texts.jsonl")
    for index, row in enumerate(read):
        assert row["input_ids"][:2] == rows[index // 2]["input_ids"][:2]
        assert row["labels"][:2] == [-100, -100]
        assert row["labels"][2:] == row["input_ids"][2:]
        assert (row["example"], row["domain"]) == (index, rows[index // 2]["domain"])
    assert read[0]["input_ids"] == read[1]["input_ids"]  # greedy
    (tmp_path / "texts.jsonl").write_text('{"input_ids": 3}\n')
    with pytest.raises(InputError, match="not a file of the teacher's texts"):
        read_rows(tmp_path / "texts.jsonl")


# ---------------------------------------------------------------- runs


def test_both_configs_are_valid_and_small_has_the_arms():
    _, config = load_config("token_kd/small")
    assert set(config.compare) == {"sft", "forward", "reverse", "js", "sequence", "on_policy"}
    for overrides in config.compare.values():
        arm_config(SMALL, overrides)
    _, paper = load_config("token_kd/paper")
    assert paper.teacher.pretrained


def test_a_run_end_to_end(tmp_path):
    metrics = run.train(METHOD, tiny(), tmp_path / "run", quiet=True, cpu=True)
    assert metrics["student/perplexity"] > 1
    assert {f"student/perplexity/{name}" for name in ("prose", "code", "tests")} <= metrics.keys()
    assert 0 <= metrics["student/agreement"] <= 1
    assert metrics["student/kl_to_teacher"] >= 0
    assert run.evaluate(tmp_path / "run") == pytest.approx(metrics)
    samples = METHOD.predict(tiny(), run.load_run(tmp_path / "run")[2], 3)
    assert len(samples) == 3
    assert all(set(sample) == {"prompt", "truth", "teacher", "student"} for sample in samples)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("rollout" in key for record in records for key in json.dumps(record).split('"'))


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["sft", "forward", "reverse", "js", "sequence", "on_policy"])
def test_every_arm_trains(tmp_path, arm):
    overrides = dict(SMALL["compare"][arm])
    if arm == "sequence":
        overrides["method_args.sequence"] = {"count": 8, "sampling": {"max_new_tokens": 8, "temperature": 0.0}}
    metrics = run.train(METHOD, tiny(**overrides), tmp_path / arm, quiet=True, cpu=True)
    assert metrics["student/perplexity"] > 1
    assert (tmp_path / arm / "teacher_texts.jsonl").is_file() == (arm == "sequence")


@pytest.mark.slow
def test_a_student_cut_out_of_the_teacher_packed_rows_and_adapters(tmp_path):
    cut = {"student.config": None, "student.cut": {"layers": 1}, "data.packing": True, "method_args.lmbda": 0.0}
    metrics = run.train(METHOD, tiny(**cut), tmp_path / "cut", quiet=True, cpu=True)
    assert metrics["student/parameters"] < metrics["teacher/parameters"]
    adapters = {"student.config": None, "student.cut": {}, "student.adapters": {"rank": 2}, "method_args.lmbda": 0.0}
    metrics = run.train(METHOD, tiny(**adapters), tmp_path / "lora", quiet=True, cpu=True)
    assert metrics["student/agreement"] > 0.5
    assert (tmp_path / "lora" / "student" / "model.safetensors").is_file()


ALONE = """
import sys
sys.modules["kd_llm"] = sys.modules["kdcore"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
inputs = tokenizer("def main(", return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=5, do_sample=False, min_new_tokens=5)
assert made.shape[1] == inputs.input_ids.shape[1] + 5
assert tokenizer.decode(made[0], skip_special_tokens=True).startswith("def main(")
try:
    import kd_llm
except ImportError:
    print("alone")
"""


@pytest.mark.slow
def test_the_student_opens_in_a_process_without_this_package(tmp_path):
    run.train(METHOD, tiny(**{"method_args.lmbda": 0.0}), tmp_path / "run", quiet=True, cpu=True)
    command = [sys.executable, "-c", ALONE, str(tmp_path / "run" / "student")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("alone"), done.stderr


@pytest.mark.slow
def test_a_cache_of_a_saved_teacher_replaces_it(tmp_path):
    from kd_llm.runs import write_cache

    run.train(METHOD, tiny(**{"method_args.lmbda": 0.0}), tmp_path / "first", quiet=True, cpu=True)
    named = {
        "teacher": {"pretrained": str(tmp_path / "first" / "teacher")},
        "method_args.divergence": "forward",
        "method_args.lmbda": 0.0,
    }
    written = write_cache(tiny(**named), tmp_path / "cache", k=8)
    assert written["k"] == 8
    cached = {**named, "teacher": {**named["teacher"], "cache": str(tmp_path / "cache")}}
    metrics = run.train(METHOD, tiny(**cached), tmp_path / "cached", quiet=True, cpu=True)
    assert metrics["student/perplexity"] > 1
    other = {**cached, "data.length": 40}
    with pytest.raises(InputError, match="data"):
        run.train(METHOD, tiny(**other), tmp_path / "other", quiet=True, cpu=True)


@pytest.mark.slow
def test_solved_problems_are_counted(tmp_path):
    arithmetic = {
        "data": {"name": "arithmetic", "size": 60, "eval_size": 4, "length": 24, "domains": ["add1", "sub1"]},
        "evaluation.answers": 3,
    }
    metrics = run.train(METHOD, tiny(**arithmetic), tmp_path / "run", quiet=True, cpu=True)
    assert {"student/pass_rate", "student/pass_rate/add1", "teacher/pass_rate"} <= metrics.keys()


@pytest.mark.slow
def test_an_encoder_decoder_learns_from_its_own_texts_and_the_teachers(tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    path = tmp_path / "x.jsonl"
    rows = [{"prompt": f"turn {i % 7} {i % 5}", "completion": f"{i % 5} {i % 7} turned"} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    t5 = {"model_type": "t5", "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    values = {
        "task": "seq2seq",
        "tokenizer": {"vocab_size": 300},
        "data": {"name": "jsonl", "root": str(path), "length": 24},
        "teacher.config": t5,
        "student": {"cut": {"layers": 1}},
        "method_args": {
            "lmbda": 0.5,
            "sampling": {"max_new_tokens": 6},
            "sequence": {"count": 40, "sampling": {"temperature": 0.0, "max_new_tokens": 6}},
        },
        "train.log_every": 1,
        "train.accumulation": 4,
    }
    run.train(METHOD, tiny(**values), tmp_path / "run", quiet=True, cpu=True)
    read = read_rows(tmp_path / "run" / "teacher_texts.jsonl", encoder_decoder=True)
    assert len(read) == 40
    assert all(len(row["input_ids"]) == row["prompt_length"] and 1 <= len(row["labels"]) <= 6 for row in read)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["rollout/share"] for line in lines if "rollout/share" in line]
    assert 0 < sum(shares) < len(shares)
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "student")


@pytest.mark.slow
def test_a_classifier_learns_from_a_classifier(tmp_path):
    rows = [{"text": f"{'good fine' if i % 2 else 'bad poor'} number {i}", "label": i % 2} for i in range(120)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bert = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2}  # fmt: skip
    values = {
        "task": "classification",
        "tokenizer": {"kind": "wordpiece", "vocab_size": 300, "lowercase": True},
        "data": {"name": "jsonl", "root": str(path), "length": 16, "prompt_tokens": 8},
        "teacher.config": bert,
        "teacher.train.steps": 60,
        "student": {"cut": {"layers": 1}},
        "method_args": {"divergence": "forward", "lmbda": 0.0, "temperature": 2.0},
        "train.steps": 40,
    }
    metrics = run.train(METHOD, tiny(**values), tmp_path / "run", quiet=True, cpu=True)
    assert metrics["student/accuracy"] > 0.8
    assert len(metrics["confusion_matrix"]) == 2
    samples = METHOD.predict(tiny(**values), run.load_run(tmp_path / "run")[2], 2)
    assert samples[0]["student"]["text"] in ("0", "1")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method_args.soft_weight": 0.0}, "has no loss: soft_weight and hard_weight are 0"),
        ({"method_args.soft_weight": 0.0, "method_args.hard_weight": 1.0}, "lmbda > 0 needs soft_weight > 0"),
        ({"method_args.divergence": "kl"}, "allowed: 'forward', 'reverse'"),
        ({"method_args.lmda": 0.1}, "did you mean 'lmbda'"),
        ({"teacher.train": None}, "'teacher' has no weights"),
        ({"student.cut": {}}, "'student' has several sources"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.packing": True}, r"method_args\.lmbda: the texts are written anew; set data\.packing to false"),
        ({"task": "masked"}, r"method_args\.lmbda: only for models that write texts; task = 'masked'"),
        (
            {"task": "masked", "method_args.lmbda": 0.0, "teacher.cache": "x"},
            r"teacher\.cache: the masked tokens are drawn",
        ),
        ({"method_args.rollouts": "vllm"}, "vllm is not installed"),
        ({"teacher.cache": "x"}, r"teacher\.cache: it has the texts of the data alone; not with method_args\.lmbda"),
        ({"task": "classification", "method_args.lmbda": 0.0}, "has no labels"),
        ({"train.monitor": "perplexety"}, r"train\.monitor = 'perplexety': not a metric; did you mean 'perplexity'"),
        ({"data.domains": ["poetry"]}, r"data\.domains: 'poetry'"),
    ],
)
def test_settings_that_do_not_go_together_are_named_before_anything_trains(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run.train(METHOD, tiny(**changes), tmp_path / "run", quiet=True, cpu=True)
    assert not Path(tmp_path / "run").exists()


def test_whose_tokenizer_is_compared_with_whose(tmp_path):
    """The teacher's own by its name, else the run's for both, so that a student of another padding is no error."""
    from kd_llm.runs import tokenizer_pair

    mine, theirs = train_tokenizer(["a b"] * 9, 300), train_tokenizer(["c d"] * 9, 310)
    theirs.save_pretrained(tmp_path / "teacher")
    other = {"teacher": {"pretrained": str(tmp_path / "teacher")}, "method_args.lmbda": 0.0}
    assert tokenizer_pair(tiny(), mine) == (mine, mine)
    assert tokenizer_pair(tiny(**other), mine) == (mine, mine)
    found = tokenizer_pair(tiny(**other, tokenizer={"pretrained": "elsewhere"}), mine)
    assert found[0] is mine
    assert found[1].get_vocab() == theirs.get_vocab()


def test_arguments_are_those_of_the_paper_by_default():
    args = parse(TokenKDConfig, {})
    assert (args.divergence, args.beta, args.lmbda, args.temperature) == ("js", 0.5, 0.5, 1.0)
