"""ERNIE-Tiny: losses of a stage, the stage table, and a run of all four stages."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import pytest
import torch

from kd_llm.engine.encoder import EncoderLayers, LatentLoss
from kd_llm.engine.encoder_objective import EncoderObjective, soft_cross_entropy
from kd_llm.engine.objective import StudentCall
from kd_llm.general import windows
from kd_llm.methods import ernie_tiny as e
from kdcore.config import parse
from kdcore.errors import InputError
from kdcore.method import config_of, get, load_config

SMALL = {"vocab_size": 30, "intermediate_size": 16, "max_position_embeddings": 32, "pad_token_id": 0}


def classifier(layers=2, size=12, heads=3, seed=0, labels=2, **fields):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    shape = {"num_hidden_layers": layers, "hidden_size": size, "num_attention_heads": heads, "num_labels": labels}
    model = BertForSequenceClassification(BertConfig(**SMALL, **shape, **fields)).double()
    with torch.no_grad():
        model.classifier.weight.mul_(30)  # far from uniform
    return model


def batch(labels=True, padding=0):
    ids = torch.randint(5, 30, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, 4:], mask[0, 4:] = 0, 0
    pad = torch.nn.functional.pad
    return {
        "input_ids": pad(ids, (0, padding)),
        "attention_mask": pad(mask, (0, padding)),
        "labels": torch.tensor([0, 1, 1, 0]) if labels else torch.full((4,), -100),
    }


def objective(student, teacher, **options):
    latent = LatentLoss(EncoderLayers.of(student), EncoderLayers.of(teacher)).double()
    made = EncoderObjective(teacher, latent, **options)
    made.prepare(student)
    return made


def terms_of(made, student, data):
    return made.loss(StudentCall(student, False, student.forward), data, None)


# ---------------------------------------------------------------- losses


def test_soft_cross_entropy_by_hand():
    zero, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert soft_cross_entropy(zero, teacher).item() == pytest.approx(0.693147181, abs=1e-9)
    assert torch.nn.functional.cross_entropy(zero, torch.tensor([1])).item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_cross_entropy_is_least_at_the_teacher(temperature):
    torch.manual_seed(0)
    teacher = torch.randn(5, 4, dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    values = soft_cross_entropy(student, teacher, temperature)
    p = (teacher / temperature).softmax(1)
    torch.testing.assert_close(values, -(temperature**2) * (p * p.log()).sum(1))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.abs().max() < 1e-12
    other = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(soft_cross_entropy(other, teacher, temperature).sum(), other)
    torch.testing.assert_close(gradient, temperature * ((other / temperature).softmax(1) - p).detach())


def test_a_copy_of_the_teacher_has_no_latent_loss_and_the_entropy_as_soft_loss():
    teacher, student = classifier().eval(), classifier().eval()
    made = objective(student, teacher, losses=("latent", "soft", "hard"), hard_weight=0.0)
    terms = terms_of(made, student, batch())
    assert list(terms) == ["embeddings", "hidden", "attention", "soft"]
    assert sum(terms[k][1].item() for k in list(terms)[:3]) == pytest.approx(0, abs=1e-24)
    p = teacher(**{k: batch()[k] for k in ("input_ids", "attention_mask")}).logits.softmax(1)
    assert terms["soft"][1].item() == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-12)
    terms.total().backward()
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-12


@pytest.mark.parametrize("losses", [("latent",), ("latent", "soft", "hard")])
def test_padding_changes_no_term_and_no_gradient(losses):
    found = []
    for padding in (0, 6):
        teacher, student = classifier(4, 12, seed=1).eval(), classifier(2, 6).eval()
        torch.manual_seed(5)
        made = objective(student, teacher, losses=losses)
        terms = terms_of(made, student, batch(padding=padding))
        terms.total().backward()
        gradients = [p.grad for p in [*student.parameters(), *made.auxiliary.parameters()] if p.grad is not None]
        found.append([value for _, value in terms.values()] + gradients)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_latent_stages_read_no_label_and_touch_no_head():
    teacher, student = classifier(4, 12, seed=1), classifier(2, 6)
    made = objective(student, teacher)
    for parameter in made.auxiliary.parameters():
        parameter.requires_grad_(False)
    student.eval()
    seen = [terms_of(made, student, batch(labels)).total() for labels in (True, False)]
    assert torch.equal(*seen)
    seen[0].backward()
    untouched = {name for name, p in student.named_parameters() if p.grad is None}
    assert untouched == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    torch.optim.AdamW(student.parameters(), lr=0.1, weight_decay=0.1).step()
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name]) == (name in untouched), name


def test_the_teacher_is_frozen_without_dropout_and_the_student_has_its_own():
    teacher, student = classifier(4, 12, seed=1).train(), classifier(2, 6).train()
    made = objective(student, teacher, losses=("latent", "soft", "hard"))
    made.train()
    assert not any(module.training for module in teacher.modules())
    terms_of(made, student, batch()).total().backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert student.training
    assert {name.split(".")[0] for name in made.state_dict()} == {"auxiliary"}  # no weight of the teacher


def test_micro_batches_of_one_length_add_up():
    teacher, student = classifier(4, 12, seed=1).eval(), classifier(2, 6).eval()
    made = objective(student, teacher, losses=("latent", "soft", "hard"))
    data = {key: value[1:] for key, value in batch().items()}  # no padding: every example has as many pairs
    call = StudentCall(student, False, student.forward)
    whole = made.loss(call, data, 3)
    parts = [made.loss(call, {k: v[cut] for k, v in data.items()}, 3) for cut in (slice(0, 1), slice(1, 3))]
    for name, (_, value) in whole.items():
        torch.testing.assert_close(parts[0][name][1] + parts[1][name][1], value, rtol=1e-7, atol=1e-9)  # float32 shares


def test_regression_takes_squared_errors():
    teacher, student = classifier(2, 12, seed=1, labels=1).eval(), classifier(2, 6, labels=1).eval()
    made = objective(student, teacher, losses=("latent", "soft", "hard"))
    data = {**batch(), "labels": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    terms = terms_of(made, student, data)
    z, t = (m(**{k: data[k] for k in ("input_ids", "attention_mask")}).logits[:, 0] for m in (student, teacher))
    assert terms["soft"][1].item() == pytest.approx((z - t).square().mean().item(), rel=1e-12)
    assert terms["hard"][1].item() == pytest.approx((z - data["labels"]).square().mean().item(), rel=1e-12)


# ---------------------------------------------------------------- the stage table


def rows_of(**stages):
    args = parse(e.ErnieTinyConfig, {"finetuned": "b", **({"stages": stages} if stages else {})})
    return e.table(args, {"general": "g", "task": "t"}, {"pretrained": "a", "finetuned": "b"})


def test_exactly_one_of_teacher_data_and_loss_changes_at_each_boundary():
    rows = rows_of()
    assert [row["stage"] for row in rows] == ["GD", "GED", "TAD", "TSD"]
    e.check_table(rows)
    assert [e.changes(a, b) for a, b in pairwise(rows)] == [["teacher"], ["data"], ["loss"]]
    assert rows[-1]["loss"] == ["latent", "soft", "hard"]
    with pytest.raises(InputError, match="from GD to TAD teacher, data change"):
        e.check_table(rows_of(GD={}, TAD={}, TSD={}))
    same = [{**row, "data": "t"} for row in rows]
    with pytest.raises(InputError, match="from GED to TAD nothing changes"):
        e.check_table(same)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs a finetuned teacher"),
        ({"finetuned": "b", "finetune": {"epochs": 1}}, "needs a finetuned teacher"),
        ({"finetuned": "b", "stages": {"GED": {}, "GD": {}, "TSD": {}}}, "in this order"),
        ({"finetuned": "b", "stages": {"GD": {}}}, "ends with TSD"),
        ({"finetuned": "b", "stages": {"TSE": {}}}, "TSE"),
        ({"finetuned": "b", "latent_weight": 0}, "leaves the stages before TSD without a loss"),
        (
            {"finetuned": "b", "stages": {"TSD": {}}, "latent_weight": 0, "soft_weight": 0, "hard_weight": 0},
            "at least one must be above",
        ),
        ({"finetuned": "b", "general": []}, "general"),
        ({"finetuned": "b", "latent": {"layer_map": "every"}}, "layer_map"),
    ],
)
def test_bad_arguments_are_named(values, message):
    with pytest.raises(InputError, match=message):
        parse(e.ErnieTinyConfig, values)


def test_windows_hold_the_whole_text():
    tokenizer = make_tokenizer()
    text = "alpha beta  gamma delta epsilon"
    pieces = windows(text, tokenizer, 2)
    assert "".join(pieces) == text
    assert [len(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces] == [2, 2, 1]
    assert windows("", tokenizer, 2) == []


def make_tokenizer():
    from kd_llm.tokenizers import train_tokenizer

    return train_tokenizer(["alpha beta gamma delta epsilon"] * 9, 300, "wordpiece", 32)


# ---------------------------------------------------------------- runs


def sentences(folder, count=60):
    """A task that has an answer: whether a review holds more good words than bad ones; and text about nothing."""
    draw = random.Random(0)
    good, bad, rest = ["good", "fine", "great"], ["bad", "poor", "awful"], ["film", "plot", "the", "a", "is", "of"]
    folder.mkdir()
    for split, size in (("train", count), ("validation", 20), ("test", 20)):
        rows = []
        for _ in range(size):
            label = draw.randrange(2)
            words = draw.choices(rest, k=4) + draw.choices([bad, good][label], k=3)
            draw.shuffle(words)
            rows.append({"text": " ".join(words), "label": label})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [" ".join(draw.choices(good + bad + rest, k=40)) for _ in range(40)]
    (folder / "general.txt").write_text("\n\n".join(lines))


def run_config(folder, **changes):
    shape = {"model_type": "bert", "num_attention_heads": 2, "max_position_embeddings": 32}
    values = {
        "method": "ernie_tiny",
        "task": "classification",
        "tokenizer": {"kind": "wordpiece", "vocab_size": 300},
        "teacher": {
            "config": {**shape, "hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 32},
            "train": {"steps": 3, "batch_size": 8, "optimizer": {"name": "adamw", "lr": 1e-3}},
        },
        "student": {"config": {**shape, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 16}},
        "data": {"name": "jsonl", "root": str(folder), "length": 18},
        "method_args": {
            "general": [{"name": "text", "root": str(folder / "general.txt")}],
            "finetune": {"steps": 4, "batch_size": 8, "optimizer": {"name": "adamw", "lr": 1e-3}},
            "stages": {name: {"steps": 3, "lr": 1e-3} for name in ("GD", "GED", "TAD", "TSD")},
        },
        "train": {
            "steps": 3,
            "batch_size": 8,
            "log_every": 1,
            "checkpoint_every": 2,
            "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01},
            "schedule": {"name": "linear"},
        },
    }
    from kdcore.config import override

    return config_of(get("ernie_tiny"), override(values, changes))


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    sentences(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.slow
def test_a_run_of_four_stages(texts, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from kdcore.run import load_run, train

    config, folder = run_config(texts), tmp_path / "run"
    metrics = train(e.METHOD, config, folder, quiet=True, cpu=True)
    finished = list(json.loads((folder / "stages.json").read_text()))
    assert finished == ["tokenizer", "pretrained", "teacher", "GD", "GED", "TAD", "TSD", "boundaries"]
    rows = json.loads((folder / "stages_table.json").read_text())
    e.check_table(rows)
    assert [row["stage"] for row in rows] == ["GD", "GED", "TAD", "TSD"]
    assert [row["changes"] for row in rows] == [[], ["teacher"], ["data"], ["loss"]]
    assert len({row["teacher"] for row in rows}) == len({row["data"] for row in rows}) == 2
    for name in ("GD", "GED", "TAD", "TSD"):
        assert metrics[f"latent_task/{name}"] > 0
    assert metrics["jump/TAD"] == pytest.approx(0, abs=1e-9)
    assert metrics["jumps"] == pytest.approx(sum(metrics[f"jump/{n}"] for n in ("GD", "GED", "TAD")))
    assert 0 <= metrics["student/accuracy"] <= 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {stage: [x for x in lines if x["stage"] == stage and x["kind"] == "train"] for stage in finished}
    assert [list(logged[n][0]["terms"]) for n in ("GD", "TSD")] == [
        ["embeddings", "hidden", "attention"],
        ["embeddings", "hidden", "attention", "soft", "hard"],
    ]
    assert [line["lr"] for line in logged["GED"]] == [line["lr"] for line in logged["TAD"]]  # each starts anew
    # The head is untouched until TSD; W goes on and is not shipped.
    heads = [load_file(folder / n / "model.safetensors")["classifier.weight"] for n in ("gd", "ged", "tad", "student")]
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[1], heads[2])
    assert not torch.equal(heads[2], heads[3])
    maps = [load_file(folder / f"{n}_maps.safetensors") for n in ("gd", "ged", "tad", "tsd")]
    assert maps[0].keys() == {"hidden.weight", "embedding.weight"}
    assert not any(torch.equal(a["hidden.weight"], b["hidden.weight"]) for a, b in pairwise(maps))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert model(**tokenizer("the film is good", return_tensors="pt")).logits.shape == (1, 2)
    assert load_file(folder / "student" / "model.safetensors").keys() == model.state_dict().keys()  # and nothing else
    _, _, artefacts = load_run(folder)
    assert len(e.METHOD.predict(config, artefacts, 3)) == 3
    # A second run takes both teachers and GD from the cache; another budget of TSD does not change that.
    said = tmp_path / "second"
    train(e.METHOD, run_config(texts, **{"method_args.stages.TSD.steps": 2}), said, quiet=True, cpu=True)
    again = [json.loads(line)["stage"] for line in (said / "metrics.jsonl").read_text().splitlines()]
    assert set(again) == {"GED", "TAD", "TSD"}


@pytest.mark.slow
def test_the_maps_of_a_stage_start_where_the_one_before_ended(texts, tmp_path):
    """A stage of one step with a vanishing rate leaves student and maps as they were."""
    from safetensors.torch import load_file

    from kdcore.run import train

    config = run_config(texts, **{"method_args.stages.GED": {"steps": 1, "lr": 1e-30}})
    train(e.METHOD, config, tmp_path / "run", quiet=True, cpu=True)
    before, after = (load_file(tmp_path / "run" / f"{n}_maps.safetensors") for n in ("gd", "ged"))
    assert all(torch.equal(before[k], after[k]) for k in before)
    before, after = (load_file(tmp_path / "run" / n / "model.safetensors") for n in ("gd", "ged"))
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.slow
def test_a_student_without_latent_losses_is_finetuned(texts, tmp_path):
    from kdcore.run import train

    changes = {
        "method_args.stages": {"TSD": {"steps": 3}},
        "method_args.latent_weight": 0,
        "method_args.soft_weight": 0,
    }
    metrics = train(e.METHOD, run_config(texts, **changes), tmp_path / "run", quiet=True, cpu=True)
    assert "jumps" not in metrics
    (row,) = json.loads((tmp_path / "run" / "stages_table.json").read_text())
    assert row["loss"] == ["hard"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.config.num_attention_heads": 4}, "num_attention_heads = 4: the teacher has 2"),
        ({"student.config.num_hidden_layers": 3}, "not a multiple of the student's 3"),
        ({"task": "masked"}, "give task: classification"),
        ({"student.adapters": {"rank": 2}}, "leave them out"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_trains(texts, tmp_path, changes, message):
    from kdcore.run import check

    with pytest.raises(InputError, match=message):
        check(e.METHOD, run_config(texts, **changes), tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()


def test_general_text_that_is_the_task_is_refused(texts, tmp_path):
    from kdcore.run import check

    same = {"method_args.general": [{"name": "jsonl", "root": str(texts), "length": 18}]}
    with pytest.raises(InputError, match="from GED to TAD nothing changes"):
        check(e.METHOD, run_config(texts, **same), tmp_path / "run", cpu=True)


def test_arms_of_the_small_config_have_the_same_number_of_steps():
    from kdcore.config import read_yaml
    from kdcore.method import arm_config, find_config

    values = read_yaml(find_config("ernie_tiny/small"))
    _, config = load_config("ernie_tiny/small")
    arms = [config, *(arm_config(values, arm)[1] for arm in config.compare.values())]
    assert len({sum(stage.steps for stage in arm.method_args.stages.values()) for arm in arms}) == 1
