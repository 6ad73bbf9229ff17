"""Semantic revision: DAC-KL, spans, SCRG, the source of responses, and the objective in training."""

from __future__ import annotations

import importlib.util
import math
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kd_llm.engine.chunked import HeadRows
from kd_llm.engine.objective import StudentCall
from kd_llm.engine.replay import AdaptiveProbability, OffPolicyConfig, ReplayBuffer, StudentResponses, continued
from kd_llm.engine.revision import Reviser, error_position
from kd_llm.engine.rollouts import HFRollouts, Rollout, Sampling
from kd_llm.engine.spans import neighbours, rows_of
from kd_llm.engine.teachers import LocalTeacher
from kd_llm.methods.semantic_revision import (
    ClipConfig,
    ClipNetwork,
    SemanticRevision,
    SemanticRevisionConfig,
    clipped_kl,
    kept_set,
    span_products,
)
from kd_llm.testing import VOCABULARY, collate, examples, tiny_model
from kdcore.config import parse
from kdcore.errors import InputError

P = torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]], dtype=torch.float64)
Q = torch.tensor([[0.3, 0.3, 0.2, 0.1, 0.1]], dtype=torch.float64)


def edges(low, high, rows=1):
    return torch.full((rows,), low, dtype=torch.float64), torch.full((rows,), high, dtype=torch.float64)


