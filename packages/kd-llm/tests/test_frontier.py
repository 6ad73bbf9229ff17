"""Weights by pass rate, pass rates, verifiers and the gradient diagnostic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_llm.engine.frontier import (
    Weighter,
    binned_snr,
    competence_weight,
    gradient_snr,
    normalised_over_step,
    pass_rate_bins,
    problem_gradients,
)
from kd_llm.engine.objective import DivergenceArgs, TokenObjective
from kd_llm.engine.passrate import BLOCK, PassRates, Sampler, answer_all, measure
from kd_llm.engine.rollouts import Rollout, Sampling
from kd_llm.engine.teachers import LocalTeacher
from kd_llm.engine.verifiers import final_answer, last_number, verifier
from kd_llm.testing import collate, examples, tiny_model
from kdcore.errors import InputError

EIGHTHS = torch.arange(9, dtype=torch.float64) / 8

# ---------------------------------------------------------------- weights


def test_weights_of_eight_samples():
    assert (competence_weight(EIGHTHS) * 64).tolist() == [0, 7, 12, 15, 16, 15, 12, 7, 0]


def test_peak_of_uneven_exponents():
    p = torch.linspace(0, 1, 30_001, dtype=torch.float64)
    w = competence_weight(p, 2.0, 1.0)
    assert p[w.argmax()].item() == pytest.approx(2 / 3, abs=1e-4)
    assert w.max().item() == pytest.approx(4 / 27, abs=1e-8)
    assert competence_weight(torch.tensor(2 / 3, dtype=torch.float64), 2.0, 1.0).item() == pytest.approx(0.148148148)


@given(st.floats(0.1, 5), st.floats(0.1, 5))
def test_peak_height(a, b):
    peak = competence_weight(torch.tensor(a / (a + b), dtype=torch.float64), a, b).item()
    assert peak == pytest.approx(a**a * b**b / (a + b) ** (a + b), rel=1e-9)


@pytest.mark.parametrize(("k", "expected"), [(4, 0.1575), (8, 0.18375)])
def test_bias_of_a_measured_weight(k, expected):
    p = 0.3
    mean = sum(
        math.comb(k, c) * p**c * (1 - p) ** (k - c) * competence_weight(torch.tensor(c / k, dtype=torch.float64)).item()
        for c in range(k + 1)
    )
    assert mean == pytest.approx(expected, abs=1e-12)
    assert expected == pytest.approx((1 - 1 / k) * p * (1 - p))


def test_exponents_of_0_weight_everything_alike():
    assert competence_weight(EIGHTHS, 0.0, 0.0).tolist() == [1.0] * 9
    assert Weighter("paced", a=0, b=0).weights(EIGHTHS).tolist() == Weighter("unweighted").weights(EIGHTHS).tolist()


def test_schemes():
    assert Weighter("filter", normalise="none").weights(EIGHTHS).tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]
    inverse = Weighter("inverse", normalise="none").weights(EIGHTHS)
    assert torch.equal(inverse, 1 - 4 * competence_weight(EIGHTHS))
    assert inverse[[0, 4, 8]].tolist() == [1, 0, 1]


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.sampled_from(["paced", "unweighted", "inverse"]))
def test_dataset_normalisation_has_mean_1_over_what_is_trained_on(counts, scheme):
    p = torch.tensor(counts, dtype=torch.float64) / 8
    weighter = Weighter(scheme)
    if not bool((weighter.raw(p) > 0).any()):
        with pytest.raises(InputError, match="every problem has weight 0"):
            weighter.weights(p)
        return
    w = weighter.weights(p)
    assert w[w > 0].mean().item() == pytest.approx(1.0)
    assert torch.equal(w == 0, weighter.raw(p) == 0)


def test_a_constant_factor_changes_nothing():
    class Scaled(Weighter):
        def raw(self, p):
            return 7.5 * super().raw(p)

    assert torch.allclose(Scaled().weights(EIGHTHS), Weighter().weights(EIGHTHS), rtol=1e-14)


def test_rows_of_weight_0_are_dropped_and_keep_their_key():
    rows = [{"example": i} for i in range(9)]
    made = Weighter().attach(rows, EIGHTHS)
    assert [row["example"] for row in made] == list(range(1, 8))
    assert made[3]["kd_weight"] / made[0]["kd_weight"] == pytest.approx(16 / 7)
    from datasets import Dataset

    again = Weighter().attach(Dataset.from_list(rows), EIGHTHS)
    assert again["kd_weight"] == [row["kd_weight"] for row in made]
    with pytest.raises(InputError, match="9 rows and 2 pass rates"):
        Weighter().attach(rows, EIGHTHS[:2])


def test_bad_rates_and_exponents():
    with pytest.raises(InputError, match="outside"):
        competence_weight(torch.tensor([1.5]))
    with pytest.raises(InputError, match="a = -1"):
        competence_weight(torch.tensor([0.5]), -1.0)


def test_step_normalisation_is_over_all_micro_batches():
    parts = [{"kd_weight": torch.tensor([1.0, 2.0])}, {"kd_weight": torch.tensor([0.0, 0.0, 7.0])}]
    first, second = normalised_over_step(parts)
    assert first["kd_weight"].tolist() == [0.5, 1.0]
    assert second["kd_weight"].tolist() == [0, 0, 3.5]
    (zero,) = normalised_over_step([{"kd_weight": torch.zeros(3)}])
    assert zero["kd_weight"].tolist() == [0, 0, 0]


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.floats(0, 2))
def test_efficiency_of_a_wrong_weight_is_bounded(seed, d):
    """r within e^-d .. e^d: (E[r s^2])^2 / (E[s^2] E[r^2 s^2]) >= 1 / cosh(d)^2."""
    generator = torch.Generator().manual_seed(seed)
    s2 = torch.rand(64, generator=generator, dtype=torch.float64)
    r = torch.exp(d * torch.where(torch.rand(64, generator=generator) < 0.5, -1.0, 1.0).double())
    if seed % 2:
        r = torch.exp(d * (2 * torch.rand(64, generator=generator, dtype=torch.float64) - 1))
    efficiency = (r * s2).mean() ** 2 / (s2.mean() * (r**2 * s2).mean())
    assert efficiency.item() >= 1 / math.cosh(d) ** 2 - 1e-12


# ---------------------------------------------------------------- weighted losses


def divergence_terms(kind, weights, batch, items=None, reduction="sequence"):
    student, teacher = tiny_model("gpt2", seed=1).double().eval(), tiny_model("gpt2", seed=2).double()
    objective = TokenObjective(LocalTeacher(teacher), DivergenceArgs(divergence=kind, reduction=reduction))
    objective.prepare(student)
    batch = batch if weights is None else {**batch, "kd_weight": torch.tensor(weights, dtype=torch.float64)}
    from kd_llm.engine.objective import StudentCall

    loss = objective.loss(StudentCall(student, True, student.forward), batch, items).total()
    loss.backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in student.parameters() if p.grad is not None])
    assert all(p.grad is None for p in teacher.parameters())
    return loss.detach(), gradient


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_weighted_loss_is_the_mean_of_weighted_sequence_means(kind):
    rows = examples(4)
    weights = [0.5, 0.0, 2.0, 1.5]
    whole, gradient = divergence_terms(kind, weights, collate(rows))
    alone = [divergence_terms(kind, None, collate([row])) for row in rows]
    expected = sum(w * value.item() for w, (value, _) in zip(weights, alone, strict=True)) / 4
    assert whole.item() == pytest.approx(expected)
    assert torch.allclose(gradient, sum(w * g for w, (_, g) in zip(weights, alone, strict=True)) / 4, atol=1e-12)


def test_problems_of_weight_0_contribute_nothing_and_weights_of_1_change_nothing():
    rows = examples(3)
    loss, gradient = divergence_terms("forward", [0.0, 0.0, 0.0], collate(rows))
    assert loss.item() == 0
    assert gradient.abs().max().item() == 0
    plain = divergence_terms("forward", None, collate(rows))
    ones = divergence_terms("forward", [1.0, 1.0, 1.0], collate(rows))
    assert plain[0].item() == ones[0].item()
    assert torch.equal(plain[1], ones[1])


# ---------------------------------------------------------------- diagnostic


def test_snr_is_its_formula():
    g = torch.randn(7, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3
    found, mean = gradient_snr(g), g.mean(0)
    noise = (g - mean).square().sum(1).mean()
    assert found.ratio == pytest.approx((mean.square().sum() / noise).item())
    assert found.norm == pytest.approx(g.norm(dim=1).mean().item())
    sigma = noise * 7 / 6
    assert found.unbiased == pytest.approx(((mean.square().sum() - sigma / 7) / sigma).item())


def test_unbiased_snr_of_pure_noise_is_about_0():
    generator = torch.Generator().manual_seed(1)
    values = [gradient_snr(torch.randn(8, 50, generator=generator)) for _ in range(200)]
    assert abs(sum(v.unbiased for v in values) / 200) < 0.01
    assert sum(v.ratio for v in values) / 200 > 0.1  # about 1/7: the floor that the correction takes away


def test_snr_needs_gradients():
    with pytest.raises(InputError, match="no gradient"):
        gradient_snr([])


def test_problem_gradients_are_those_of_backward():
    student, teacher = tiny_model("gpt2", seed=1).double(), tiny_model("gpt2", seed=2).double()
    objective = TokenObjective(LocalTeacher(teacher), DivergenceArgs(reduction="sequence"))
    objective.prepare(student)
    batches = [collate([row]) for row in examples(2)]
    found = list(problem_gradients(student, objective, batches))
    for batch, gradient in zip(batches, found, strict=True):
        expected = divergence_terms("forward", None, batch)[1]
        assert torch.allclose(gradient, expected, atol=1e-12)


def test_bins_of_eight_samples():
    assert pass_rate_bins(EIGHTHS).tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4]


def test_snr_by_bins_and_the_share_of_the_edges():
    rates = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 1.0], dtype=torch.float64)
    vectors = torch.eye(7, dtype=torch.float64) * torch.tensor([1.0, 1, 1, 1, 3, 3, 2], dtype=torch.float64)
    found, edge = binned_snr(rates, lambda chosen: vectors[chosen], 2, seed=0)
    assert {name: snr.n for name, snr in found.items()} == {"bin1": 2, "bin3": 2, "bin5": 1}
    assert found["bin3"].ratio == pytest.approx(1.0)  # mean (1.5, 1.5): 4.5 against (4.5 + 4.5) / 2
    assert edge == pytest.approx((4 * 1 + 2) / (4 * 1 + 2 * 3 + 2))  # two of the four stand for all of them


# ---------------------------------------------------------------- pass rates


class Decoder:
    """Token 10 + d is the digit d."""

    def batch_decode(self, ids, skip_special_tokens):
        return ["".join(str(i - 10) for i in row if i >= 10) for row in ids]


def response(*ids, finished=True):
    return Rollout(torch.tensor([3, *ids]), 1, torch.zeros(len(ids)), finished)


def test_a_cut_response_is_wrong_whatever_it_says():
    made = [[response(14, 1), response(14, finished=False), response(15, 1)], [response(11, 12, 1)] * 3]
    table = measure(made, ["4", "12"], verifier("exact"), Decoder())
    assert table.correct == [1, 3]
    assert table.truncated == [1, 0]
    assert table.rates.tolist() == [1 / 3, 1]
    assert table.truncation == 1 / 6
    assert table.tokens == (2 + 1 + 2 + 9) / 6
    with pytest.raises(InputError, match="1 problems, 2 answers"):
        measure(made[:1], ["4", "12"], verifier("exact"), Decoder())


class Source:
    """Responses that tell which seed and prompt they come from."""

    def __init__(self):
        self.calls = 0

    def sync(self, model):
        pass

    def generate(self, model, prompts, n, sampling, seed):
        self.calls += 1
        return [
            Rollout(torch.cat([p, torch.tensor([10 + (seed + k) % 10, 1])]), len(p), torch.zeros(2), True)
            for p in prompts
            for k in range(n)
        ]


def test_processes_share_the_blocks_without_changing_a_response(monkeypatch):
    prompts = [torch.tensor([i]) for i in range(2 * BLOCK + 5)]
    alone = answer_all(Source(), None, prompts, 2, Sampling(), 3)
    assert [len(some) for some in alone] == [2] * len(prompts)
    assert [some[1].ids[0].item() for some in alone] == list(range(len(prompts)))
    parts = []
    monkeypatch.setattr("accelerate.utils.gather_object", lambda items: parts.append(items) or items)
    for rank in (0, 1):
        try:
            answer_all(Source(), None, prompts, 2, Sampling(), 3, rank=rank, processes=2)
        except KeyError:
            continue  # the other process's blocks are not here
    together = dict([*parts[0], *parts[1]])
    for start, made in together.items():
        flat = [r for some in alone[start : start + BLOCK] for r in some]
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(made, flat, strict=True))
    assert sorted(together) == [0, BLOCK, 2 * BLOCK]


def test_pass_rates_are_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_CACHE", str(tmp_path))
    source, model, prompts = Source(), torch.nn.Linear(2, 2), [torch.tensor([3]), torch.tensor([4])]
    arguments = (model, prompts, ["4", "5"], verifier("exact"))
    sampler = Sampler(source, Decoder())
    first = sampler.pass_rates(*arguments, k=10, sampling=Sampling(), seed=1)
    assert first.correct == [1, 1]  # one in ten says each digit
    again = sampler.pass_rates(*arguments, k=10, sampling=Sampling(), seed=1)
    assert again == first
    assert source.calls == 1
    sampler.pass_rates(*arguments, k=10, sampling=Sampling(temperature=0.5), seed=1)
    sampler.pass_rates(*arguments, k=10, sampling=Sampling(), seed=2)
    with torch.no_grad():
        model.weight.add_(1)
    sampler.pass_rates(*arguments, k=10, sampling=Sampling(), seed=1)
    assert source.calls == 4
    made = sampler.responses(model, prompts, Sampling(), 3)
    again = sampler.responses(model, prompts, Sampling(), 3)
    assert source.calls == 5
    assert [r.ids.tolist() for r in made] == [r.ids.tolist() for r in again]
    assert [r.finished for r in again] == [True, True]
    for entry in (tmp_path / "responses").iterdir():  # cut off while it was copied
        entry.write_text(entry.read_text()[:20])
    assert [r.ids.tolist() for r in sampler.responses(model, prompts, Sampling(), 3)] == [r.ids.tolist() for r in made]
    assert source.calls == 6


def test_a_damaged_table_is_refused(tmp_path):
    path = tmp_path / "table.json"
    PassRates([1], [0], 8, 2.0).save(path, model="x")
    assert PassRates.load(path) == PassRates([1], [0], 8, 2.0)
    path.write_text('{"correct": [1], "truncated": [], "k": 8, "tokens": 1}')
    with pytest.raises(InputError, match="damaged"):
        PassRates.load(path)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        PassRates.load(path)


# ---------------------------------------------------------------- verifiers


def test_numbers_and_answers():
    assert verifier("exact")(" 12 ", "12")
    assert not verifier("exact")("12.0", "12")
    assert last_number("1,234.50 and -3/4") == last_number("-0.75")
    assert last_number("1/0 of") is None
    assert verifier("number")("the sum is 1,000", "1000")
    check = verifier("math")
    assert check(r"we get \boxed{\dfrac{3}{6}} at last", r"\frac{1}{2}")
    assert check(r"\boxed{1} and then \boxed{x^{2}+1}", "x^{2} + 1")
    assert not check("a long text that names 5 and nothing else of use at all", "6")
    assert check("a long text that ends in 5", "5")
    assert not check("", "5")
    assert final_answer(r"\boxed{unclosed") != "unclosed"


def test_verifiers_by_import_path():
    assert verifier("operator:eq")("a", "a")
    with pytest.raises(InputError, match="did you mean 'exact'"):
        verifier("exakt")
    with pytest.raises(InputError, match="cannot be imported"):
        verifier("operator:nothing")
    with pytest.raises(InputError, match="allowed: a function"):
        verifier("math:pi")
