"""DDK: the shares' equations, the measurement, the objective in a Trainer with its mixture, resume, whole runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kd_llm.engine.mixture import DomainMixture
from kd_llm.engine.objective import StudentCall
from kd_llm.engine.perplexity import perplexities
from kd_llm.engine.teachers import LocalTeacher
from kd_llm.methods.ddk import (
    DDK,
    METHOD,
    DDKConfig,
    completed,
    initial_shares,
    next_shares,
    trajectory_metrics,
)
from kd_llm.testing import TINY_RUN, TINY_STUDENT, collate, examples, tiny_model
from kdcore import run
from kdcore.config import override, parse, read_yaml
from kdcore.errors import InputError
from kdcore.method import arm_config, config_of, find_config

R0 = (0.186323723, 0.307195886, 0.506480391)


def close(found, expected, digits=9):
    assert found == pytest.approx(expected, abs=0.51 * 10**-digits)


# ---------------------------------------------------------------- equations 2 and 3


def test_start():
    close(initial_shares([1.0, 1.5, 2.0]), R0)


@pytest.mark.parametrize("level", [0.3, 1.0, 25.0])
def test_equal_ratios_of_any_level(level):
    close(next_shares(initial_shares([1.0, 1.5, 2.0]), [level] * 3), (0.259828528, 0.320264610, 0.419906862))


def test_two_updates():
    first = next_shares(initial_shares([1.0, 1.5, 2.0]), [1.1, 1.3, 1.2])
    close(first, (0.249751870, 0.333979719, 0.416268411))
    close(next_shares(first, [1.05, 1.25, 1.0]), (0.285185, 0.360245, 0.354570), digits=6)


ratios = st.lists(st.floats(0.5, 40), min_size=2, max_size=8)


@settings(deadline=None, max_examples=60)
@given(rho=ratios, alpha=st.floats(0, 1), data=st.data())
def test_shares_sum_to_one_between_floor_and_ceiling(rho, alpha, data):
    r = initial_shares(rho)
    n = len(rho)
    for _ in range(4):
        rho = data.draw(st.lists(st.floats(0.5, 40), min_size=n, max_size=n))
        r = next_shares(r, rho, alpha)
        assert sum(r) == pytest.approx(1, abs=1e-12)
        assert all((1 - alpha) / n - 1e-12 <= share <= alpha + (1 - alpha) / n + 1e-12 for share in r)


@settings(deadline=None, max_examples=40)
@given(rho=ratios, alpha=st.floats(0, 0.95), level=st.floats(0.5, 5))
def test_equal_ratios_shrink_the_distance_to_uniform_by_alpha(rho, alpha, level):
    r, n = initial_shares(rho), len(rho)
    for _ in range(3):
        following = next_shares(r, [level] * n, alpha)
        close([a - 1 / n for a in following], [alpha * (b - 1 / n) for b in r])
        r = following


@settings(deadline=None, max_examples=40)
@given(rho=ratios, constant=st.floats(-3, 300), seed=st.integers(0, 9))
def test_constants_change_nothing_and_domains_may_be_renamed(rho, constant, seed):
    r = initial_shares(rho[::-1])
    order = torch.randperm(len(rho), generator=torch.Generator().manual_seed(seed)).tolist()
    for function in (initial_shares, lambda values: next_shares(r, values)):
        close(function([value + constant for value in rho]), function(rho))
    close(initial_shares([rho[i] for i in order]), [initial_shares(rho)[i] for i in order])
    close(next_shares([r[i] for i in order], [rho[i] for i in order]), [next_shares(r, rho)[i] for i in order])


def test_alpha_0_is_uniform_and_alpha_1_multiplies_weights():
    r = initial_shares([1.0, 1.5, 2.0])
    close(next_shares(r, [1.1, 1.3, 1.2], 0.0), [1 / 3] * 3)
    rhos = [[1.1, 1.3, 1.2], [1.05, 1.25, 1.0], [2.0, 0.9, 1.0]]
    total = [sum(values) for values in zip(*rhos, strict=True)]
    expected = [share * math.exp(value) for share, value in zip(r, total, strict=True)]
    for rho in rhos:
        r = next_shares(r, rho, 1.0)
    close(r, [value / sum(expected) for value in expected])


def test_a_raw_student_gives_finite_shares():
    shares = next_shares(initial_shares([2000.0, 20.0, 1.0]), [5000.0, 20.0, 1.0])
    close(shares, [0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3])


# ---------------------------------------------------------------- perplexity


def domains(count=12):
    rows = examples(count, seed=3, longest=14)
    return {"short": rows[: count // 3], "long": rows[count // 3 :]}


def batched(rows, size=3):
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "cohere"])
def test_perplexity_weighs_tokens_alike(kind):
    model = tiny_model(kind).double()
    model.train()
    parts = domains()
    found = perplexities(model, {name: batched(rows) for name, rows in parts.items()})
    assert model.training
    model.eval()
    for name, rows in parts.items():
        loss = tokens = 0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            z = model(ids).logits[0, :-1].log_softmax(-1)
            kept = labels != -100
            loss -= z[kept, labels[kept]].sum().item()
            tokens += int(kept.sum())
        assert found[name] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    again = perplexities(model, {name: batched(rows, 5) for name, rows in parts.items()})
    assert again == pytest.approx(found, rel=1e-5), "how examples are batched plays no part"


def test_processes_add_up_to_the_whole():
    model = tiny_model("llama").double()
    batches = {name: batched(rows) for name, rows in domains().items()}
    parts = []
    for rank in range(3):
        perplexities(model, batches, rank=rank, processes=3, reduce=lambda sums: parts.append(sums) or sums + 1)
    found = perplexities(model, batches, rank=0, processes=3, reduce=lambda _: sum(parts))
    assert found == pytest.approx(perplexities(model, batches), rel=1e-9)


def test_a_domain_without_a_token_is_named():
    empty = {**collate(examples(2)), "labels": torch.full((2, 12), -100)}
    empty["labels"] = torch.full_like(empty["input_ids"], -100)
    with pytest.raises(InputError, match="domain 'x'"):
        perplexities(tiny_model("llama"), {"x": [empty]})


# ---------------------------------------------------------------- the objective


def ddk(sampling="ddk", *, interval=3, seed=0, log=None, **values):
    args = parse(DDKConfig, {"interval": interval, "sampling": sampling, **values})
    train = {"a": examples(7, seed=1), "b": examples(40, seed=2), "c": examples(20, seed=3)}
    mixture = DomainMixture(train, seed, size=interval * 4, counts=args.counts)
    validation = {name: [collate(examples(6, seed=20 + i))] for i, name in enumerate(train)}
    teacher = LocalTeacher(tiny_model("llama", width=24, seed=2))
    measured = perplexities(teacher.model, validation)
    return DDK(teacher, args, mixture, validation, measured, **({} if log is None else {"log": log}))


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_loss_is_cross_entropy_and_a_little_kl(divergence):
    objective, student = ddk(divergence=divergence, temperature=2.0), tiny_model("gpt2", seed=1).eval()
    objective.prepare(student)
    batch = collate(examples(4))
    terms = objective.loss(StudentCall(student, True, student.forward), batch, None)
    assert {name: weight for name, (weight, _) in terms.items()} == {"soft": 0.2, "hard": 1.0}
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    torch.testing.assert_close(terms["hard"][1], student(**inputs, labels=batch["labels"]).loss)
    kept = batch["labels"][:, 1:] != -100
    log_q, log_p = (
        (model(**inputs).logits[:, :-1][kept] / 2).log_softmax(-1) for model in (student, objective.teacher.model)
    )
    first, second = (log_p, log_q) if divergence == "forward" else (log_q, log_p)
    kl = 4 * (first.exp() * (first - second)).sum(-1).mean()
    torch.testing.assert_close(terms["soft"][1], kl, rtol=1e-4, atol=1e-5)


def test_gamma_0_is_cross_entropy_alone_and_samples_the_same():
    objective, student = ddk(gamma=0), tiny_model("gpt2", seed=1)
    objective.prepare(student)
    terms = objective.loss(StudentCall(student, True, student.forward), collate(examples(4)), None)
    assert set(terms) == {"hard"}
    other = ddk()
    for some in (objective, other):
        for interval in range(2):
            some.start(student, interval, 3 * interval)
            some.mixture.draw()
    assert objective.history == other.history
    assert objective.mixture.slots() == other.mixture.slots()


@pytest.mark.parametrize("sampling", ["ddk", "fresh", "equal", "natural"])
def test_each_sampling_over_three_intervals(sampling):
    log = []
    objective = ddk(sampling, log=lambda **record: log.append(record))
    names, natural = objective.mixture.names, objective.mixture.natural
    students = [tiny_model("gpt2", seed=seed) for seed in (5, 6, 7)]
    shares = None
    for interval, student in enumerate(students):
        objective.start(student, interval, 3 * interval)
        rho = list(objective.history[-1]["ratio"].values())
        found = perplexities(student, objective.validation)
        assert rho == pytest.approx([found[name] / objective.teacher_perplexity[name] for name in names])
        if sampling == "ddk":
            shares = initial_shares(rho) if shares is None else next_shares(shares, rho, 0.5)
        elif sampling == "fresh":
            shares = initial_shares(rho)
        else:
            shares = [1 / 3] * 3 if sampling == "equal" else natural
        expected = natural if interval == 0 else shares
        assert list(objective.history[-1]["sampled"].values()) == pytest.approx(expected)
        assert objective.mixture.weights == pytest.approx(expected)
    assert [record["step"] for record in log] == [1, 4, 7]
    assert all(record["kind"] == "mixture" for record in log)


def test_padded_vocabularies_need_the_tokenizers_and_lose_their_padding():
    """As Qwen 1.5's sizes have: one tokenizer, different numbers of outputs."""

    class Tokens:
        def get_vocab(self):
            return {str(i): i for i in range(50)}

    objective, student = ddk(), tiny_model("llama", vocab_size=70).eval()
    with pytest.raises(InputError, match="70 outputs, the teacher 61; give both tokenizers"):
        objective.prepare(student)
    padded = DDK(objective.teacher, objective.ddk, objective.mixture, objective.validation,
                 objective.teacher_perplexity, tokenizers=(Tokens(), Tokens()))  # fmt: skip
    padded.prepare(student)
    assert padded.vocabulary == 61
    assert torch.isfinite(padded.loss(StudentCall(student, True, student.forward), collate(examples(4)), None).total())