def tokenizer():
    """61 one-letter words and signs, with blanks between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *string.ascii_letters, *",.;:!?"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert len(words) == VOCABULARY
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


class Scripted:
    """Responses from a list; what was asked is recorded."""

    def __init__(self, answers=(), eos=2):
        self.answers, self.eos, self.asked = list(answers), eos, []

    def generate(self, model, prompts, n, sampling, seed):
        self.asked.append(([p.tolist() for p in prompts], sampling.max_new_tokens, seed))
        return [
            rollout(p.tolist(), self.answers.pop(0)[: sampling.max_new_tokens], self.eos)
            for p in prompts
            for _ in range(n)
        ]

    def sync(self, model):
        """The model samples itself."""


def rollout(prompt, completion, eos=2):
    ids = torch.tensor([*prompt, *completion])
    return Rollout(ids, len(prompt), torch.full((len(completion),), -0.5), bool(completion) and completion[-1] == eos)


# ---------------------------------------------------------------- DAC-KL


def test_everything_kept_is_forward_kl_with_its_gradient():
    torch.manual_seed(0)
    z = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    t = torch.randn(4, 9, dtype=torch.float64)
    mask = kept_set(t, torch.zeros(4, dtype=torch.int64), *edges(0.0, 1.0, 4), 1)
    assert mask.sum() == mask.numel()
    value = clipped_kl(z, t, mask)
    p, q = t.softmax(1), z.softmax(1)
    torch.testing.assert_close(value, (p * (p / q).log()).sum(1))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(gradient, (q - p).detach())


def test_one_kept_class_has_no_loss():
    mask = kept_set(P, torch.tensor([0]), *edges(0.95, 1.0), 1)
    assert mask.tolist() == [[1, 0, 0, 0, 0]]
    assert clipped_kl(Q.log(), P.log(), mask).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("target", "expected"), [(0, 0.071194430), (1, 0.002282181)])
def test_value_by_hand(target, expected):
    mask = kept_set(P, torch.tensor([target]), *edges(0.3, 0.9), 0)
    assert mask.tolist() == [[float(target == 0), 1, 1, 1, 0]]
    assert clipped_kl(Q.log(), P.log(), mask).item() == pytest.approx(expected, abs=5e-10)
    full = clipped_kl(Q.log(), P.log(), torch.ones_like(P))
    assert full.item() == pytest.approx(0.105593682, abs=5e-10)


@given(st.integers(0, 10_000), st.floats(0, 0.9), st.integers(1, 4))
def test_gradient_is_the_difference_inside_the_set_and_zero_outside(seed, low, k_min):
    generator = torch.Generator().manual_seed(seed)
    z, t = (3 * torch.randn(3, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    z.requires_grad_()
    target = torch.randint(8, (3,), generator=generator)
    mask = kept_set(t, target, *edges(low, 0.95, 3), k_min)
    value = clipped_kl(z, t, mask)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    p, q = (x.detach().softmax(1) * mask for x in (t, z))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    torch.testing.assert_close(gradient, q - p)
    assert gradient[mask == 0].abs().sum() == 0
    assert (value > -1e-12).all()
    assert (mask.sum(1) >= k_min).all()
    assert mask.gather(1, target[:, None]).min() == 1


def test_the_least_kept_mass_is_reached_with_the_fewest_tokens_whatever_the_band():
    nothing = edges(1.0, 1.0)
    for least, kept in ((0.0, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.9, 3), (0.99, 5)):
        mask = kept_set(P.log(), torch.tensor([0]), *nothing, 1, min_mass=least)
        assert mask.sum() == kept, least
        assert (P * mask).sum() >= least
    generator = torch.Generator().manual_seed(0)
    t = 3 * torch.randn(50, 40, dtype=torch.float64, generator=generator)
    mask = kept_set(t, t.argmax(1), *edges(1.0, 1.0, 50), 1, min_mass=0.9)
    mass = (t.softmax(1) * mask).sum(1)
    last = t.masked_fill(mask == 0, torch.inf).argmin(1, keepdim=True)
    assert (mass >= 0.9).all()
    assert (mass - t.softmax(1).gather(1, last).squeeze(1) < 0.9).all()


@pytest.mark.parametrize(
    ("mode", "expected"), [("renormalised", 0.000093), ("truncated", -0.137406), ("tail", 0.139853)]
)
def test_what_the_modes_say_of_the_rest(mode, expected):
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.6, 0.35, 0.03, 0.02]], dtype=torch.float64)
    mask, z = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64), q.log().requires_grad_()
    value = clipped_kl(z, p.log(), mask, mode)
    assert value.item() == pytest.approx(expected, abs=5e-7)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    P, Q = 0.8, 0.95
    wanted = {
        "renormalised": (q / Q - p / P) * mask,
        "truncated": P * q - p * mask,
        "tail": torch.where(mask == 1, q - p, q * (1 - (1 - P) / (1 - Q))),
    }[mode]
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
    full = (p * (p / q).log()).sum()
    everything = clipped_kl(q.log(), p.log(), torch.ones_like(p), mode).sum()
    torch.testing.assert_close(everything, full, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", ["tail", "truncated"])
def test_the_edges_learn_in_every_mode(mode):
    """The loss has its derivative in the mask, which is what f gets."""
    loose = torch.tensor([[0.95, 0.95, 0.05, 0.95, 0.05]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: clipped_kl(Q.log(), P.log(), m, mode), (loose,))


def test_a_tiny_kept_mass_of_the_student_is_finite():
    z = torch.tensor([[0.0, -200.0, -201.0]], requires_grad=True)
    mask = torch.tensor([[0.0, 1.0, 1.0]])
    value = clipped_kl(z, torch.tensor([[0.0, 1.0, 1.0]]), mask)
    value.sum().backward()
    q = torch.tensor([-200.0, -201.0]).softmax(0)
    assert value.item() == pytest.approx((0.5 * (0.5 / q).log()).sum().item(), rel=1e-5)
    assert torch.isfinite(z.grad).all()


def test_the_edges_get_the_gradient_of_the_soft_band_alone():
    """The straight-through estimate against central differences of the loss with the soft mask in the hard one's place.

    At a point where the soft mask of every class is at 0 or 1 but one, whose value is the hard one plus a constant.
    """
    softness = 0.02
    low = torch.tensor([0.42], dtype=torch.float64, requires_grad=True)
    high = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    mask = kept_set(P, torch.tensor([0]), low, high, 1, softness)
    assert mask.tolist() == [[1, 1, 1, 0, 0]]
    loss = clipped_kl(Q.log(), P.log(), mask).sum()
    d_low, d_high = torch.autograd.grad(loss, [low, high])

    def shifted(change):
        """Hard mask plus how much the soft one has moved since (0.42, 0.9): what straight-through differentiates."""
        rho = torch.tensor([[1.0, 0.8, 0.6, 0.4, 0.2]], dtype=torch.float64)

        def soft(l, u):
            return torch.sigmoid((rho - l) / softness) * torch.sigmoid((u - rho) / softness)

        moved = soft(0.42 + change[0], 0.9 + change[1]) - soft(0.42, 0.9)
        moved[:, 0] = 0  # forced
        return clipped_kl(Q.log(), P.log(), mask.detach() + moved).item()

    h = 1e-6
    assert d_low.item() == pytest.approx((shifted((h, 0)) - shifted((-h, 0))) / (2 * h), rel=1e-5)
    assert d_high.item() == pytest.approx((shifted((0, h)) - shifted((0, -h))) / (2 * h), rel=1e-5)
    assert d_low.abs() > 1e-3


def test_edges_stay_apart_and_the_network_sees_constants():
    torch.manual_seed(0)
    network = ClipNetwork(4, ClipConfig()).double()
    z = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    low, high = network(z, torch.randn(5, 9, dtype=torch.float64))
    assert ((low > 0) & (low < high) & (high < 1)).all()
    assert torch.autograd.grad(low.sum() + high.sum(), z, allow_unused=True) == (None,)
    assert [layer.out_features for layer in network.layers if isinstance(layer, nn.Linear)] == [64, 2]


# ---------------------------------------------------------------- spans


def test_span_products_by_hand():
    p = torch.tensor([[0.5, 0.5], [0.8, 0.2]], dtype=torch.float64)
    q = torch.tensor([[0.6, 0.4], [0.5, 0.5]], dtype=torch.float64)
    assert span_products(q.log(), p.log(), torch.tensor([0]), torch.tensor([1])).item() == pytest.approx(0.02)


def test_span_products_do_not_depend_on_the_order_of_the_vocabulary():
    torch.manual_seed(1)
    z, t = torch.randn(2, 4, 7, dtype=torch.float64)
    order, first = torch.randperm(7), torch.tensor([0, 2])
    torch.testing.assert_close(
        span_products(z, t, first, first + 1), span_products(z[:, order], t[:, order], first, first + 1)
    )
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: span_products(z, t, first, first + 1), (z,))


def test_neighbours_lie_in_one_chunk_and_one_token_has_none():
    assert neighbours([[(3, 5)], [(1, 1)], [(0, 1), (0, 1)]]).tolist() == [[0, 3], [0, 4], [2, 0]]
    assert neighbours([[], []]).shape == (0, 2)


def test_pairs_are_found_among_the_predicting_rows():
    index = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 0], [1, 2]])  # they predict positions 2, 3, 4 and 1, 3
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4], [1, 1], [1, 2]])
    first, second = rows_of(pairs, index, 1)
    assert first.tolist() == [0, 1]
    assert second.tolist() == [1, 2]
    assert rows_of(pairs, index[:0], 1)[0].shape == (0,)
    assert rows_of(pairs[:0], index, 1)[0].shape == (0,)


# ---------------------------------------------------------------- SCRG

TEACHER = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.05, 0.05, 0.9]], dtype=torch.float64)
STUDENT = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.4, 0.3, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)


class Fixed(Reviser):
    """A reviser whose view of the responses is given."""

    def __init__(self, views, answers, limit=8, eos=(9,)):
        self.source = Scripted(answers, eos=eos[0])
        super().__init__(self.source, None, Sampling(max_new_tokens=limit), pad=0, eos=eos)
        self.given = views

    def views(self, student, made):
        return self.given


def by_hand():
    divergence = (TEACHER * (TEACHER / STUDENT).log()).sum(1)
    return TEACHER.argmax(1), divergence


def test_the_error_is_the_largest_divergence_among_disagreements():
    teacher, divergence = by_hand()
    assert teacher.tolist() == [0, 1, 2, 2]
    assert divergence.tolist() == pytest.approx([0.0268, 0.6055, 0.0288, 0.0367], abs=5e-5)
    tokens = torch.tensor([1, 0, 2, 0])
    assert (tokens != teacher).nonzero().flatten().tolist() == [0, 1, 3]
    assert error_position(tokens, teacher, divergence) == 1
    assert error_position(teacher, teacher, divergence) is None
    assert error_position(torch.tensor([1, 1, 2, 0]), teacher, divergence) == 3  # the largest D is where both agree


def test_revision_keeps_the_prefix_and_regenerates_the_rest():
    revise = Fixed([by_hand()], [[7, 8, 9]])
    before = rollout([5, 6], [1, 0, 2, 0])
    (after,) = revise(nn.Module(), [before], 3)
    assert after.ids.tolist() == [5, 6, 1, 1, 7, 8, 9]
    assert after.completion_start == 2
    assert after.finished
    assert torch.equal(after.logp[:1], before.logp[:1])
    assert len(after.logp) == 5
    assert revise.source.asked[0][:2] == ([[5, 6, 1, 1]], 6)


def test_agreement_costs_no_generation_and_the_length_has_a_limit():
    teacher, divergence = by_hand()
    agreeing = Fixed([(teacher, divergence)], [])
    before = rollout([5], teacher.tolist())
    assert agreeing(nn.Module(), [before], 0)[0] is before
    assert agreeing.source.asked == []
    last = Fixed([(torch.tensor([0, 0, 0, 2]), torch.arange(4.0))], [], limit=4)
    (full,) = last(nn.Module(), [rollout([5], [0, 0, 0, 1])], 0)
    assert full.ids.tolist() == [5, 0, 0, 0, 2]
    assert not full.finished
    ends = Fixed([(torch.tensor([9, 0]), torch.ones(2))], [])
    (ended,) = ends(nn.Module(), [rollout([5], [0, 0])], 0)
    assert ended.ids.tolist() == [5, 9]
    assert ended.finished
    assert last.source.asked == ends.source.asked == []


def test_different_positions_share_a_call_and_each_keeps_its_limit():
    views = [(torch.tensor([4, 4, 4]), torch.tensor([1.0, 0, 0])), (torch.tensor([4, 4, 4]), torch.tensor([0, 0, 1.0]))]
    revise = Fixed(views, [[7] * 9, [8] * 9], limit=4)
    first, second = revise(nn.Module(), [rollout([5], [1, 1, 1]), rollout([6], [1, 1, 1])], 0)
    # The shorter room comes first in the call.
    assert len(revise.source.asked) == 1
    assert first.ids.tolist() == [5, 4, 8, 8, 8]
    assert second.ids.tolist() == [6, 1, 1, 4, 7]
    assert not first.finished


def test_continuations_that_do_not_fit_one_call_are_split():
    model = nn.Module()
    model.config = type("Config", (), {"max_position_embeddings": 6})()
    source = Scripted([[1] * 9] * 3)
    made = continued(source, model, [torch.arange(1), torch.arange(5)], [5, 1], Sampling(), 0)
    assert [len(r.logp) for r in made] == [5, 1]
    assert [asked[1] for asked in source.asked] == [1, 5]


def test_a_student_that_is_the_teacher_is_never_corrected_on_greedy_samples():
    model = tiny_model("gpt2").eval()
    source = HFRollouts(tokenizer())
    greedy = Sampling(temperature=0, max_new_tokens=6)
    made = source.generate(model, [torch.tensor([4, 5]), torch.tensor([6, 7, 8])], 1, greedy, 0)
    reviser = Reviser(source, LocalTeacher(tiny_model("gpt2")), greedy, pad=0, eos=[2])
    for one, (tokens, divergence) in zip(made, reviser.views(model, made), strict=True):
        assert torch.equal(tokens, one.completion)
        assert divergence.abs().max() < 1e-5
    assert all(a is b for a, b in zip(reviser(model, made, 1), made, strict=True))


def test_views_are_those_of_the_full_logits():
    student, teacher = tiny_model("gpt2").eval(), tiny_model("gpt2", seed=1).eval()
    reviser = Reviser(HFRollouts(tokenizer()), LocalTeacher(teacher), Sampling(), pad=0, eos=[2])
    made = [rollout([4, 5], [9, 10, 11, 2]), rollout([6], [12, 13])]
    for one, (tokens, divergence) in zip(made, reviser.views(student, made), strict=True):
        with torch.no_grad():
            p, q = (
                m(one.ids[None]).logits[0, one.completion_start - 1 : -1].log_softmax(1) for m in (teacher, student)
            )
        assert torch.equal(tokens, p.argmax(1))
        torch.testing.assert_close(divergence, (p.exp() * (p - q)).sum(1), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- where responses come from


def test_the_probability_rises_with_the_validation_loss_only():
    phi = AdaptiveProbability(OffPolicyConfig(initial=0.85, increment=0.1, tolerance=0.1))
    seen = []
    for loss in (2.0, 1.0, 2.05, 2.2, 2.25, 3.0):
        phi.observe(loss)
        seen.append(round(phi.value, 6))
    assert seen == [0.85, 0.85, 0.85, 0.95, 0.95, 1.0]
    assert phi.reference == 3.0


def test_sources_are_chosen_by_one_draw():
    phi = AdaptiveProbability(OffPolicyConfig(initial=0.5))
    assert phi.source(0.5, 0.0, full=True) == "data"
    assert phi.source(0.49, 0.0, full=True) == "fresh"
    assert phi.source(0.49, 0.5, full=True) == "replay"
    assert phi.source(0.24, 0.5, full=True) == "fresh"
    assert phi.source(0.49, 1.0, full=False) == "fresh"
    grows = AdaptiveProbability(OffPolicyConfig(initial=0.5, ratio="increasing"))
    assert grows.source(0.1, 0.0, full=True) == "replay"


def test_the_buffer_keeps_the_newest_and_comes_back_from_its_state():
    buffer = ReplayBuffer(3)
    buffer.add(rollout(list(range(3, 4 + k)), [5] * (k + 1) + [2]) for k in range(5))
    assert len(buffer) == 3
    assert buffer.full
    again = ReplayBuffer(3)
    again.load_state(buffer.state())
    for a, b in zip(buffer.items, again.items, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.logp, b.logp)
        assert (a.completion_start, a.finished) == (b.completion_start, b.finished)
    assert [r.ids.tolist() for r in again.sample(2, 7)] == [r.ids.tolist() for r in buffer.sample(2, 7)]
    with pytest.raises(InputError, match="4 rollouts wanted of 3"):
        buffer.sample(4, 0)
    empty = ReplayBuffer(2)
    empty.load_state(ReplayBuffer(2).state())
    assert len(empty) == 0


def responses(**config):
    source = Scripted([[20 + k, 2] for k in range(50)])
    made = StudentResponses(source, OffPolicyConfig(**config), Sampling(max_new_tokens=4), seed=5)
    made.steps = 10
    return made, source


def test_new_samples_fill_the_buffer_and_then_alternate_with_it():
    chosen, source = responses(initial=1.0, capacity=8)
    batches = [collate(examples(4, seed=s)) for s in range(2)]
    first = chosen.choose(nn.Module(), batches, 0)
    assert len(source.asked) == 1  # one call for the window
    assert [len(some) for some in first] == [4, 4]
    assert chosen.buffer.full
    last = chosen.choose(nn.Module(), batches, 10)  # the whole budget is done: nothing new
    assert len(source.asked) == 1
    held = {tuple(r.ids.tolist()) for r in chosen.buffer.items}
    assert all(tuple(r.ids.tolist()) in held for some in last for r in some)
    none, _ = responses(initial=0.0)
    assert none.choose(nn.Module(), batches, 0) == [None, None]


def test_choices_depend_on_seed_and_step_alone():
    one, _ = responses(initial=0.5, capacity=1000)
    two, _ = responses(initial=0.5, capacity=1000)
    batches = [collate(examples(2, seed=s)) for s in range(6)]
    a = [some is None for some in one.choose(nn.Module(), batches, 2)]
    two.choose(nn.Module(), batches, 1)
    assert a == [some is None for some in two.choose(nn.Module(), batches, 2)]
    assert len(set(a)) == 2


# ---------------------------------------------------------------- the objective


def texts(count, seed=0):
    """Examples whose text ends: a chunk at an end that is none would count as cut."""
    rows = examples(count, seed=seed)
    return collate([{**row, "input_ids": [*row["input_ids"], 2], "labels": [*row["labels"], 2]} for row in rows])


def objective(teacher=None, source=None, double=True, **args):
    teacher = teacher if teacher is not None else tiny_model("gpt2", seed=1)
    args = {"off_policy": {"initial": 0.0}, "chunker": "words", **args}
    config = parse(SemanticRevisionConfig, args)
    made = SemanticRevision(
        LocalTeacher(teacher.double() if double else teacher),
        config,
        rollouts=source or Scripted(),
        tokenizer=tokenizer(),
        seed=1,
    )
    return made.double() if double else made


def terms_of(made, student, batch):
    made.prepare(student)
    (batch,) = made.window(student, [batch], 0)
    call = StudentCall(student, made.shift, student.forward)
    return made.loss(call, batch, None)


def reference(student, teacher, batch, mask):
    """The three terms by full logits: cross-entropy, clipped KL with a given mask function, span products."""
    keep = batch["labels"][:, 1:] != -100
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    z = student(**inputs).logits[:, :-1]
    with torch.no_grad():
        t = teacher(**inputs).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    sft = nn.functional.cross_entropy(z[keep], labels[keep])
    dac = clipped_kl(z[keep], t[keep], mask(t[keep], labels[keep])).mean()
    t5n, values = tokenizer(), []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        learned = [i for i in range(len(ids)) if batch["labels"][row, i] != -100]
        words = [t5n.convert_ids_to_tokens(i) for i in ids]
        for i in learned[:-1]:
            if words[i].isalpha() and words[i + 1].isalpha():
                p, q = t[row].softmax(1), z[row].softmax(1)
                values.append((p[i - 1] * p[i] - q[i - 1] * q[i]).square().sum())
    return sft, dac, torch.stack(values).mean()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.5, 0.9)])
def test_the_terms_on_the_data_are_those_of_the_full_logits(bounds, monkeypatch):
    from kd_llm.engine import chunked

    monkeypatch.setitem(chunked.BLOCK_BYTES, "cpu", 8 * VOCABULARY)  # several blocks
    student, teacher = tiny_model("gpt2").double().eval(), tiny_model("gpt2", seed=1).double().eval()
    batch = texts(6, seed=2)
    made = objective(teacher, clip={"bounds": list(bounds), "k_min": 2, "min_mass": 0.0})
    assert not list(made.auxiliary.parameters())
    terms = terms_of(made, student, batch)
    assert list(terms) == ["sft", "dac", "span", "kept_share", "kept_mass", "student_share"]
    expected = reference(
        student, teacher, batch, lambda t, y: kept_set(t, y, *(e.to(t) for e in edges(*bounds, len(t))), 2)
    )
    for name, value in zip(("sft", "dac", "span"), expected, strict=True):
        torch.testing.assert_close(terms[name][1], value.to(terms[name][1].dtype), rtol=1e-5, atol=1e-7)
    found = torch.autograd.grad(terms.total(), list(student.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(sum(expected), list(student.parameters()), allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    share = terms["kept_share"][1].item()
    assert share == pytest.approx(1.0) if bounds == (0.0, 1.0) else 0.4 < share < 0.6
    assert 0 < terms["kept_mass"][1].item() <= 1 + 1e-6


def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient_but_the_labels():
    student, teacher = tiny_model("gpt2").double().eval(), tiny_model("gpt2").double()
    terms = terms_of(objective(teacher, sft_weight=0.0), student, collate(examples(4)))
    assert terms["dac"][1].item() == pytest.approx(0, abs=1e-12)
    assert terms["span"][1].item() == pytest.approx(0, abs=1e-12)
    terms.total().backward()
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-8


def test_the_teacher_gets_no_gradient_and_the_network_gets_one_from_dac_alone():
    student, teacher = tiny_model("gpt2").double(), tiny_model("gpt2", seed=1).double()
    batch = collate(examples(6))
    made = objective(teacher, clip={"softness": 0.1, "k_min": 1, "min_mass": 0.0})
    terms = terms_of(made, student, batch)
    parameters = list(made.auxiliary.parameters())
    for name, wanted in (("sft", False), ("dac", True), ("span", False)):
        gradients = torch.autograd.grad(terms[name][1], parameters, allow_unused=True, retain_graph=True)
        assert any(g is not None and g.abs().max() > 0 for g in gradients) == wanted, name
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_responses_of_the_student_replace_the_data_in_two_terms():
    student, teacher = tiny_model("gpt2").double().eval(), tiny_model("gpt2", seed=1).double().eval()
    batch = collate(examples(2, prompt=2))
    answers = [[10, 11, 12, 2], [13, 55, 14]]
    source = Scripted([list(a) for a in answers])
    made = objective(
        teacher,
        source,
        frequency=0,
        off_policy={"initial": 1.0},
        clip={"bounds": [0, 1]},
        sampling={"max_new_tokens": 4},
    )
    terms = terms_of(made, student, batch)
    rows = [
        {"input_ids": [*ids[:2], *a], "labels": [-100, -100, *a], "example": 0}
        for ids, a in zip(batch["input_ids"].tolist(), answers, strict=True)
    ]
    own = collate(rows)
    _, dac, span = reference(student, teacher, own, lambda t, y: torch.ones_like(t))
    sft, _, _ = reference(student, teacher, batch, lambda t, y: torch.ones_like(t))
    for name, value in {"sft": sft, "dac": dac, "span": span}.items():
        torch.testing.assert_close(terms[name][1], value.to(terms[name][1].dtype), rtol=1e-5, atol=1e-7)
    assert terms["student_share"][1].item() == 1


def test_micro_batches_add_up_to_the_step():
    student, teacher = tiny_model("gpt2").double().eval(), tiny_model("gpt2", seed=1).double().eval()
    rows = examples(6, seed=3)
    made = objective(teacher, clip={"bounds": [0.3, 1]})
    whole = terms_of(made, student, collate(rows))
    parts = made.window(student, [collate(rows[:1]), collate(rows[1:])], 0)
    items = sum(made.count(b) for b in parts)
    call = StudentCall(student, made.shift, student.forward)
    added = [made.loss(call, part, items) for part in parts]
    for name in ("sft", "dac", "span", "kept_share", "kept_mass"):
        torch.testing.assert_close(added[0][name][1] + added[1][name][1], whole[name][1], rtol=1e-6, atol=1e-9)


def test_no_logits_of_all_rows_are_made(monkeypatch):
    """The largest float tensor with a vocabulary dimension holds a block of rows, not all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from kd_llm.engine import chunked

    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 8 * VOCABULARY * 4)
    monkeypatch.setitem(chunked.BLOCK_BYTES, "cpu", 4 * VOCABULARY * 2)

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] == VOCABULARY and x.is_floating_point():
                    Largest.rows = max(Largest.rows, x.numel() // VOCABULARY)
            return out

    student = tiny_model("gpt2")
    made = objective(double=False, sft_weight=0.0)
    made.prepare(student)
    batches = made.window(student, [collate(examples(8, seed=2))], 0)
    assert int(made.count(batches[0])) > 30
    call = StudentCall(student, made.shift, student.forward)
    with Largest():
        made.loss(call, batches[0], None).total().backward()
    assert 0 < Largest.rows <= 16  # the transposed head is (16, V); chunks are 4 rows


def test_padded_vocabularies_are_cut_and_other_tokenizers_refused():
    student, teacher = tiny_model("gpt2", vocab_size=70).double().eval(), tiny_model("gpt2", seed=1).double().eval()
    batch = texts(4)
    made = objective(teacher, clip={"bounds": [0, 1]})
    with pytest.raises(InputError, match="70 outputs, the teacher 61; give both tokenizers"):
        made.prepare(student)
    made.tokenizers = (tokenizer(), tokenizer())
    terms = terms_of(made, student, batch)
    keep = batch["labels"][:, 1:] != -100
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    z, t = (model(**inputs).logits[:, :-1][keep][:, :61] for model in (student, teacher))
    torch.testing.assert_close(terms["dac"][1], clipped_kl(z, t, torch.ones_like(t)).mean(), rtol=1e-6, atol=1e-9)

    class Other:
        def get_vocab(self):
            return {"x": 4}

    made.tokenizers = (tokenizer(), Other())
    with pytest.raises(InputError, match="Use sequence-level distillation"):
        made.prepare(student)


def test_the_teacher_must_give_whole_distributions():
    from kd_llm.engine.revision import sides

    student = tiny_model("gpt2")
    made = objective(double=False)
    made.prepare(student)
    rows = StudentCall(student, True, student.forward).hidden_rows(collate(examples(2)))
    with pytest.raises(InputError, match="needs the teacher's whole distribution"):
        sides(rows, None)
    mine, theirs = sides(rows, made.teacher.signal(collate(examples(2)), rows), vocabulary=50)
    assert isinstance(mine, HeadRows)
    assert len(mine.weight) == len(theirs.weight) == 50


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clip": {"bounds": [0.9, 0.2]}}, "allowed: 0 <= l < u <= 1"),
        ({"clip": {"l_max": 1.0, "u_min": 0.5}}, "must not be above u_min"),
        ({"clip": {"k_min": 0}}, "clip.k_min"),
        ({"sft_weight": 0, "dac_weight": 0, "span_weight": 0}, "are all 0"),
        ({"frequency": -1}, "frequency"),
        ({"off_policy": {"initial": 1.5}}, "off_policy.initial"),
        ({"chunker": "spacy"}, "chunker"),
    ],
)
def test_bad_arguments_are_named(values, message):
    with pytest.raises(InputError, match=message):
        parse(SemanticRevisionConfig, values)


