"""Losses on the logits of two heads, block by block, against the plain computation."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from kd_llm.engine import chunked
from kd_llm.engine.chunked import HeadRows, chunked_loss, chunked_rows, row_blocks
from kdcore.errors import InputError
from kdcore.gpu import HeadSpec

N, V = 7, 11


def sides(dtype=torch.float64, bias=True):
    spec = HeadSpec(0.5, 3.0)
    torch.manual_seed(0)
    student = HeadRows(
        torch.randn(N, 4, dtype=dtype, requires_grad=True),
        torch.randn(V, 4, dtype=dtype, requires_grad=True),
        torch.randn(V, dtype=dtype, requires_grad=True) if bias else None,
        spec,
    )
    return student, HeadRows(torch.randn(N, 6, dtype=dtype), torch.randn(V, 6, dtype=dtype))


def whole(side):
    z = side.hidden @ side.weight.t()
    z = side.head.scale * (z if side.bias is None else z + side.bias)
    return z if side.head.softcap is None else side.head.softcap * torch.tanh(z / side.head.softcap)


def gradients(loss, student, *more):
    return torch.autograd.grad(
        loss, [x for x in (student.hidden, student.weight, student.bias, *more) if x is not None]
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("blocks", [[0, 7], [0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 7]])
def test_value_gradient_and_statistics_are_those_of_the_whole_matrix(bias, blocks):
    student, teacher = sides(bias=bias)
    scale = nn.Parameter(torch.tensor([0.7, -0.2], dtype=torch.float64))
    unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def function(z, t, number):
        value = (scale[0] * z.softmax(1) * t).sum() + scale[1] * z.square().mean(1).sum()
        return value, torch.stack([z.sum(), t.max(1).values.sum()])

    rows = torch.arange(N)
    cut = [rows[a:b] for a, b in pairwise(blocks)]
    total, sums = chunked_loss(student, teacher, cut, function, parameters=(scale, unused), statistics=2)
    expected, statistics = function(whole(student), whole(teacher), 0)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(sums, statistics.detach())
    assert not sums.requires_grad
    found = gradients(3 * total, student, scale, unused)
    for a, b in zip(
        found, (*gradients(3 * expected, student, scale), torch.zeros(2, dtype=torch.float64)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_rows_may_be_in_several_blocks_and_small_chunks_change_nothing(monkeypatch):
    student, teacher = sides()
    blocks = [torch.tensor([0, 1, 2]), torch.tensor([2, 3]), torch.tensor([5, 0])]
    z, t = whole(student), whole(teacher)
    expected = sum((z[b] * t[b]).square().sum() * (k + 1) for k, b in enumerate(blocks))
    reference = gradients(expected, student)
    for size in (1, 8 * V * 3, 2**26):
        monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", size)
        total, _ = chunked_loss(
            student, teacher, blocks, lambda z, t, k: ((z * t).square().sum() * (k + 1), torch.zeros(0))
        )
        torch.testing.assert_close(total, expected)
        for a, b in zip(gradients(total, student), reference, strict=True):
            torch.testing.assert_close(a, b)


def test_only_wanted_gradients_are_computed_and_none_reaches_the_teacher():
    student, teacher = sides()
    teacher = HeadRows(teacher.hidden.requires_grad_(), teacher.weight.requires_grad_())
    student.weight.requires_grad_(False)
    total, _ = chunked_loss(student, teacher, [torch.arange(N)], lambda z, t, k: ((z * t).sum(), torch.zeros(0)))
    total.backward()
    assert student.weight.grad is None
    assert student.hidden.grad is not None
    assert teacher.hidden.grad is None
    with torch.no_grad():
        value, _ = chunked_loss(student, teacher, [torch.arange(N)], lambda z, t, k: ((z * t).sum(), torch.zeros(0)))
    assert not value.requires_grad
    torch.testing.assert_close(value, total.detach())


def test_half_precision_is_accumulated_in_float32():
    student, teacher = sides()
    exact, _ = chunked_loss(
        student, teacher, [torch.arange(N)], lambda z, t, k: (z.softmax(1).square().sum(), z.sum()[None]), statistics=1
    )
    half = HeadRows(
        *(x.detach().bfloat16().requires_grad_() for x in (student.hidden, student.weight, student.bias)), student.head
    )
    other = HeadRows(teacher.hidden.bfloat16(), teacher.weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, sums = chunked_loss(
            half, other, [torch.arange(N)], lambda z, t, k: (z.softmax(1).square().sum(), z.sum()[None]), statistics=1
        )
    assert rough.dtype == sums.dtype == torch.float32
    rough.backward()
    assert half.weight.grad.dtype == torch.bfloat16
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)
    (reference,) = torch.autograd.grad(exact, [student.weight])
    assert (half.weight.grad.double() - reference).norm() < 0.05 * reference.norm()


def test_no_block_is_a_zero_with_a_graph():
    student, teacher = sides()
    total, sums = chunked_loss(student, teacher, [], lambda z, t, k: (z.sum(), t.sum()[None]), statistics=1)
    total.backward()
    assert total.item() == sums.item() == 0
    assert student.hidden.grad.abs().max() == 0


def test_values_per_row():
    student, teacher = sides()
    a, b = chunked_rows(student, teacher, lambda z, t: (z.argmax(1), t.logsumexp(1)))
    assert torch.equal(a, whole(student).argmax(1))
    torch.testing.assert_close(b, whole(teacher).logsumexp(1))
    assert not b.requires_grad
    assert [len(block) for block in row_blocks(5, 2**18, torch.device("cpu"))] == [2, 2, 1]


def test_rows_and_vocabularies_must_fit():
    student, teacher = sides()
    with pytest.raises(InputError, match="7 of the student and 3"):
        chunked_rows(student, HeadRows(teacher.hidden[:3], teacher.weight), lambda z, t: (z,))
    with pytest.raises(InputError, match="11 entries in the student's head and 9"):
        chunked_rows(student, HeadRows(teacher.hidden, teacher.weight[:9]), lambda z, t: (z,))
