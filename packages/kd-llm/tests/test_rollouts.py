"""Sampling of responses and their mixing into training batches, on tiny GPT-2 models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_llm.engine.onpolicy import IGNORE, OnPolicy, OnPolicyConfig, prompts_of, with_responses, with_targets
from kd_llm.engine.rollouts import (
    HFRollouts,
    Rollout,
    Sampling,
    VLLMRollouts,
    draw,
    filtered_probabilities,
    uniforms,
)
from kdcore.errors import InputError, RunFailed

VOCABULARY, EOS, PAD = 13, 1, 0
TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)


def tiny_model(seed: int = 0, **changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=EOS, eos_token_id=EOS
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # far from uniform, so that a wrong position or mask shows
        for parameter in model.parameters():
            parameter.mul_(3)
    for key, value in changes.items():
        setattr(model.generation_config, key, value)
    return model


PROMPTS = [torch.tensor([4, 5]), torch.tensor([6, 7, 8, 9, 10]), torch.tensor([3])]


# ---------------------------------------------------------------- drawing


def test_draws_on_an_even_grid_have_the_exact_frequencies():
    p = torch.tensor([0.125, 0.0, 0.5, 0.25, 0.125, 0.0], dtype=torch.float64)
    u = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    tokens = draw(p.repeat(800, 1), u)
    assert torch.bincount(tokens, minlength=6).tolist() == [100, 0, 400, 200, 100, 0]


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=9), st.floats(0, 1, exclude_max=True))
def test_a_draw_has_probability(logits, u):
    p = torch.tensor([logits], dtype=torch.float64).softmax(1)
    p[0, 0] = 0  # a filtered token
    assert p[0, draw(p, torch.tensor([u], dtype=torch.float64))] > 0


def test_the_last_uniform_number_draws_the_last_possible_token():
    p = torch.tensor([[0.3, 0.7, 0.0]], dtype=torch.float64)
    assert draw(p, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 1


def test_filters_are_temperature_then_top_k_then_top_p():
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    z = p.log()
    assert torch.allclose(filtered_probabilities(z, Sampling()), p)
    squared = p**2 / (p**2).sum()
    assert torch.allclose(filtered_probabilities(z, Sampling(temperature=0.5)), squared)
    top_two = torch.tensor([[4 / 7, 3 / 7, 0, 0]], dtype=torch.float64)
    assert torch.allclose(filtered_probabilities(z, Sampling(top_k=2)), top_two)
    assert torch.allclose(filtered_probabilities(z, Sampling(top_p=0.6)), top_two)  # 0.4 is short of 0.6, 0.7 is not
    # At top_k = 3 the masses are 4/9, 3/9, 2/9: top-p 0.75 now needs two tokens and not three.
    assert torch.allclose(filtered_probabilities(z, Sampling(top_k=3, top_p=0.75)), top_two)
    assert filtered_probabilities(z, Sampling(temperature=0)).tolist() == [[1, 0, 0, 0]]
    assert filtered_probabilities(z, Sampling(top_p=1e-9)).tolist() == [[1, 0, 0, 0]]


def test_sampling_refuses_what_has_no_meaning():
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**bad)


def test_uniforms_depend_on_seed_and_row_alone():
    a = uniforms(7, [0, 1, 2], 5)
    assert torch.equal(a[[2, 0]], uniforms(7, [2, 0], 5))
    assert not torch.equal(a, uniforms(8, [0, 1, 2], 5))


# ---------------------------------------------------------------- transformers


def test_responses_do_not_depend_on_the_batches_or_the_global_generators():
    model, sampling = tiny_model(), Sampling(max_new_tokens=9)
    torch.manual_seed(1)
    together = HFRollouts(TOKENIZER).generate(model, PROMPTS, 3, sampling, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    alone = HFRollouts(TOKENIZER, batch_size=1).generate(model, PROMPTS, 3, sampling, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert len(together) == 9
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.allclose(a.logp, b.logp, atol=1e-4)
    assert [r.ids[: r.completion_start].tolist() for r in together] == [p.tolist() for p in PROMPTS for _ in range(3)]
    other = HFRollouts(TOKENIZER).generate(model, PROMPTS, 3, sampling, seed=6)
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(together, other, strict=True))


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=7), Sampling(temperature=1.3, top_k=5, max_new_tokens=7)])
def test_log_probabilities_are_those_of_one_forward_pass(sampling):
    model = tiny_model().eval()
    for rollout in HFRollouts(TOKENIZER).generate(model, PROMPTS, 4, sampling, seed=0):
        with torch.no_grad():
            logits = model(rollout.ids[None]).logits[0, rollout.completion_start - 1 : -1]
        q = filtered_probabilities(logits, sampling)
        expected = q.gather(1, rollout.completion[:, None]).log().squeeze(1).float()
        assert torch.allclose(rollout.logp, expected, atol=1e-4)


def test_frequencies_of_the_first_token_are_the_models():
    model = tiny_model().eval()
    made = HFRollouts(TOKENIZER, batch_size=4096).generate(model, [PROMPTS[0]], 4000, Sampling(max_new_tokens=1), 3)
    with torch.no_grad():
        p = model(PROMPTS[0][None]).logits[0, -1].double().softmax(0)
    counts = torch.bincount(torch.stack([r.completion[0] for r in made]), minlength=VOCABULARY)
    deviation = (counts / 4000 - p).abs() / (p * (1 - p) / 4000).sqrt()
    assert deviation.max() < 5  # standard deviations, of a fixed seed


def test_a_response_ends_with_its_end_token_or_is_cut():
    model = tiny_model()
    made = HFRollouts(TOKENIZER).generate(model, PROMPTS, 20, Sampling(max_new_tokens=6), seed=0)
    assert {r.finished for r in made} == {True, False}
    for rollout in made:
        ends = (rollout.completion == EOS).nonzero().flatten().tolist()
        assert ends == ([len(rollout.completion) - 1] if rollout.finished else [])
        assert rollout.finished or len(rollout.completion) == 6
        assert len(rollout.logp) == len(rollout.completion)


def test_training_flags_and_the_generation_config_are_restored():
    model = tiny_model(repetition_penalty=5.0, top_k=1, do_sample=True).train()
    model.transformer.h[0].eval()
    before, config = [m.training for m in model.modules()], model.generation_config
    made = HFRollouts(TOKENIZER).generate(model, PROMPTS, 2, Sampling(max_new_tokens=8), seed=5)
    assert [m.training for m in model.modules()] == before
    assert model.generation_config is config
    plain = HFRollouts(TOKENIZER).generate(tiny_model(), PROMPTS, 2, Sampling(max_new_tokens=8), seed=5)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(made, plain, strict=True)), "a default of the checkpoint leaks"


def test_adapters_take_part_in_the_responses():
    from peft import LoraConfig, get_peft_model

    plain = HFRollouts(TOKENIZER).generate(tiny_model(), PROMPTS, 4, Sampling(max_new_tokens=8), seed=5)
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    same = HFRollouts(TOKENIZER).generate(adapted, PROMPTS, 4, Sampling(max_new_tokens=8), seed=5)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(plain, same, strict=True))  # LoRA starts at zero
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    changed = HFRollouts(TOKENIZER).generate(adapted, PROMPTS, 4, Sampling(max_new_tokens=8), seed=5)
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(plain, changed, strict=True))


def test_bad_input_is_named():
    model, rollouts, sampling = tiny_model(), HFRollouts(TOKENIZER), Sampling(max_new_tokens=8)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        rollouts.generate(model, [PROMPTS[0], torch.tensor([], dtype=torch.int64)], 1, sampling, 0)
    with pytest.raises(InputError, match="32 positions"):
        rollouts.generate(model, [torch.full((25,), 3)], 1, sampling, 0)
    with pytest.raises(InputError, match="n = 0"):
        rollouts.generate(model, PROMPTS, 0, sampling, 0)
    nameless = SimpleNamespace(eos_token_id=None, pad_token_id=None)
    with pytest.raises(InputError, match="end token"):
        HFRollouts(nameless).generate(tiny_model(eos_token_id=None), PROMPTS, 1, sampling, 0)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="not finite"):
        rollouts.generate(model, PROMPTS, 1, sampling, 0)


# ---------------------------------------------------------------- encoder-decoders


def encoder_decoder(kind: str, seed: int = 0):
    """A T5 (relative positions) or a BART (absolute ones), and its tokenizer's special tokens."""
    from kd_llm.testing import tiny_model as any_model

    model = any_model(kind, seed=seed)
    return model, SimpleNamespace(eos_token_id=model.config.eos_token_id, pad_token_id=0)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_answers_what_its_encoder_reads(kind):
    """The tokens' probabilities are those of a training's forward pass, however the prompts are padded."""
    model, special = encoder_decoder(kind)
    model.train()
    prompts, sampling = [torch.tensor([4, 5]), torch.tensor([6, 7, 8, 9, 10])], Sampling(max_new_tokens=7, top_k=40)
    together = HFRollouts(special).generate(model, prompts, 6, sampling, seed=5)
    alone = HFRollouts(special, batch_size=1).generate(model, prompts, 6, sampling, seed=5)
    assert model.training
    model.eval()
    for number, (a, b) in enumerate(zip(together, alone, strict=True)):
        assert torch.equal(a.ids, b.ids)
        assert a.ids[: a.completion_start].tolist() == prompts[number // 6].tolist()
        with torch.no_grad():
            start = model.prepare_decoder_input_ids_from_labels(labels=a.completion[None])
            logits = model(input_ids=prompts[number // 6][None], decoder_input_ids=start).logits[0]
        expected = filtered_probabilities(logits, sampling).gather(1, a.completion[:, None]).log().squeeze(1).float()
        torch.testing.assert_close(a.logp, expected, rtol=1e-4, atol=1e-4)
        assert a.finished == (a.completion[-1].item() == special.eos_token_id)
    assert len({len(a.logp) for a in together}) > 1
    assert len({tuple(a.completion.tolist()) for a in together}) > 6


def test_what_an_encoder_decoder_cannot_sample_is_named():
    model, special = encoder_decoder("bart")
    with pytest.raises(InputError, match="64 positions each"):
        HFRollouts(special).generate(model, [torch.tensor([4])], 1, Sampling(max_new_tokens=65), 0)
    made = HFRollouts(special).generate(model, [torch.full((60,), 4)], 1, Sampling(max_new_tokens=10), 0)
    assert len(made) == 1  # the two together are more, and need not fit
    model.config.decoder_start_token_id = None
    with pytest.raises(InputError, match="bart has no decoder_start_token_id"):
        HFRollouts(special).generate(model, [torch.tensor([4])], 1, Sampling(max_new_tokens=5), 0)


def test_responses_become_the_targets_of_a_decoder_and_its_inputs_stay():
    batch = {
        "input_ids": torch.tensor([[4, 5, 0], [6, 7, 8]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "labels": torch.tensor([[9, 1], [9, 1]]),
        "decoder_input_ids": torch.zeros(2, 2, dtype=torch.int64),
        "kd_weight": torch.tensor([1.0, 2.0]),
    }
    model, _ = encoder_decoder("t5")
    echo = Echo()
    (made,) = OnPolicy(echo, OnPolicyConfig(), seed=0, pad=PAD)(model, [batch], 0)
    assert echo.calls[0][0] == 2
    assert made["labels"].tolist() == [[5, 4, -100], [8, 7, 6]]
    assert "decoder_input_ids" not in made
    assert all(made[key] is batch[key] for key in ("input_ids", "attention_mask", "kd_weight"))
    assert batch["labels"].tolist() == [[9, 1], [9, 1]]
    with pytest.raises(InputError, match="spans"):
        OnPolicy(echo, OnPolicyConfig(), seed=0, pad=PAD)(model, [{**batch, "spans": batch["labels"]}], 0)
    short = with_targets(batch, [Rollout(torch.tensor([4, 5, 2]), 2, torch.zeros(1), False)] * 2)
    assert short["labels"].tolist() == [[2], [2]]


def test_on_policy_training_of_an_encoder_decoder(tmp_path):
    """A step's loss is the reverse KL on the responses that the student gives before it; equal runs are equal."""
    from transformers import TrainingArguments

    from kd_llm.engine.objective import DivergenceArgs, TokenObjective
    from kd_llm.engine.teachers import LocalTeacher
    from kd_llm.integrations.trainer import DistillTrainer
    from kd_llm.testing import collate

    rows = [{"input_ids": [4 + i, 9, 12][: 1 + i % 3], "labels": [5, 1], "example": i} for i in range(8)]

    def batches(some):
        batch = collate([{**row, "labels": row["input_ids"]} for row in some])
        return {**batch, "labels": torch.tensor([row["labels"] for row in some])}

    found = []
    for name in ("a", "b"):
        student, special = encoder_decoder("t5", seed=1)
        teacher, losses = encoder_decoder("t5", seed=2)[0], []
        mixing = OnPolicy(HFRollouts(special), OnPolicyConfig(sampling=Sampling(max_new_tokens=4)), seed=3, pad=PAD)

        def hook(model, window, step, mixing=mixing, teacher=teacher, losses=losses):
            window = mixing(model, window, step)
            assert any(batch["labels"].shape != (2, 2) for batch in window)
            total, tokens = 0.0, 0
            for batch in window:
                inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
                with torch.no_grad():
                    z, t = (m(**inputs).logits.log_softmax(-1)[batch["labels"] != IGNORE] for m in (model, teacher))
                total, tokens = total + float((z.exp() * (z - t)).sum()), tokens + len(z)
            losses.append(total / tokens)
            return window

        args = TrainingArguments(
            str(tmp_path / name), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            logging_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        objective = TokenObjective(LocalTeacher(teacher), DivergenceArgs(divergence="reverse"))
        student.config.dropout_rate = 0.0
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = DistillTrainer(
            student, args, objective=objective, train_dataset=rows, data_collator=batches, window_hook=hook
        )
        trainer.train()
        logged = [line["term/soft"] for line in trainer.state.log_history if "term/soft" in line]
        assert logged == pytest.approx(losses, rel=1e-4)
        found.append(student.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


# ---------------------------------------------------------------- vLLM


def test_vllm_is_asked_for_clearly():
    with pytest.raises(InputError, match="vllm is not installed"):
        VLLMRollouts("folder")


class FakeVLLM:
    """The part of vllm's interface that is used, answering with the prompt's last token and an end token."""

    def __init__(self, **arguments):
        self.arguments, self.loaded, self.resets = arguments, {}, 0
        engine = SimpleNamespace(load_weights=lambda weights: self.loaded.update(weights))
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=engine))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, inputs, parameters, use_tqdm):
        self.seeds = [p.seed for p in parameters]
        made = []
        for item in inputs:
            tokens = [item["prompt_token_ids"][-1], EOS]
            logprobs = [{token: SimpleNamespace(logprob=-0.5)} for token in tokens]
            made.append(SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="stop"))
        return [SimpleNamespace(outputs=[output]) for output in made]


def test_vllm_rollouts_and_weights(monkeypatch):
    import importlib.util

    from peft import LoraConfig, get_peft_model

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    fake = SimpleNamespace(LLM=FakeVLLM, SamplingParams=lambda **k: SimpleNamespace(**k), __spec__=object())
    monkeypatch.setitem(sys.modules, "vllm", fake)
    assert importlib.util.find_spec("vllm") is not None
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    rollouts = VLLMRollouts("folder", eos=[EOS], gpu_memory_utilization=0.3)
    assert rollouts.llm.arguments["gpu_memory_utilization"] == 0.3
    made = rollouts.generate(tiny_model(), PROMPTS, 2, Sampling(max_new_tokens=4), seed=1)
    assert [r.completion.tolist() for r in made] == [[5, EOS]] * 2 + [[10, EOS]] * 2 + [[3, EOS]] * 2
    assert made[0].logp.tolist() == [-0.5, -0.5]
    assert made[0].finished
    assert len(set(rollouts.llm.seeds)) == 6

    with pytest.raises(InputError, match="vllm serves no t5"):
        rollouts.generate(encoder_decoder("t5")[0], PROMPTS, 1, Sampling(), seed=1)

    base = tiny_model()
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    name = "transformer.h.0.attn.c_attn.weight"
    before = tiny_model().state_dict()
    rollouts.sync(adapted)
    assert set(rollouts.llm.loaded) == set(before), "names as the checkpoint has them"
    assert not torch.allclose(rollouts.llm.loaded[name], before[name])  # the merged weights
    assert torch.allclose(base.transformer.h[0].attn.c_attn.base_layer.weight, before[name], atol=1e-5)
    assert rollouts.llm.resets == 1


def test_a_vllm_engine_starts_from_the_student_whatever_made_it(monkeypatch, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from kd_llm.networks import student_rollouts
    from kd_llm.tokenizers import train_tokenizer

    fake = SimpleNamespace(LLM=FakeVLLM, SamplingParams=lambda **k: SimpleNamespace(**k), __spec__=object())
    monkeypatch.setitem(sys.modules, "vllm", fake)
    base, accelerator = tiny_model(), SimpleNamespace(wait_for_everyone=lambda: None)
    expected = {name: value.clone() for name, value in base.state_dict().items()}
    student = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    networks = SimpleNamespace(
        student=student,
        tokenizer=train_tokenizer(["a b"] * 9, 300),
        context=SimpleNamespace(folder=tmp_path, is_main=True, accelerator=accelerator),
    )
    assert isinstance(student_rollouts("transformers", {}, networks), HFRollouts)
    made = student_rollouts("vllm", {"max_model_len": 64}, networks)
    assert made.llm.arguments["max_model_len"] == 64
    assert made.llm.arguments["model"] == str(tmp_path / "rollouts")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "rollouts").state_dict()
    assert opened.keys() == expected.keys()
    assert all(torch.equal(opened[name], value) for name, value in expected.items())


# ---------------------------------------------------------------- mixing


def batch_of(rows, **extra):
    """Rows of (prompt, response) padded on the right."""
    width = max(len(p) + len(r) for p, r in rows)
    ids = torch.full((len(rows), width), PAD)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for i, (p, r) in enumerate(rows):
        ids[i, : len(p) + len(r)], mask[i, : len(p) + len(r)] = torch.tensor([*p, *r]), 1
        labels[i, len(p) : len(p) + len(r)] = torch.tensor(r) if r else labels[i, :0]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **extra}


class Echo:
    """Answers with the reversed prompt and counts its calls."""

    def __init__(self):
        self.calls = []

    def generate(self, model, prompts, n, sampling, seed):
        self.calls.append((len(prompts), seed))
        return [
            Rollout(torch.cat([p, p.flip(0)]), len(p), torch.full((len(p),), -0.25), finished=len(p) < 3)
            for p in prompts
            for _ in range(n)
        ]

    def sync(self, model):
        self.synced = model


def test_prompts_are_what_precedes_the_first_label():
    batch = batch_of([([3, 4], [5, 1]), ([6], [7, 8, 1]), ([9, 9, 9], [])])
    assert [p.tolist() for p in prompts_of(batch)] == [[3, 4], [6], [9, 9, 9]]
    left = {k: v.flip(1) for k, v in batch_of([([2, 2], [])]).items()}
    assert prompts_of(left)[0].tolist() == [2, 2]


def test_text_without_prompts_needs_prompt_tokens():
    batch = batch_of([([], [5, 6, 7, 1])])
    with pytest.raises(InputError, match="prompt_tokens"):
        prompts_of(batch)
    assert prompts_of(batch, 3)[0].tolist() == [5, 6, 7]
    with pytest.raises(InputError, match="position_ids"):
        prompts_of({**batch, "position_ids": batch["input_ids"]})


def test_responses_replace_those_of_the_data_and_other_columns_stay():
    weight = torch.tensor([0.5, 2.0])
    batch = batch_of([([3, 4], [5, 1]), ([6, 7, 8], [1])], kd_weight=weight)
    echo = Echo()
    mixing = OnPolicy(echo, OnPolicyConfig(), seed=0, pad=PAD)
    (made,) = mixing("student", [batch], 4)
    assert made["input_ids"].tolist() == [[3, 4, 4, 3, 0, 0], [6, 7, 8, 8, 7, 6]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert made["labels"].tolist() == [[-100, -100, 4, 3, -100, -100], [-100, -100, -100, 8, 7, 6]]
    assert made["kd_weight"] is weight
    assert echo.synced == "student"
    assert mixing.statistics() == {
        "rollout/share": 1.0,
        "rollout/truncated": 0.5,
        "rollout/length": 2.5,
        "rollout/entropy": 0.25,
    }
    assert mixing.statistics() == {"rollout/share": 0.0}


def test_one_generate_call_serves_a_window_and_seeds_follow_the_step():
    window = [batch_of([([3, 4], [5, 1])]) for _ in range(4)]
    echo = Echo()
    mixing = OnPolicy(echo, OnPolicyConfig(), seed=0, pad=PAD)
    mixing(None, window, 0)
    mixing(None, window, 1)
    mixing(None, window, 1)
    assert [calls for calls, _ in echo.calls] == [4, 4, 4]
    seeds = [seed for _, seed in echo.calls]
    assert seeds[0] != seeds[1] == seeds[2]
    other = OnPolicy(echo, OnPolicyConfig(), seed=0, pad=PAD, rank=1)
    other(None, window, 1)
    assert echo.calls[-1][1] != seeds[1]


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**31 - 1))
def test_the_share_of_on_policy_batches_is_lmbda(lmbda, seed):
    mixing = OnPolicy(Echo(), OnPolicyConfig(lmbda=lmbda), seed=seed, pad=PAD, rank=seed % 3)
    share = sum(mixing.chosen(step, j) for step in range(250) for j in range(4)) / 1000
    assert abs(share - lmbda) < 5 * max((lmbda * (1 - lmbda) / 1000) ** 0.5, 1e-3)


def test_at_lmbda_0_nothing_is_generated():
    window = [batch_of([([3, 4], [5, 1])])]
    echo = Echo()
    (same,) = OnPolicy(echo, OnPolicyConfig(lmbda=0.0), seed=0, pad=PAD)(None, window, 0)
    assert same is window[0]
    assert echo.calls == []


def test_with_responses_keeps_the_batch_itself_unchanged():
    batch = batch_of([([3, 4], [5, 1])])
    copy = {key: value.clone() for key, value in batch.items()}
    with_responses(batch, Echo().generate(None, prompts_of(batch), 1, Sampling(), 0), PAD)
    assert all(torch.equal(batch[key], copy[key]) for key in copy)


# ---------------------------------------------------------------- in a training


class Interrupted(Exception):
    pass


def on_policy_training(folder, *, resume=False, stop_after=None):
    """Six steps of reverse KL on the student's own responses, two micro-batches each, with dropout; a folder."""
    from kd_llm.engine.objective import DivergenceArgs, TokenObjective
    from kd_llm.engine.teachers import LocalTeacher
    from kd_llm.integrations.stage import LMSetup, TransformersStage
    from kd_llm.testing import collate, examples
    from kdcore.accelerator import make_accelerator
    from kdcore.config import RunConfig, TrainConfig
    from kdcore.stages import RunContext

    train = TrainConfig(
        steps=6, batch_size=4, accumulation=2, optimizer={"name": "adamw", "lr": 0.01}, checkpoint_every=2, log_every=1
    )
    folder.mkdir(exist_ok=True)
    accelerator = make_accelerator(train, cpu=True, folder=folder)
    context = RunContext(RunConfig(method="toy", train=train), folder, accelerator, resume=resume, quiet=True)
    config = OnPolicyConfig(lmbda=0.7, sampling=Sampling(max_new_tokens=5))
    mixing = OnPolicy(HFRollouts(TOKENIZER), config, seed=3, pad=PAD)

    def hook(model, window, step):
        if stop_after is not None and step == stop_after:
            raise Interrupted
        return mixing(model, window, step)

    def build(_):
        objective = TokenObjective(LocalTeacher(tiny_model(seed=1)), DivergenceArgs(divergence="reverse"))
        rows = [{**row, "input_ids": [i % VOCABULARY for i in row["input_ids"]]} for row in examples(16)]
        rows = [{**row, "labels": [-100, -100, *row["input_ids"][2:]]} for row in rows]
        return LMSetup(tiny_model(seed=2), None, objective, rows, collate, window_hook=hook)

    TransformersStage("student", train, build).run(context)
    return folder / "student" / "model.safetensors"


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path):
    from safetensors.torch import load_file

    whole = load_file(on_policy_training(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        on_policy_training(tmp_path / "cut", stop_after=5)
    resumed = load_file(on_policy_training(tmp_path / "cut", resume=True))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    start = tiny_model(seed=2).state_dict()
    assert any(not torch.equal(whole[key], start[key]) for key in whole)


@pytest.mark.slow
def test_a_sharded_model_samples_what_the_whole_one_does():
    script = Path(__file__).with_name("sharded_rollouts.py")
    launch = [*(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(script)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