# ---------------------------------------------------------------- training


def trainer(folder, steps=6, **extra):
    from transformers import TrainingArguments

    from kd_llm.integrations.trainer import DistillTrainer

    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        remove_unused_columns=False,
    )
    config = parse(
        SemanticRevisionConfig,
        {
            "chunker": "words",
            "sampling": {"max_new_tokens": 5},
            "off_policy": {"initial": 0.7, "every": 2, "tolerance": 0.0, "capacity": 12},
        },
    )
    student = tiny_model("gpt2", resid_pdrop=0.1)
    made = SemanticRevision(
        LocalTeacher(tiny_model("gpt2", seed=1)),
        config,
        rollouts=HFRollouts(tokenizer()),
        tokenizer=tokenizer(),
        seed=3,
        validation=[collate(examples(4, seed=9))],
    )
    return DistillTrainer(
        student, args, objective=made, train_dataset=examples(40, seed=4), data_collator=collate, **extra
    )


@pytest.mark.slow
def test_a_resumed_training_ends_with_the_same_weights_buffer_and_network(tmp_path):
    torch.manual_seed(0)
    whole = trainer(tmp_path / "a")
    whole.train()
    assert len(whole.objective.responses.buffer) > 0
    logged = [line for line in whole.state.log_history if "term/dac" in line]
    assert len(logged) == 6
    assert {line["term/student_share"] for line in logged} != {0.0}
    assert all(math.isfinite(line["loss"]) for line in logged)
    torch.manual_seed(1)  # f's first weights come from the checkpoint
    again = trainer(tmp_path / "a")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for a, b in zip(whole.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.objective.auxiliary.parameters(), again.objective.auxiliary.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.objective.responses.buffer.items, again.objective.responses.buffer.items, strict=True):
        assert torch.equal(a.ids, b.ids)
    assert whole.objective.responses.probability.value == again.objective.responses.probability.value
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "a" / "checkpoint-3" / "model.safetensors")
    assert not any("clip" in name for name in saved)


