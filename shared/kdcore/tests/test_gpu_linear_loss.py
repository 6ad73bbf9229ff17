"""linear_loss against autograd on full logits: values, rows and gradients, combinations of terms, memory, refusals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdcore.errors import InputError
from kdcore.gpu.linear_divergence import KINDS
from kdcore.gpu.linear_loss import CrossEntropy, Dense, HeadSpec, Sparse, linear_loss
from kdcore.gpu.topk import MODES, TopK, topk_kl

N, V = 7, 13
WEIGHTS = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.25, 3.0], dtype=torch.float64)


def kl(la, lb):
    return (la.exp() * (la - lb)).sum(-1)


def dense_rows(z, t, kind, tau=1.0, beta=0.5, alpha=0.1):
    """D per row from full logits, written from the definitions alone."""
    lq, lp = (z / tau).log_softmax(-1), (t / tau).log_softmax(-1)
    q, p = lq.exp(), lp.exp()
    if kind == "js":
        lm = (beta * p + (1 - beta) * q).log()
        return beta * kl(lp, lm) + (1 - beta) * kl(lq, lm)
    return {
        "forward": lambda: kl(lp, lq),
        "reverse": lambda: kl(lq, lp),
        "skew": lambda: kl(lp, (alpha * p + (1 - alpha) * q).log()),
        "skew_reverse": lambda: kl(lq, (alpha * q + (1 - alpha) * p).log()),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[kind]()


def sparse_rows(z, t, ids, mode, tau=1.0):
    """D per row on the support `ids`, from full logits and the definitions of the three modes."""
    on = torch.zeros_like(z, dtype=torch.bool).scatter(-1, ids, True)

    def outcomes(x):
        probability = x.softmax(-1)
        inside = probability.gather(-1, ids)
        if mode == "renormalised":
            return inside.pow(1 / tau)
        rest = (probability * ~on).sum(-1, keepdim=True).pow(1 / tau) if not on.all() else 0 * inside[..., :1]
        return torch.cat([inside.pow(1 / tau), rest], -1)

    p, q = (x / x.sum(-1, keepdim=True) for x in (outcomes(t), outcomes(z)))
    terms = torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), torch.zeros_like(p))
    return (terms[..., :-1] if mode == "truncated" else terms).sum(-1)


class Problem:
    """Random student (with gradients), teacher and labels; `z`, `t` are their full logits."""

    def __init__(self, n=N, vocab=V, d_s=4, d_t=6, dtype=torch.float64, seed=0, head=HeadSpec(), head_t=HeadSpec()):
        g = torch.Generator().manual_seed(seed)
        shapes = [(n, d_s), (vocab, d_s), (vocab,), (n, d_t), (vocab, d_t), (vocab,)]
        tensors = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
        self.student = [x.requires_grad_() for x in tensors[:3]]
        self.h_t, self.w_t, self.b_t = tensors[3:]
        self.labels = torch.randint(vocab, (n,), generator=g)
        self.head, self.head_t, self.vocab = head, head_t, vocab

    @staticmethod
    def _apply(head, x):
        x = head.scale * x
        return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)

    @property
    def z(self):
        h, w, b = self.student
        return self._apply(self.head, h @ w.t() + b)

    @property
    def t(self):
        return self._apply(self.head_t, self.h_t @ self.w_t.t() + self.b_t)

    def dense(self, row_weights, **options):
        return Dense(
            hidden_t=self.h_t,
            weight_t=self.w_t,
            bias_t=self.b_t,
            head_t=self.head_t,
            row_weights=row_weights,
            **options,
        )

    def sparse(self, row_weights, k=5, **options):
        return Sparse(topk=TopK.from_logits(self.t, k), row_weights=row_weights, **options)

    def cross_entropy(self, row_weights, **options):
        return CrossEntropy(labels=self.labels, row_weights=row_weights, **options)

    def naive(self, term):
        """The term's rows from full logits, with a graph."""
        if isinstance(term, CrossEntropy):
            return F.cross_entropy(self.z, self.labels, reduction="none")
        factor = term.temperature**2 if term.scale_by_tau2 else 1.0
        if isinstance(term, Sparse):
            return factor * sparse_rows(self.z, self.t, term.topk.ids, term.mode, term.temperature)
        return factor * dense_rows(self.z, self.t, term.kind, term.temperature, term.beta, term.alpha)

    def check(self, terms, tolerance=1e-10, **options):
        """Value, rows and gradients of linear_loss equal those of full logits; returns the loss."""
        h, w, b = self.student
        loss = linear_loss(h, w, terms, bias=b, head=self.head, **options)
        naive = [self.naive(term) for term in terms]
        expected = sum(term.weight * (term.row_weights * rows).sum() for term, rows in zip(terms, naive, strict=True))
        close(loss.total, expected, tolerance)
        for term, rows, value, exact in zip(terms, loss.rows, loss.values, naive, strict=True):
            on = term.row_weights != 0
            close(rows, torch.where(on, exact, 0.0).detach(), tolerance)
            close(value, (term.row_weights * exact).sum().detach(), tolerance)
        found, exact = (torch.autograd.grad(3 * x, self.student) for x in (loss.total, expected))
        for a, b in zip(found, exact, strict=True):
            close(a, b, tolerance)
        return loss


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, N, 5])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_equals_naive(kind, recompute, chunk):
    problem = Problem()
    term = problem.dense(WEIGHTS, kind=kind, temperature=2.5, beta=0.3, alpha=0.2, weight=0.7)
    problem.check([term], recompute=recompute, chunk_tokens=chunk)


