"""Gradients per term, and their projection."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdcore.config import RunConfig, TrainConfig
from kdcore.distiller import Distiller, LossTerms
from kdcore.errors import InputError
from kdcore.gradients import dot, per_term_gradients, project_conflict, rule_backward
from kdcore.stages import RunContext
from kdcore.training import Loop, TrainSetup, make_accelerator


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def test_each_term_has_its_weighted_gradient_and_zeros_where_it_does_not_reach():
    a, b = parameters((2,), (3,))
    shared = a.sum()
    terms = LossTerms(
        both=(0.5, shared * b.sum()),
        alone=(2.0, (b**3).sum()),
        off=(0.0, (a * torch.nan).sum()),
        constant=(1.0, torch.tensor(4.0)),
    )
    found = per_term_gradients(terms, [a, b])
    assert list(found) == ["both", "alone", "off", "constant"]
    torch.testing.assert_close(found["both"][0], 0.5 * b.sum().detach().expand(2))
    torch.testing.assert_close(found["both"][1], 0.5 * a.sum().detach().expand(3))
    torch.testing.assert_close(found["alone"][1], 6 * b.detach() ** 2)
    for name, index in (("alone", 0), ("off", 0), ("off", 1), ("constant", 0), ("constant", 1)):
        assert torch.equal(found[name][index], torch.zeros_like([a, b][index]))
    with pytest.raises(RuntimeError):  # the graph is freed
        torch.autograd.grad(terms["alone"][1], b)
    assert a.grad is None


def test_the_gradients_add_up_to_that_of_the_total():
    a, b = parameters((4,), (2, 2))
    terms = LossTerms(x=(0.3, (a**2).sum() * b.sum()), y=(-1.5, (b**3).sum()))
    total = torch.autograd.grad(terms.total(), [a, b], retain_graph=True)
    found = per_term_gradients(terms, [a, b])
    for index, expected in enumerate(total):
        torch.testing.assert_close(found["x"][index] + found["y"][index], expected, rtol=1e-12, atol=1e-12)


def test_projection_by_hand():
    # <v1, v2> = -1, |v1|^2 = 5: v2' = v2 + v1 / 5
    v1, v2 = torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([-1.0, 2.0, 0.0, 1.0])
    (projected,) = project_conflict([v1], [v2])
    torch.testing.assert_close(projected, torch.tensor([-0.8, 2.0, 0.4, 1.0]))
    split = project_conflict([v1[:1], v1[1:].view(3, 1)], [v2[:1], v2[1:].view(3, 1)])  # one flat vector
    torch.testing.assert_close(torch.cat([part.flatten() for part in split]), projected)
    assert torch.equal(project_conflict([v1], [-v2])[0], -v2)
    assert torch.equal(project_conflict([torch.zeros(4)], [v2])[0], v2)


numbers = st.lists(st.floats(-10, 10), min_size=6, max_size=6)


@given(left=numbers, right=numbers)
def test_a_projected_gradient_never_opposes_the_reference(left, right):
    v1, v2 = torch.tensor(left, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    (projected,) = project_conflict([v1], [v2])
    assert torch.isfinite(projected).all()
    if dot([v1], [v2]) >= 0:
        assert torch.equal(projected, v2)
    elif v1.norm() > 1e-100:
        assert abs(dot([v1], [projected])) <= 1e-10 * (v1.norm() * v2.norm() + 1)
        assert projected.norm() <= v2.norm() * (1 + 1e-10)


class Two(Distiller):
    """Terms x and y on a vector; the rule keeps x and twice y."""

    def __init__(self, rule):
        super().__init__()
        self.student = nn.Linear(2, 1, bias=False).double()
        nn.init.constant_(self.student.weight, 1.0)
        self.rule = rule

    def gradient_rule(self, player):
        return self.rule

    def loss(self, batch, player="student"):
        output = self.student(batch)
        return LossTerms(x=(1.0, output.mean()), y=(0.5, output.square().mean()))


def train(folder, rule, accumulation):
    config = TrainConfig(epochs=1, batch_size=2, accumulation=accumulation, optimizer={"lr": 0.1, "momentum": 0.0})
    context = RunContext(RunConfig(method="x"), folder, make_accelerator(config, cpu=True), quiet=True)
    batches = [torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double(), torch.tensor([[3.0, 0.0], [1.0, 1.0]]).double()]
    distiller = Two(rule)
    loop = Loop("s", context, TrainSetup(distiller, batches), config)
    loop.fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return distiller.student.weight.detach(), batches


def test_a_rule_sees_each_term_averaged_over_the_micro_batches(tmp_path):
    seen = []

    def rule(gradients):
        seen.append(gradients)
        return [x + 2 * y for x, y in zip(gradients["x"], gradients["y"], strict=True)]

    weight, batches = train(tmp_path, rule, accumulation=2)
    rows = torch.cat(batches)
    w = torch.ones(1, 2, dtype=torch.float64)
    x, y = rows.mean(0, keepdim=True), (rows @ w.t() * rows).mean(0, keepdim=True)  # 0.5 * d(o^2) = o do
    assert len(seen) == 1
    torch.testing.assert_close(seen[0]["x"][0], x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[0]["y"][0], y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight, w - 0.1 * (x + 2 * y), rtol=1e-12, atol=1e-12)


def test_a_rule_that_sums_is_the_plain_backward_pass(tmp_path):
    def total(gradients):
        return [x + y for x, y in zip(gradients["x"], gradients["y"], strict=True)]

    for accumulation in (1, 2):
        ruled, plain = (train(tmp_path, rule, accumulation)[0] for rule in (total, None))
        torch.testing.assert_close(ruled, plain, rtol=1e-12, atol=1e-12)


def test_a_rule_under_fp16_is_refused():
    class Scaled:
        class accelerator:
            scaler = object()

    with pytest.raises(InputError, match=r"train\.precision = 'fp16': a gradient rule needs unscaled gradients"):
        rule_backward(Scaled(), None, [], lambda gradients: [])  # type: ignore[arg-type]
