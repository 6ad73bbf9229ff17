"""Layer maps, attention scores rebuilt from tapped projections, latent losses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_llm.engine.encoder import (
    EncoderLayers,
    LatentLoss,
    attention_mse,
    attention_probabilities,
    attention_scores,
    layer_map,
    position_mse,
)
from kdcore.errors import InputError


def bert(layers=2, size=12, heads=3, seed=0, model_type="bert", **fields):
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=20,
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=16,
        max_position_embeddings=16,
        **fields,
    )
    return AutoModel.from_config(config).double()


def batch(rows=3, length=6, padding=0):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 20, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    ids[0, 4:] = 0
    return torch.nn.functional.pad(ids, (0, padding)), torch.nn.functional.pad(mask, (0, padding))


# ---------------------------------------------------------------- maps


def test_the_uniform_map_takes_every_third_of_twelve_layers():
    assert layer_map(4, 12) == (0, 3, 6, 9, 12)
    assert layer_map(6, 12) == (0, 2, 4, 6, 8, 10, 12)


def test_a_number_of_layers_that_does_not_divide_needs_a_rule():
    with pytest.raises(InputError, match="multiple of the student's 5"):
        layer_map(5, 12)
    assert layer_map(5, 12, "nearest") == (0, 2, 5, 7, 10, 12)
    assert layer_map(5, 12, "top") == (0, 8, 9, 10, 11, 12)
    with pytest.raises(InputError, match="student of 5 and a teacher of 4"):
        layer_map(5, 4)


@given(st.integers(1, 12), st.integers(0, 12), st.sampled_from(["nearest", "top"]))
def test_every_map_rises_to_the_last_layer(student, more, rule):
    mapped = layer_map(student, student + more, rule)
    assert mapped[0] == 0
    assert mapped[-1] == student + more
    assert all(a < b for a, b in pairwise(mapped))


# ---------------------------------------------------------------- losses on tensors


def test_attention_mse_by_hand():
    teacher, student = torch.tensor([[1.0, 0.0], [2.0, -1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert attention_mse(student[None, None], teacher[None, None], torch.ones(1, 2, dtype=torch.bool)) == 1.5


def test_padded_pairs_do_not_count_whatever_they_hold():
    student, teacher = torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
    teacher[..., 2] = -torch.inf
    student[..., 2, :] = torch.finfo(torch.float32).min
    mask = torch.tensor([[True, True, False]])
    assert attention_mse(student, teacher, mask) == 1.0
    assert position_mse(torch.zeros(1, 3, 2), torch.tensor([[[1.0, 1], [3, 3], [9, 9]]]), mask) == 5.0


def test_gradients_of_the_tensor_losses():
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    q, k = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    target = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    for form in (lambda s: s, lambda s: attention_probabilities(s, mask)):
        assert torch.autograd.gradcheck(
            lambda q, k, form=form: attention_mse(form(attention_scores(q, k, 2)), target, mask), (q, k)
        )


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "ernie"])
def test_probabilities_of_rebuilt_scores_are_those_of_the_model(model_type):
    extra = {"embedding_size": 12} if model_type == "electra" else {}
    model = bert(model_type=model_type, attn_implementation="eager", pad_token_id=0, **extra).eval()
    ids, mask = batch()
    layers = EncoderLayers.of(model)
    with layers.tap(model, [1, 2], attention=True) as tap, torch.no_grad():
        output = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    for m in (1, 2):
        rebuilt = attention_probabilities(attention_scores(tap[f"query.{m}"], tap[f"key.{m}"], 3), mask.bool())
        torch.testing.assert_close(rebuilt, output.attentions[m - 1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(tap[f"hidden.{m}"], output.hidden_states[m])


def test_distilbert_has_its_own_names():
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=20, dim=12, n_layers=2, n_heads=3, hidden_dim=16, max_position_embeddings=16)
    layers = EncoderLayers.of(DistilBertModel(config))
    assert layers.heads == 3
    assert layers.hidden_size == 12
    assert layers.queries == ("transformer.layer.0.attention.q_lin", "transformer.layer.1.attention.q_lin")


def test_models_whose_scores_cannot_be_rebuilt_are_refused():
    from transformers import GPT2Config, GPT2Model, MPNetConfig, MPNetModel

    small = {"vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}
    mpnet = MPNetModel(MPNetConfig(**small, intermediate_size=16))
    with pytest.raises(InputError, match="'mpnet' are more than query times key"):
        EncoderLayers.of(mpnet, field="teacher")
    assert EncoderLayers.of(mpnet, attention=False).heads == 3
    with pytest.raises(InputError, match="student: GPT2Model has no layers with query"):
        EncoderLayers.of(GPT2Model(GPT2Config(vocab_size=20, n_embd=12, n_layer=1, n_head=3)), field="student")


# ---------------------------------------------------------------- L_lat


def latent(student, teacher, ids, mask, **options):
    loss = LatentLoss(EncoderLayers.of(student), EncoderLayers.of(teacher), **options).double()
    of_student, of_teacher = loss.taps(student, teacher)
    with of_student, of_teacher:
        student(ids, attention_mask=mask)
        with torch.no_grad():
            teacher(ids, attention_mask=mask)
    return loss, loss(of_student, of_teacher, mask)


def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient():
    teacher = bert().eval()
    student = bert().eval()
    student.load_state_dict(teacher.state_dict())
    loss, terms = latent(student, teacher, *batch())
    assert list(terms) == ["embeddings", "hidden", "attention"]
    total = sum(terms.values())
    assert total.item() == pytest.approx(0.0, abs=1e-24)
    total.backward()
    for parameter in [*student.parameters(), *loss.parameters()]:
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-9


def test_options_leave_terms_out():
    teacher, student = bert(4, 12, 3, seed=1).eval(), bert(2, 6, 3).eval()
    ids, mask = batch()
    _, full = latent(student, teacher, ids, mask)
    assert all(value > 0 for value in full.values())
    _, terms = latent(student, teacher, ids, mask, attention="none", embeddings=False)
    assert list(terms) == ["hidden"]
    torch.manual_seed(0)
    loss, last = latent(student, teacher, ids, mask, last_layer_only=True, rule="top")
    assert loss.pairs == [(0, 0), (2, 4)]
    torch.manual_seed(0)
    loss, both = latent(student, teacher, ids, mask, rule="top")
    assert loss.pairs == [(0, 0), (1, 3), (2, 4)]
    assert last["attention"] < both["attention"]
    _, probabilities = latent(student, teacher, ids, mask, attention="probabilities")
    assert 0 < probabilities["attention"] != full["attention"]


@pytest.mark.parametrize("attention", ["scores", "probabilities"])
def test_longer_padding_changes_nothing(attention):
    found = []
    for padding in (0, 5):
        teacher, student = bert(4, 12, 3, seed=1).eval(), bert(2, 6, 3).eval()
        torch.manual_seed(3)
        loss, terms = latent(student, teacher, *batch(padding=padding), attention=attention)
        sum(terms.values()).backward()
        gradients = [p.grad for p in [*student.parameters(), *loss.parameters()] if p.grad is not None]
        found.append([*terms.values(), *gradients])
    assert len(found[0]) > 20
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_teacher_gets_no_gradient():
    teacher, student = bert(4, 12, 3, seed=1).eval(), bert(2, 6, 3).train()
    _, terms = latent(student, teacher, *batch())
    sum(terms.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.encoder.layer[0].attention.self.query.weight.grad is not None


def test_head_counts_must_agree_for_attention():
    layers = EncoderLayers.of(bert(2, 12, 4)), EncoderLayers.of(bert(2, 12, 3))
    with pytest.raises(InputError, match=r"student\.num_attention_heads = 4: the teacher has 3"):
        LatentLoss(*layers)
    LatentLoss(*layers, attention="none")
    _, mask = batch()
    with pytest.raises(InputError, match="4 heads over 6 positions, teacher 3"):
        attention_mse(torch.zeros(3, 4, 6, 6), torch.zeros(3, 3, 6, 6), mask.bool())