@pytest.mark.parametrize("chunk", [1, N, 5])
@pytest.mark.parametrize("recompute", [False, True])
def test_cross_entropy_equals_naive(recompute, chunk):
    problem = Problem()
    problem.check([problem.cross_entropy(WEIGHTS, weight=0.3)], recompute=recompute, chunk_tokens=chunk)


@pytest.mark.parametrize("chunk", [1, N, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_sparse_equals_naive(mode, temperature, chunk):
    problem = Problem()
    for recompute in (False, True):
        term = problem.sparse(WEIGHTS, mode=mode, temperature=temperature, weight=1.3)
        problem.check([term], recompute=recompute, chunk_tokens=chunk)


@pytest.mark.parametrize("chunk", [1, N, 5])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_terms_at_once_in_any_order(temperature, recompute, chunk):
    problem = Problem(head=HeadSpec(scale=0.5, softcap=3.0), head_t=HeadSpec(scale=-1.5))
    other = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    terms = [
        problem.dense(WEIGHTS, kind="reverse", temperature=temperature),
        problem.sparse(other, temperature=temperature, weight=0.4),
        problem.cross_entropy(other, weight=0.5),
        problem.dense(other + WEIGHTS, kind="js", temperature=temperature, weight=2.0),
        problem.sparse(WEIGHTS, mode="renormalised", temperature=temperature),
        problem.cross_entropy(WEIGHTS, weight=0.1),
        problem.sparse(WEIGHTS.flip(0), mode="truncated", temperature=temperature, k=2),
    ]
    for order in (terms, terms[::-1], [terms[2], terms[0]], [terms[0], terms[5]], [terms[5], terms[1]], terms[3:5]):
        problem.check(order, recompute=recompute, chunk_tokens=chunk)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cross_entropy_at_temperature_one_beside_any_divergence(kind, temperature):
    problem = Problem()
    terms = [problem.cross_entropy(WEIGHTS, weight=0.5), problem.dense(WEIGHTS, kind=kind, temperature=temperature)]
    problem.check(terms, chunk_tokens=3)


def test_blocks_smaller_than_the_chunk():
    problem = Problem(n=40, vocab=30)
    weights = (torch.arange(40) % 3).double()
    terms = [problem.dense(weights), problem.cross_entropy(1 - weights.clamp(max=1)), problem.sparse(weights + 1)]
    # Chunks of 9 rows in blocks of at most 4: 16 * 4 * 30 * 8 bytes.
    problem.check(terms, chunk_tokens=9, chunk_bytes=16 * 4 * 30 * 8)


@pytest.mark.parametrize("mode", MODES)
def test_head_scale_and_softcap(mode):
    problem = Problem(head=HeadSpec(scale=-0.5, softcap=2.0), head_t=HeadSpec(scale=2.0, softcap=5.0))
    problem.check([problem.sparse(WEIGHTS, mode=mode, temperature=2.0), problem.dense(WEIGHTS, kind="skew_reverse")])
    problem.check([problem.cross_entropy(WEIGHTS)])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_all_outputs_in_the_support_give_the_full_divergence(mode, temperature):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        problem = Problem(dtype=dtype)
        weights = WEIGHTS.to(dtype) / 10
        options = {"temperature": temperature, "scale_by_tau2": False}
        sparse, dense = problem.sparse(weights, k=V, mode=mode, **options), problem.dense(weights, **options)
        h, w, b = problem.student
        results = [linear_loss(h, w, [term], bias=b) for term in (sparse, dense)]
        close(results[0].total, results[1].total, tolerance)
        gradients = [torch.autograd.grad(loss.total, problem.student) for loss in results]
        for a, b in zip(*gradients, strict=True):
            close(a, b, tolerance)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_tail_is_topk_kl(temperature):
    problem = Problem()
    top = TopK.from_logits(problem.t, 3)
    h, w, b = problem.student
    loss = linear_loss(h, w, [Sparse(topk=top, row_weights=WEIGHTS, temperature=temperature)], bias=b)
    expected = topk_kl(problem.z, top, temperature, weights=WEIGHTS, reduction="sum")
    close(loss.total, expected)
    for a, b in zip(*(torch.autograd.grad(x, problem.student) for x in (loss.total, expected)), strict=True):
        close(a, b)


def test_worked_numbers_of_the_three_modes():
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.6, 0.35, 0.03, 0.02]], dtype=torch.float64)
    top, one = TopK.from_logits(p.log(), 2), torch.ones(1, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    for mode, value in (("tail", 0.139853), ("truncated", -0.137406), ("renormalised", 0.000093)):
        loss = linear_loss(q.log(), eye, [Sparse(topk=top, row_weights=one, mode=mode)])
        assert loss.total.item() == pytest.approx(value, abs=5e-7)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", *MODES, *(k for k in KINDS if k != "total_variation"), "all"])
def test_gradcheck(name, recompute):  # total_variation has a kink at p = q
    problem = Problem(n=3, vocab=5, d_s=2, d_t=3)
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    if name == "cross_entropy":
        terms = [problem.cross_entropy(weights)]
    elif name in MODES:
        terms = [problem.sparse(weights, k=2, mode=name, temperature=1.5)]
    elif name == "all":
        terms = [problem.dense(weights, temperature=2.0), problem.sparse(weights, k=2), problem.cross_entropy(weights)]
    else:
        terms = [problem.dense(weights, kind=name, temperature=1.5)]

    def f(h, w, b):
        return linear_loss(h, w, terms, bias=b, chunk_tokens=2, recompute=recompute).total

    assert torch.autograd.gradcheck(f, problem.student)


def test_tied_weight_accumulates_from_embedding_and_head():
    problem = Problem(vocab=11, d_s=4)
    e = torch.nn.Parameter(problem.student[1].detach().clone())
    ids = torch.randint(11, (N,), generator=torch.Generator().manual_seed(1))
    terms = [problem.dense(WEIGHTS, kind="reverse"), problem.cross_entropy(WEIGHTS, weight=0.5)]
    z = torch.tanh(e[ids]) @ e.t()
    naive = dense_rows(z, problem.t, "reverse") + 0.5 * F.cross_entropy(z, problem.labels, reduction="none")
    (naive * WEIGHTS).sum().backward()
    expected, e.grad = e.grad, None
    for _ in range(2):  # also accumulates over two backward passes, the gradient accumulation of a training loop
        linear_loss(torch.tanh(e[ids]), e, terms, chunk_tokens=3).total.backward()
    close(e.grad, 2 * expected)


class Tensors(TorchDispatchMode):
    """Shapes and storages of all tensors that operations returned."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.found |= {(tuple(x.shape), x.untyped_storage().data_ptr()) for x in tensors}
        return out

    def largest(self):
        return max(torch.Size(shape).numel() for shape, _ in self.found)


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_head_costs_no_accumulator(recompute):
    problem = Problem(d_s=5)
    h, w, b = problem.student
    terms = [problem.dense(WEIGHTS), problem.cross_entropy(WEIGHTS), problem.sparse(WEIGHTS)]
    (expected,) = torch.autograd.grad(linear_loss(h, w, terms, bias=b).total, h)
    for frozen in (True, False):
        w.requires_grad_(not frozen)
        b.requires_grad_(not frozen)
        with Tensors() as seen:
            loss = linear_loss(h, w, terms, bias=b, recompute=recompute, chunk_tokens=2)
            loss.total.backward()
        made = [shape for shape, storage in seen.found if storage != w.untyped_storage().data_ptr()]
        assert ((V, 5) in made) is not frozen
        close(h.grad, expected)
        h.grad = None


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_no_tensor_of_tokens_by_vocabulary(mode, recompute):
    n, vocab, chunk = 64, 300, 8
    problem = Problem(n=n, vocab=vocab, dtype=torch.float32)
    h, w, b = problem.student
    weights = torch.ones(n)
    half = weights * (torch.arange(n) % 2)
    terms = [
        problem.sparse(weights, k=4, mode=mode), problem.dense(half, temperature=2.0), problem.dense(weights),
        problem.cross_entropy(half), problem.cross_entropy(weights),
    ]  # fmt: skip
    for some in (terms, terms[:1], terms[1:2], terms[2:3], terms[3:4]):
        with Tensors() as seen:
            linear_loss(h, w, some, bias=b, chunk_tokens=chunk, recompute=recompute).total.backward()
        assert seen.largest() <= chunk * vocab
    with Tensors() as seen:
        problem.naive(terms[-1]).sum().backward()
    assert seen.largest() == n * vocab  # the counter sees what it must see


def test_chunk_bytes_bounds_the_buffers():
    n, vocab, budget = 64, 1000, 100_000
    problem = Problem(n=n, vocab=vocab, dtype=torch.float32)
    h, w, _ = problem.student
    weights = torch.ones(n)
    for terms, buffers in (([problem.cross_entropy(weights)], 1), ([problem.dense(weights)] * 2, 3)):
        with Tensors() as seen:
            linear_loss(h, w, terms, chunk_bytes=budget).total.backward()
        assert buffers * 4 * seen.largest() <= budget


def test_rows_of_weight_zero_are_never_touched():
    problem = Problem()
    h, w, b = problem.student
    ce_on, kl_on = torch.zeros(2, N, dtype=torch.float64)
    ce_on[[1, 2, 5]], kl_on[[2, 4]] = 1.0, 0.5
    expected = linear_loss(h, w, [problem.cross_entropy(ce_on), problem.dense(kl_on)], bias=b)
    nan = torch.full((), float("nan"), dtype=torch.float64)
    h_bad = torch.where(((ce_on + kl_on) > 0).unsqueeze(1), h, nan)
    terms = [
        CrossEntropy(labels=torch.where(ce_on > 0, problem.labels, -100), row_weights=ce_on),
        Dense(
            hidden_t=torch.where((kl_on > 0).unsqueeze(1), problem.h_t, nan), weight_t=problem.w_t, bias_t=problem.b_t,
            row_weights=kl_on,
        ),
    ]  # fmt: skip
    loss = linear_loss(h_bad, w, terms, bias=b, chunk_tokens=2)
    close(loss.total, expected.total)
    assert (loss.rows[0] != 0).tolist() == (ce_on > 0).tolist()
    assert (loss.rows[1] != 0).tolist() == (kl_on > 0).tolist()
    for a, b in zip(*(torch.autograd.grad(x.total, [h, w]) for x in (loss, expected)), strict=True):
        close(a, b)


@pytest.mark.parametrize("recompute", [False, True])
def test_no_row_at_all_gives_zero_with_zero_gradients(recompute):
    problem = Problem()
    h, w, b = problem.student
    none = 0 * WEIGHTS
    loss = linear_loss(
        h, w, [problem.cross_entropy(none), problem.dense(none), problem.sparse(none)], bias=b, recompute=recompute
    )
    assert loss.total.item() == 0
    for gradient in torch.autograd.grad(loss.total, problem.student):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    empty = torch.zeros(0, dtype=torch.float64)
    ce = CrossEntropy(labels=empty.long(), row_weights=empty)
    assert linear_loss(h[:0], w, [ce], recompute=recompute).rows[0].shape == (0,)


def test_a_term_of_weight_zero_is_reported_and_has_no_gradient():
    problem = Problem()
    ce, dense = problem.cross_entropy(WEIGHTS, weight=0.0), problem.dense(WEIGHTS)
    loss = problem.check([ce, dense])
    assert loss.values[0] > 0
    assert not loss.values[0].requires_grad
    assert not loss.rows[1].requires_grad
    close(loss.total, loss.values[1])


@pytest.mark.parametrize("name", ["cross_entropy", *MODES])
def test_bias_of_minus_infinity_masks_an_output(name):
    problem = Problem()
    h, w, _ = problem.student
    mask = torch.zeros(V, dtype=torch.float64)
    mask[10:] = -torch.inf
    t = problem.h_t @ problem.w_t.t() + mask
    labels = problem.labels.clamp(max=9)
    loss = {
        "cross_entropy": lambda w, b, t: (
            linear_loss(h, w, [CrossEntropy(labels=labels, row_weights=WEIGHTS)], bias=b).total
        ),
    }.get(
        name,
        lambda w, b, t: (
            linear_loss(h, w, [Sparse(topk=TopK.from_logits(t, 10), row_weights=WEIGHTS, mode=name)], bias=b).total
        ),
    )
    found, expected = loss(w, mask, t), loss(w[:10], None, t[:, :10])
    close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x, [h, w]) for x in (found, expected)), strict=True):
        close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_extreme_logits_stay_finite_in_float32(mode):
    problem = Problem(dtype=torch.float32)
    h, w, _ = problem.student
    for k in (1, 5, V):
        terms = [
            Sparse(topk=TopK.from_logits(200 * problem.t, k), row_weights=torch.ones(N), mode=mode, temperature=2.0),
            problem.cross_entropy(torch.ones(N)),
        ]
        loss = linear_loss(200 * h, w, terms)
        assert torch.isfinite(loss.total)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss.total, [h, w]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_accumulate_in_float32(dtype):
    low = Problem(n=32, vocab=501, d_s=24, d_t=40, dtype=dtype)
    high = Problem(n=32, vocab=501, d_s=24, d_t=40, dtype=dtype)
    high.student = [x.detach().float().requires_grad_() for x in low.student]
    high.h_t, high.w_t, high.b_t = low.h_t.float(), low.w_t.float(), low.b_t.float()
    weights = torch.full((32,), 1 / 32)
    results = []
    for problem in (low, high):
        h, w, b = problem.student
        terms = [
            problem.dense(weights),
            Sparse(topk=TopK.from_logits(high.t, 16), row_weights=weights),
            problem.cross_entropy(weights),
        ]
        loss = linear_loss(h * 1, w, terms, bias=b, chunk_tokens=5)
        assert loss.total.dtype == loss.rows[0].dtype == torch.float32
        results.append((loss.total, torch.autograd.grad(loss.total, [h, w, b])))
    (total_low, grads_low), (total_high, grads_high) = results
    close(total_low, total_high, 1e-5)
    for a, b in zip(grads_low, grads_high, strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).norm() < 1e-2 * b.norm()


def test_no_grad_autocast_and_a_kept_graph():
    problem = Problem(dtype=torch.float32)
    h, w, b = problem.student
    terms = [problem.dense(torch.ones(N)), problem.cross_entropy(torch.ones(N))]
    expected = linear_loss(h, w, terms, bias=b).total
    with torch.no_grad():
        plain = linear_loss(h, w, terms, bias=b)
    assert not plain.total.requires_grad
    close(plain.total, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(linear_loss(h, w, terms, bias=b).total, expected, 0)  # operands are not rounded down
    first = torch.autograd.grad(5 * expected, w, retain_graph=True)[0]
    close(first, 5 * torch.autograd.grad(expected, w)[0], 1e-6)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(expected, w)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9), vocab=st.integers(1, 12), chunk=st.integers(1, 10), tau=st.floats(0.5, 4.0),
    kind=st.sampled_from(KINDS), mode=st.sampled_from(MODES), seed=st.integers(0, 2**20), data=st.data(),
)  # fmt: skip
def test_any_shape_and_weights(n, vocab, chunk, tau, kind, mode, seed, data):
    problem = Problem(n, vocab, seed=seed)
    k = data.draw(st.integers(1, vocab))
    columns = st.lists(st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.0]), min_size=n, max_size=n)
    w = [torch.tensor(data.draw(columns), dtype=torch.float64) for _ in range(3)]
    terms = [
        problem.sparse(w[0], k=k, mode=mode, temperature=tau, scale_by_tau2=False),
        problem.cross_entropy(w[1], weight=0.5),
        problem.dense(w[2], kind=kind, temperature=tau),
    ]
    problem.check(terms, tolerance=1e-8, chunk_tokens=chunk)


def test_refusals_name_the_argument():
    problem = Problem()
    h, w, b = problem.student
    ce, dense, sparse = problem.cross_entropy(WEIGHTS), problem.dense(WEIGHTS), problem.sparse(WEIGHTS)
    one = torch.ones(N)
    top = TopK.from_logits(problem.t, 3)
    bad = {
        r"terms: given none": [],
        r"terms\[1\]: given str": [ce, "ce"],
        r"terms\[0\]\.row_weights: given shape \(3,\)": [CrossEntropy(labels=problem.labels, row_weights=one[:3])],
        r"terms\[1\]\.row_weights: given a negative": [dense, CrossEntropy(labels=problem.labels, row_weights=-one)],
        r"terms\[0\]\.row_weights: given with requires_grad": [problem.dense(one.clone().requires_grad_())],
        r"terms\[0\]\.labels: given values from -100": [
            CrossEntropy(labels=torch.full((N,), -100), row_weights=one)
        ],
        r"terms\[0\]\.labels: given torch\.float32": [CrossEntropy(labels=one, row_weights=one)],
        r"terms\[0\]\.kind: given 'forwards'": [problem.dense(one, kind="forwards")],
        r"terms\[0\]\.beta: given 1": [problem.dense(one, kind="js", beta=1.0)],
        r"terms\[0\]\.temperature: given 0": [problem.sparse(one, temperature=0.0)],
        r"terms\[0\]\.mode: given 'trail'": [problem.sparse(one, mode="trail")],
        r"terms\[0\]\.weight_t: given a vocabulary of 12": [
            Dense(hidden_t=problem.h_t, weight_t=problem.w_t[:12], row_weights=one)
        ],
        r"terms\[0\]\.hidden_t: given shape \(3, 6\)": [
            Dense(hidden_t=problem.h_t[:3], weight_t=problem.w_t, row_weights=one)
        ],
        r"terms\[0\]\.topk\.logp": [Sparse(topk=TopK(top.ids, top.logp[:, :2], top.log_missing), row_weights=one)],
        r"terms\[0\]\.topk\.ids: given values": [
            Sparse(topk=TopK(top.ids + 13, top.logp, top.log_missing), row_weights=one)
        ],
    }  # fmt: skip
    for message, terms in bad.items():
        with pytest.raises(InputError, match=f"^{message}"):
            linear_loss(h, w, terms)
    with pytest.raises(InputError, match=r"^hidden, weight: given"):
        linear_loss(h[:, :2], w, [ce])
    with pytest.raises(InputError, match=r"^bias: given"):
        linear_loss(h, w, [sparse], bias=b[:3])
    with pytest.raises(InputError, match=r"^chunk_tokens: given 0"):
        linear_loss(h, w, [ce], chunk_tokens=0)