def test_domains_must_agree():
    objective = ddk()
    wrong = {"a": 1.0, "b": 1.0}
    with pytest.raises(InputError, match=r"allowed: those of the mixture, \['a', 'b', 'c'\]"):
        DDK(objective.teacher, objective.ddk, objective.mixture, objective.validation, wrong)


# ---------------------------------------------------------------- in a Trainer


def trained(folder, steps=8, *, checkpoints=0, resume=None, sampling="ddk", **values):
    from transformers import TrainingArguments

    from kd_llm.integrations.mixture import MixtureCallback
    from kd_llm.integrations.trainer import DistillTrainer

    objective, student = ddk(sampling, **values), tiny_model("gpt2", seed=1, resid_pdrop=0.1)
    seen = []

    def keep(rows):
        seen.append([row["input_ids"] for row in rows])
        return collate(rows)

    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        report_to="none", use_cpu=True, save_steps=checkpoints or 500, save_strategy="steps" if checkpoints else "no",
        remove_unused_columns=False, disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = DistillTrainer(
        student, args, objective=objective, train_dataset=objective.mixture, data_collator=keep,
        callbacks=[MixtureCallback(objective.mixture, 3, objective.start)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return objective, {name: p.detach().clone() for name, p in student.named_parameters()}, seen


def test_intervals_are_epochs_and_start_with_a_measurement(tmp_path):
    objective, _, seen = trained(tmp_path)
    assert [record["step"] for record in objective.history] == [1, 4, 7]
    assert objective.mixture.interval == 2
    assert len(seen) >= 16
    drawn = sorted(map(str, [ids for batch in seen[:6] for ids in batch]))
    again = ddk().mixture
    again.draw()
    assert drawn == sorted(str(again[i]["input_ids"]) for i in range(12)), "the first interval is the natural mixture"


@pytest.mark.parametrize(("within", "steps"), [(0.99, 4), (1e-9, 8)])
def test_level_shares_end_the_training_after_the_first_interval(tmp_path, within, steps):
    objective, _, seen = trained(tmp_path, stop_within=within)
    assert len(objective.history) == (2 if steps == 4 else 3)
    assert len(seen) >= 2 * steps
    assert (len(seen) < 16) == (steps == 4)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 5, 6])
