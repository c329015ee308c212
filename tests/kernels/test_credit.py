"""Credits of blocks, against attention in which each block has a weight."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels import SparsePlan
from dit_accel.kernels.block_sparse.reference import sparse_linear_reference
from dit_accel.kernels.linear.features import features
from dit_accel.kernels.router import credit
from dit_accel.kernels.router.credit import credited

SCALE = 0.4
MODES = {
    "none": {},
    "shared_softmax": {"shared_softmax": True},
    "proj": {"linear": True},
    "alpha": {"linear": True},
}


class Case:
    """Inputs, mask of read blocks, and formulas with a weight for each block, all in fp64."""

    def __init__(
        self, mode, *, q_len=21, k_len=27, text=5, block=8, heads=(4, 2), seed=0, lengths=None
    ):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.mode, self.block, self.group = mode, block, heads[0] // heads[1]
        self.q, self.grad = draw(2, heads[0], q_len, 6), draw(2, heads[0], q_len, 5)
        self.k, self.v = draw(2, heads[1], k_len, 6), draw(2, heads[1], k_len, 5)
        self.text = draw(2, heads[1], text, 6), draw(2, heads[1], text, 5)
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.n_q, self.n_k = -(-q_len // block), -(-k_len // block)
        scores = torch.rand(2, heads[0], self.n_q, self.n_k, generator=g)
        self.read = scores >= scores.amax(-1, keepdim=True).clamp(max=0.6)
        self.set = ~self.read & (scores > 0.2)  # the rest is skipped
        self.proj, self.alpha = draw(5, 5), torch.rand(heads[0], generator=g, dtype=torch.float64)

    def tokens(self, weights):
        """Return weights `[B, H, T_q, T_k]` expanded to pairs of tokens."""
        by_query = weights.repeat_interleave(self.block, 2)[:, :, : self.q.shape[2]]
        return by_query.repeat_interleave(self.block, 3)[..., : self.k.shape[2]]

    def exact(self, weights):
        """Return the softmax branch, `[B, H, L, D]`."""
        k, v, words_k, words_v = (
            x.repeat_interleave(self.group, 1) for x in (self.k, self.v, *self.text)
        )
        p = (SCALE * self.q @ k.mT).exp() * self.tokens(weights)
        words = (SCALE * self.q @ words_k.mT).exp()
        if self.lengths is not None:
            words = words * (torch.arange(words_k.shape[2]) < self.lengths[:, None, None, None])
        total, sums = p.sum(-1) + words.sum(-1), p @ v + words @ words_v
        if self.mode == "shared_softmax":
            of_key = torch.arange(k.shape[2]) // self.block
            onto = F.one_hot(of_key, self.n_k).to(k)
            sizes = onto.sum(0)
            mean_k, mean_v = (onto.T @ x / sizes[:, None] for x in (k, v))
            unread = 1 - weights.repeat_interleave(self.block, 2)[:, :, : self.q.shape[2]]
            tail = (SCALE * self.q @ mean_k.mT).exp() * sizes * unread
            total, sums = total + tail.sum(-1), sums + tail @ mean_v
        return sums / total[..., None]

    def linear(self, weights):
        """Return the linear branch over blocks with these weights."""
        k, v = (x.repeat_interleave(self.group, 1) for x in (self.k, self.v))
        p = (features(self.q, "softmax") @ features(k, "softmax").mT) * self.tokens(weights)
        return p @ v / p.sum(-1, keepdim=True).clamp(min=1e-300)

    def grads(self):
        """Return the gradients of both branches, given that of the output."""
        if self.mode == "alpha":
            share = self.alpha[:, None, None]
            return share * self.grad, (1 - share) * self.grad
        return self.grad, self.grad @ self.proj

    def options(self):
        linear = {}
        if MODES[self.mode].get("linear"):
            linear = {"linear_set": self.set}
            linear |= {"alpha": self.alpha} if self.mode == "alpha" else {"proj_weight": self.proj}
        return {
            "block_q": self.block,
            "block_k": self.block,
            "scale": SCALE,
            "text": self.text,
            "text_lengths": self.lengths,
            "shared_softmax": self.mode == "shared_softmax",
            **linear,
        }

    def credits(self, rows=None):
        """Return the credits from `credited`, `[B, H, n, T_k]`."""
        rows = torch.arange(self.n_q) if rows is None else rows
        weights = torch.zeros(2, self.q.shape[1], len(rows), self.n_k, dtype=torch.float64)
        weights.requires_grad_()
        options = self.options()
        for name in ("linear_set",):
            if name in options:
                options[name] = options[name][:, :, rows]
        o = torch.zeros_like(self.grad).requires_grad_()
        result = credited(
            o, weights, self.q, self.k, self.v, rows=rows, read=self.read[:, :, rows], **options
        )
        found, passed = torch.autograd.grad(result, (weights, o), self.grad)
        torch.testing.assert_close(passed, self.grad, rtol=0, atol=0)
        return found


def by_row(x, case):
    """Return the sum over the queries of each block and over channels, `[B, H, T_q]`."""
    x = F.pad(x.sum(-1), (0, -x.shape[2] % case.block))
    return x.unflatten(-1, (-1, case.block)).sum(-1)


def enters_or_leaves(branch, weights, grad, case):
    """Return the effect of adding a block to a branch: the exact change if it is not in it, else the derivative."""
    weights = weights.double().requires_grad_()
    now = branch(weights)
    (expected,) = torch.autograd.grad(now, weights, grad)
    expected = expected.clone()
    for j in range(case.n_k):
        into = weights.detach().clone()
        into[..., j] = 1
        change = by_row(grad * (branch(into) - now.detach()), case)
        outside = weights[..., j] == 0
        expected[..., j] = torch.where(outside, change, expected[..., j])
    return expected


def expected_credits(case):
    grad_exact, grad_linear = case.grads() if case.mode in ("proj", "alpha") else (case.grad, None)
    found = enters_or_leaves(case.exact, case.read, grad_exact, case)
    if grad_linear is not None:
        # A block that is read is not in the linear set, and a skipped one stays out of it.
        linear = enters_or_leaves(case.linear, case.set, grad_linear, case)
        found = found - torch.where(case.set | case.read, linear, 0.0)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_the_weighted_formulas_are_those_of_attention(mode):
    """Credits with weights of 0 and 1 and without text equal the reference implementation."""
    case = Case(mode, text=0)
    case.set = ~case.read
    plan = SparsePlan.from_block_mask(case.read, block_q=8, block_k=8, q_len=21, kv_len=27)
    o = case.exact(case.read.double())
    weights = {}
    if mode in ("proj", "alpha"):
        o_l = case.linear(case.set.double())
        share = case.alpha[:, None, None]
        empty = ~case.tokens(case.set).any(-1, keepdim=True)
        o = (
            torch.where(empty, o, share * o + (1 - share) * o_l)
            if mode == "alpha"
            else o + F.linear(o_l, case.proj)
        )
        weights = {"alpha": case.alpha} if mode == "alpha" else {"proj_weight": case.proj}
    expected = sparse_linear_reference(
        case.q, case.k, case.v, plan, combine=mode, scale=SCALE, **weights
    )
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("text", "lengths"), [(0, None), (5, None), (5, [2, 0])], ids=["image", "joint", "padded"]
)
def test_credits_are_the_change_by_reading_one_block_more(mode, text, lengths):
    case = Case(mode, text=text, lengths=lengths)
    torch.testing.assert_close(case.credits(), expected_credits(case))


@settings(max_examples=10)
@given(
    mode=st.sampled_from(list(MODES)),
    q_len=st.integers(1, 30),
    k_len=st.integers(1, 40),
    text=st.integers(0, 6),
    block=st.sampled_from([1, 4, 8]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    seed=st.integers(0, 99),
)
def test_any_sizes(mode, q_len, k_len, text, block, heads, seed):
    case = Case(mode, q_len=q_len, k_len=k_len, text=text, block=block, heads=heads, seed=seed)
    torch.testing.assert_close(case.credits(), expected_credits(case), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_some_rows_get_what_they_get_among_all(mode, monkeypatch):
    case = Case(mode)
    every = case.credits()
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(case.credits(rows), every[:, :, rows])
    monkeypatch.setitem(credit.CHUNK_BYTES, "cpu", 1)  # one row at a time
    torch.testing.assert_close(case.credits(), every)


def test_a_block_far_above_all_that_is_read_has_a_finite_credit():
    case = Case("none", text=0)
    case.read = torch.zeros_like(case.read)
    case.read[..., 0] = True
    case.k[:, :, 8:16] = 400 * case.q[:, ::2, :8]
    q, k, v, grad = (x.float() for x in (case.q, case.k, case.v, case.grad))
    weights = torch.zeros(2, 4, 3, 4, requires_grad=True)
    options = case.options() | {"text": None}
    o = credited(grad, weights, q, k, v, rows=torch.arange(3), read=case.read, **options)
    (found,) = torch.autograd.grad(o, weights, grad)
    assert found.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_the_operators_keep_their_promises(mode):
    case = Case(mode, lengths=[2, 5])
    options = case.options()
    args = (
        torch.zeros_like(case.grad).requires_grad_(),
        torch.zeros(2, 4, 3, 4, dtype=torch.float64).requires_grad_(),
        case.q,
        case.k,
        case.v,
        *case.text,
        case.lengths,
        torch.arange(3),
        case.read,
        options.get("linear_set"),
        options.get("proj_weight"),
        options.get("alpha"),
        8,
        8,
        SCALE,
        options["shared_softmax"],
        "softmax",
    )
    torch.library.opcheck(torch.ops.dit_accel.credited, args)
    torch.library.opcheck(
        torch.ops.dit_accel.block_credits,
        (case.grad, *args[2:]),
        test_utils=("test_schema", "test_faketensor"),
    )
