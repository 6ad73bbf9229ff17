"""Chunked sums over pairs: equal to the plain sums, without an N x N tensor alive."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdcore.errors import InputError
from kdcore.gpu.pairwise import RELATIONS, chunked_pairwise, relation_mse


def features(n=10, d_s=4, d_t=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(n, d_s, generator=g, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(n, d_t, generator=g, dtype=torch.float64)


def distances(x):
    """|x_i - x_j| from differences; 0 with gradient 0 on the diagonal."""
    off = ~torch.eye(len(x), dtype=torch.bool)
    square = (x[:, None] - x[None]).square().sum(-1)
    return torch.where(off, square, 1.0).sqrt() * off


def plain_relation(x, relation, normalise):
    if relation == "sq_euclidean":
        r = distances(x) ** 2
    elif relation == "euclidean":
        r = distances(x)
    else:
        y = x / x.norm(dim=1, keepdim=True) if relation == "cosine" else x
        r = y @ y.t()
    if normalise == "row":
        return r / r.norm(dim=1, keepdim=True)
    return r / (r.sum() / (len(x) * (len(x) - 1))) if normalise == "mean" else r


CASES = [
    (relation, normalise)
    for relation in RELATIONS
    for normalise in ("none", "row", "mean")
    if normalise != "mean" or "euclidean" in relation
]


@pytest.mark.parametrize(("relation", "normalise"), CASES)
@pytest.mark.parametrize("chunk", [1, 3, 10, None])
def test_relation_mse_equals_unchunked(relation, normalise, chunk):
    student, teacher = features()
    r_s, r_t = (plain_relation(x, relation, normalise) for x in (student, teacher))
    expected = (r_s - r_t).square().mean()
    loss = relation_mse(student, teacher, relation=relation, normalise=normalise, chunk_rows=chunk)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    (found,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(found, torch.autograd.grad(expected, student)[0], rtol=1e-10, atol=1e-10)


def test_similarity_preserving_by_its_own_formula():
    student, teacher = features()
    g_s, g_t = (F.normalize(x @ x.t(), p=2, dim=1) for x in (student, teacher))
    expected = torch.linalg.matrix_norm(g_t - g_s) ** 2 / len(student) ** 2
    loss = relation_mse(student, teacher, relation="dot", normalise="row", chunk_rows=4)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_rows_columns_and_the_closure():
    student, teacher = features()
    teacher.requires_grad_()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def part(rows_s, all_s, rows_t, all_t):
        return (torch.tanh(scale * rows_s @ all_s.t()) * (rows_t @ all_t.t())).sum()

    inputs = [student, teacher, scale]
    found = torch.autograd.grad(chunked_pairwise(part, student, teacher, chunk_rows=3), inputs)
    expected = torch.autograd.grad(part(student, student, teacher, teacher), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_callable_relation_and_gradcheck():
    student, teacher = features(n=5)

    def laplace(rows, every):
        return torch.exp(-(rows[:, None] - every[None]).square().sum(-1))

    def loss(x):
        return relation_mse(x, teacher, relation=laplace, chunk_rows=2)

    assert torch.autograd.gradcheck(loss, (student,))


def test_duplicate_samples_give_finite_gradients():
    student = torch.ones(4, 3, requires_grad=True)
    loss = relation_mse(student, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), relation="euclidean")
    loss.backward()
    assert torch.equal(student.grad, torch.zeros(4, 3))


class LargestTensor(TorchDispatchMode):
    """The largest number of elements of any tensor an operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize(("relation", "normalise"), CASES)
def test_no_tensor_of_all_pairs_and_nothing_kept_for_backward(relation, normalise):
    n, chunk = 128, 4
    student, teacher = features(n=n, d_s=3, d_t=3)
    kept = {}  # storage -> elements: what the graph holds between forward and backward

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = relation_mse(student, teacher, relation=relation, normalise=normalise, chunk_rows=chunk)
    assert kept
    assert sum(kept.values()) < n * n / 2
    with largest:
        loss.backward()
    assert largest.numel == chunk * n


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 8), chunk=st.integers(1, 9), case=st.sampled_from(CASES), seed=st.integers(0, 2**20))
def test_any_chunk_size(n, chunk, case, seed):
    student, teacher = features(n=n, seed=seed)
    relation, normalise = case
    r_s, r_t = (plain_relation(x, relation, normalise) for x in (student, teacher))
    loss = relation_mse(student, teacher, relation=relation, normalise=normalise, chunk_rows=chunk)
    torch.testing.assert_close(loss, (r_s - r_t).square().mean(), rtol=1e-8, atol=1e-10)


def test_refusals_name_the_argument():
    student, teacher = features()
    with pytest.raises(InputError, match=r"^relation: given 'cosin'; did you mean 'cosine'"):
        relation_mse(student, teacher, relation="cosin")
    with pytest.raises(InputError, match=r"^normalise: given 'rows'"):
        relation_mse(student, teacher, normalise="rows")
    with pytest.raises(InputError, match=r"^normalise: given 'mean' with 'dot'"):
        relation_mse(student, teacher, relation="dot", normalise="mean")
    with pytest.raises(InputError, match=r"^normalise: given 'mean' for 1 sample"):
        relation_mse(student[:1], teacher[:1], relation="euclidean", normalise="mean")
    with pytest.raises(InputError, match=r"^student, teacher: given \(9, 4\)"):
        relation_mse(student[:9], teacher)
    with pytest.raises(InputError, match=r"^chunk_rows: given 0"):
        relation_mse(student, teacher, chunk_rows=0)