def test_resume_is_bit_exact_inside_and_at_the_edge_of_an_interval(tmp_path, step):
    whole, expected, _ = trained(tmp_path / "whole")
    cut = tmp_path / "cut"
    trained(cut, steps=8, checkpoints=step)
    resumed, found, _ = trained(tmp_path / "resumed", resume=cut / f"checkpoint-{step}")
    assert resumed.history == whole.history
    assert resumed.mixture.state_dict() == whole.mixture.state_dict()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_the_state_is_plain():
    objective = ddk()
    objective.start(tiny_model("gpt2", seed=1), 0, 0)
    objective.mixture.draw()
    state = objective.extra_state()
    assert json.loads(json.dumps(state)) == state
    other = ddk()
    other.load_extra_state(json.loads(json.dumps(state)))
    assert other.extra_state() == state
    assert other.mixture.slots() == objective.mixture.slots()


# ---------------------------------------------------------------- whole runs

SMALL = read_yaml(find_config("ddk/small"))
TINY = {
    **TINY_RUN,
    **TINY_STUDENT,
    "data.size": 30,
    "data.eval_size": 6,
    "train.steps": 7,
    "train.accumulation": 2,
    "train.batch_size": 4,
    "train.checkpoint_every": 3,
    "method_args.interval": 3,
    "method_args.pretrain.train.steps": 2,
}