def test_a_chunk_that_the_end_has_cut_does_not_count():
    made = objective(double=False)
    made.prepare(tiny_model("gpt2"))
    whole, cut = (
        [{"input_ids": [5, 6, 7, 8, *end], "labels": [-100, 6, 7, 8, *end], "example": 0}] for end in ([2], [])
    )
    assert made.window(nn.Module(), [collate(whole)], 0)[0]["span_pairs"].tolist() == [[0, 1], [0, 2]]
    assert made.window(nn.Module(), [collate(cut)], 0)[0]["span_pairs"].tolist() == []


# ---------------------------------------------------------------- runs


def run_config(tmp_path, **changes):
    from kdcore.config import override
    from kdcore.method import config_of, get

    shape = {"model_type": "llama", "num_attention_heads": 2, "max_position_embeddings": 64}
    budget = {"steps": 3, "batch_size": 8, "optimizer": {"name": "adamw", "lr": 1e-2}}
    values = {
        "method": "semantic_revision",
        "tokenizer": {"vocab_size": 300},
        "teacher": {
            "config": {**shape, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16},
            "train": budget,
        },
        "student": {"config": {**shape, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}},
        "data": {"name": "text", "root": str(tmp_path / "text.txt"), "length": 24, "prompt_tokens": 6},
        "method_args": {
            "sft": budget,
            "chunker": "words",
            "sampling": {"max_new_tokens": 6},
            "off_policy": {"initial": 1.0, "every": 2, "capacity": 16},
        },
        "train": {**budget, "steps": 4, "log_every": 1},
    }
    words = "Now is the winter of our discontent, made glorious summer by this sun of York. "
    lines = [f"{words[i % 40 :]}{i} {words[: 20 + i % 30]}" for i in range(80)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    return config_of(get("semantic_revision"), override(values, changes))


@pytest.mark.slow
def test_a_run_from_text_to_a_stock_student(tmp_path, monkeypatch):
    import json

    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kd_llm.methods.semantic_revision import METHOD
    from kdcore.run import train

    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    metrics = train(METHOD, run_config(tmp_path), folder, quiet=True, cpu=True)
    assert list(json.loads((folder / "stages.json").read_text())) == ["tokenizer", "teacher", "sft", "student"]
    assert metrics["student/perplexity"] > 1
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    terms = [x["terms"] for x in lines if x["stage"] == "student" and x["kind"] == "train"]
    assert list(terms[0]) == ["sft", "dac", "span", "kept_share", "kept_mass", "student_share"]
    assert all(term["student_share"]["raw"] == pytest.approx(1) for term in terms)
    assert terms[0]["kept_share"]["raw"] > 0.48  # f starts at the middle
    for term in terms:
        assert 8 / 300 < term["kept_share"]["raw"] < 1 + 1e-6
        assert 0.9 <= term["kept_mass"]["raw"] < 1 + 1e-6
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert model(**tokenizer("Now is", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
    saved = load_file(folder / "student" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()  # and nothing of f


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "masked"}, "is for decoders"),
        ({"data.packing": True}, "replaced one by one"),
        ({"teacher.cache": "somewhere"}, "teacher.cache: the losses need"),
        ({"method_args.chunker": "nltk"}, "chunker = 'nltk'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_trains(tmp_path, changes, message):
    from kd_llm.methods.semantic_revision import METHOD
    from kdcore.run import check

    if "nltk" in message and importlib.util.find_spec("nltk") is not None:
        changes, message = {"method_args.chunker": "none"}, "chunker"
    with pytest.raises(InputError, match=message):
        check(METHOD, run_config(tmp_path, **changes), tmp_path / "run", cpu=True)