def tiny(**more):
    return config_of(METHOD, override({k: v for k, v in SMALL.items() if k != "compare"}, {**TINY, **more}))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_a_stock_model_and_the_trajectory(cache, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metrics = run.train(METHOD, tiny(), tmp_path / "run", quiet=True, cpu=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    history = json.loads((tmp_path / "run" / "mixture.json").read_text())
    assert [record["step"] for record in history] == [1, 4, 7]
    logged = [line for line in records(tmp_path / "run") if line["kind"] == "mixture"]
    assert [{k: line[k] for k in history[0]} for line in logged] == history
    teacher = json.loads((tmp_path / "run" / "teacher_perplexity.json").read_text())
    assert set(teacher) == set(history[0]["ratio"]) == {"prose", "code", "tests"}
    assert metrics["ratio/max"] == max(value for name, value in metrics.items() if name.startswith("ratio/"))
    assert {"mixture/turnover", "mixture/correlation", "ratio/gap"} <= metrics.keys()
    assert run.evaluate(tmp_path / "run") == metrics


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_bit_exactly(cache, tmp_path, monkeypatch):
    run.train(METHOD, tiny(), tmp_path / "whole", quiet=True, cpu=True)
    steps, original = [], DDK.on_step_end

    def cut(self, trainer):
        steps.append(trainer.state.global_step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        original(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(DDK, "on_step_end", cut)
        with pytest.raises(KeyboardInterrupt):
            run.train(METHOD, tiny(), tmp_path / "cut", quiet=True, cpu=True)
    run.train(METHOD, tiny(), tmp_path / "cut", quiet=True, cpu=True, resume=True)
    one, other = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    histories = [(tmp_path / name / "mixture.json").read_text() for name in ("whole", "cut")]
    assert histories[0] == histories[1]
    logged = [
        [line["interval"] for line in records(tmp_path / n) if line["kind"] == "mixture"] for n in ("whole", "cut")
    ]
    assert logged == [[0, 1, 2]] * 2


@pytest.mark.slow
def test_two_processes_share_one_mixture(cache, tmp_path):
    """The same shares and the same student as one process, but for the order of sums."""
    run.train(METHOD, tiny(), tmp_path / "one", quiet=True, cpu=True)
    overrides = [f"{name}={json.dumps(value)}" for name, value in TINY.items()]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
            *("-m", "kdcore", "train", "ddk/small", *overrides, "--output", str(tmp_path / "two")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "mixture.json").read_text()) for name in ("one", "two"))
    for before, after in zip(one, two, strict=True):
        assert list(after["shares"].values()) == pytest.approx(list(before["shares"].values()), rel=1e-4)
    one, two = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arm", [{"method_args.sampling": "natural"}, {"method_args.gamma": 0.0}])
def test_arms_run(cache, tmp_path, arm):
    metrics = run.train(METHOD, tiny(**arm), tmp_path / "run", quiet=True, cpu=True)
    assert math.isfinite(metrics["ratio/mean"])
    if "method_args.sampling" in arm:
        assert metrics["mixture/turnover"] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data.domains": ["code"]}, r"data\.domains: given \['code'\], allowed: two or more"),
        ({"method_args.pretrain.shares": {"cod": 0.5}}, r"pretrain\.shares: 'cod' is no domain; did you mean 'code'"),
        ({"method_args.pretrain.train": {"epochs": 1}}, r"pretrain\.train: .* give steps"),
        ({"task": "masked"}, "task = 'masked'"),
    ],
)
def test_what_cannot_work_is_said_before_training(cache, tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        run.train(METHOD, tiny(**values), tmp_path / "run", quiet=True, cpu=True)


@pytest.mark.parametrize("values", [{"alpha": 1.5}, {"interval": 0}, {"sampling": "x"}, {"gamma": -1}])
def test_bad_fields_are_named(values):
    with pytest.raises(InputError, match=f"'{next(iter(values))}'"):
        parse(DDKConfig, values)


def test_shares_of_a_pretraining():
    assert completed({"b": 0.8}, ["a", "b", "c"]) == pytest.approx([0.1, 0.8, 0.1])
    assert completed({"a": 0.5, "b": 0.5}, ["a", "b"]) == [0.5, 0.5]
    with pytest.raises(InputError, match="sum to 1 at most"):
        parse(DDKConfig, {"pretrain": {"train": {"steps": 1}, "shares": {"a": 0.7, "b": 0.7}}})


def test_trajectory():
    history = [
        {"sampled": {"a": 0.9, "b": 0.1}, "ratio": {"a": 1.0, "b": 1.0}},
        {"sampled": {"a": 0.6, "b": 0.4}, "ratio": {"a": 2.0, "b": 1.5}},
        {"sampled": {"a": 0.5, "b": 0.5}, "ratio": {"a": 1.5, "b": 1.5}},
        {"sampled": {"a": 0.3, "b": 0.7}, "ratio": {"a": 1.2, "b": 1.1}},
    ]
    found = trajectory_metrics(history)
    assert found["mixture/turnover"] == pytest.approx(0.15)
    assert found["mixture/correlation"] == pytest.approx(0.0, abs=1e-9)
    assert trajectory_metrics(history[:1]) == {}


@pytest.mark.parametrize("name", ["small", "paper"])
def test_configs_and_their_arms_are_valid(name):
    values = read_yaml(find_config(f"ddk/{name}"))
    config_of(METHOD, values)
    for overrides in values["compare"].values():
        arm_config(values, overrides)
