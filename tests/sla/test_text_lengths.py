"""Sparse attention over batches with texts of different lengths: each row equals the row alone, without padding."""

import pytest
import torch
import torch.nn.functional as F

from dit_accel.bench.launches import recording
from dit_accel.finetune.dense_pass import squared_error
from dit_accel.kernels import LinearState
from dit_accel.sla import SparseLinearAttention
from dit_accel.sla.layer import LayerAttention, LayerCounts
from dit_accel.sla.text import padding_to_end, padding_to_text, valid_keys

from .test_attention import LINEAR_SCOPES, MODES, config, every_mode, layer

TEXT, LENGTHS = 37, torch.tensor([37, 5, 0, 20])
TOKENS, ACTIVE = 87, 53
every_place = pytest.mark.parametrize("where", ["first", "last"])


def inputs(heads=(4, 2), head_dim=16, seed=0):
    """Return queries, keys and values of the image and of the text."""
    generator = torch.Generator().manual_seed(seed)

    def draw(h, n):
        x = torch.randn(len(LENGTHS), h, n, head_dim, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    sizes = [(heads[0], ACTIVE), (heads[1], TOKENS), (heads[1], TOKENS)]
    return [draw(h, n) for h, n in sizes], [draw(h, TEXT) for h in (heads[0], heads[1], heads[1])]


def joined(image, words, where):
    return torch.cat([words, image] if where == "first" else [image, words], 2)


def batch(image, words, where):
    """Return all rows, with large numbers in the padding of keys and values."""
    padding = (torch.arange(TEXT) >= LENGTHS[:, None])[:, None, :, None]
    return [
        joined(x, w.masked_fill(padding, 0 if i == 0 else 50.0), where)
        for i, (x, w) in enumerate(zip(image, words, strict=True))
    ]


def alone(image, words, where, row):
    """Return one row without padding."""
    n = int(LENGTHS[row])
    return [
        joined(x[row : row + 1], w[row : row + 1, :, :n], where)
        for x, w in zip(image, words, strict=True)
    ]


def counted(o, where, row):
    """Return the image outputs and the text outputs without padding of one row."""
    n = int(LENGTHS[row])
    if where == "first":
        return torch.cat([o[row, :, :n], o[row, :, TEXT:]], 1)
    return o[row, :, : o.shape[2] - TEXT + n]


def each_alone(module, image, words, where, **options):
    return [
        module(
            *alone(image, words, where, row),
            text=where,
            text_tokens=int(LENGTHS[row]),
            **options,
        )[0]
        for row in range(len(LENGTHS))
    ]


@every_place
@pytest.mark.parametrize(("combine", "scope"), [x for x in MODES if x != ("alpha", "all")])
def test_reading_everything_is_masked_dense_attention(combine, scope, where):
    module = SparseLinearAttention(config(topk=1.0, combine=combine, linear_scope=scope), 4, 16)
    q, k, v = batch(*inputs(), where)
    tally = torch.zeros(3, dtype=torch.int64)
    o = module(q, k, v, text=where, text_tokens=TEXT, text_lengths=LENGTHS, tally=tally)
    mask = torch.ones(len(LENGTHS), k.shape[2], dtype=torch.bool)
    for row, n in enumerate(LENGTHS.tolist()):
        hidden = slice(n, TEXT) if where == "first" else slice(TOKENS + n, None)
        mask[row, hidden] = False
    assert torch.equal(valid_keys(k.shape[2], where, TEXT, LENGTHS), mask)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None, None], enable_gqa=True
    )
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)
    assert tally[1] == tally[2] == 4 * q.shape[2] * mask.sum()


@pytest.mark.parametrize("router", ["spread", "learned"])
@every_place
@every_mode
def test_forward_and_gradients_are_those_of_each_row_alone(combine, scope, where, router):
    module = layer(4, 16, combine=combine, linear_scope=scope, router=router)
    image, words = inputs()
    o = module(
        *batch(image, words, where), text=where, text_tokens=TEXT, text_lengths=LENGTHS, scale=0.31
    )
    assert o.isfinite().all()
    rows = each_alone(module, image, words, where, scale=0.31)
    generator = torch.Generator().manual_seed(3)
    got, wanted = [], []
    for i, expected in enumerate(rows):
        actual = counted(o, where, i)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
        upstream = torch.randn(expected.shape, dtype=expected.dtype, generator=generator)
        got.append((actual * upstream).sum())
        wanted.append((expected * upstream).sum())
    targets = [*image, *words, *module.parameters()]
    grads = (torch.autograd.grad(sum(x), targets, allow_unused=True) for x in (got, wanted))
    for x, a, b in zip(targets, *grads, strict=True):
        exact = x.dtype == torch.float64  # weights are in fp32
        torch.testing.assert_close(a, b, rtol=1e-8 if exact else 1e-4, atol=1e-9 if exact else 1e-4)


@every_place
@pytest.mark.parametrize("scope", LINEAR_SCOPES)
def test_totals_that_are_kept_elsewhere_give_the_same(scope, where):
    module = layer(4, 16, combine="proj", linear_scope=scope)
    options = {"text": where, "text_tokens": TEXT, "text_lengths": LENGTHS}
    with torch.no_grad():
        image, words = inputs()
        q, k, v = batch(image, words, where)
        state = LinearState.from_keys(*image[1:])
        fresh = module(q, k, v, **options)
        kept = module(q, k, v, state=state, **options)
    torch.testing.assert_close(kept, fresh, rtol=1e-9, atol=1e-10)


@every_place
def test_the_share_of_the_exact_branch_is_measured_without_padding(where):
    image, words = inputs()
    shares = []
    for row in range(len(LENGTHS)):
        module = SparseLinearAttention(config(combine="alpha"), 4, 16)
        options = {"text": where, "text_tokens": int(LENGTHS[row])}
        module(*alone(image, words, where, row), **options)
        shares.append(module.alpha_logit.sigmoid())
    module = SparseLinearAttention(config(combine="alpha"), 4, 16)
    module(*batch(image, words, where), text=where, text_tokens=TEXT, text_lengths=LENGTHS)
    torch.testing.assert_close(module.alpha_logit.sigmoid(), torch.stack(shares).mean(0))


@every_place
def test_a_tally_counts_no_padding_keys(where):
    module = layer(4, 16, combine="none")
    image, words = inputs()
    tallies = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
    q, k, v = batch(image, words, where)
    module(q, k, v, text=where, text_tokens=TEXT, text_lengths=LENGTHS, tally=tallies[0])
    each_alone(module, image, words, where, tally=tallies[1])
    # Outputs of padding are computed like those of other text.
    more = 4 * int(((TEXT - LENGTHS) * (TOKENS + LENGTHS)).sum())
    assert tallies[0].tolist() == [1, int(tallies[1][1]) + more, int(tallies[1][2]) + more]


@every_place
@every_mode
def test_a_call_on_a_gpu_waits_for_nothing(combine, scope, where):
    module = layer(4, 16, combine=combine, linear_scope=scope).to("meta")
    q, k, v = (x.detach().half().to("meta") for x in batch(*inputs(), where))
    tally = torch.zeros(3, dtype=torch.int64, device="meta")
    options = {"text": where, "text_tokens": TEXT, "text_lengths": LENGTHS.to("meta")}
    with recording() as started, torch.no_grad():
        o = module(q, k, v, tally=tally, **options)
    assert started.syncs == []
    assert o.shape == q.shape
    assert started.launches.count("select_kernel") == 1


def packed(image, words):
    """Return rows [text, image, padding]."""
    return torch.stack(
        [
            torch.cat([w[:, :n], x, w[:, n:]], 1)
            for x, w, n in zip(image, words, LENGTHS.tolist(), strict=True)
        ]
    )


def test_images_that_begin_at_different_places_come_first_and_go_back():
    (image, *_), (words, *_) = inputs()
    rows = packed(image, words)
    there = padding_to_text(rows, TEXT, LENGTHS)
    assert torch.equal(there, torch.cat([image, words], 2))
    assert torch.equal(padding_to_end(there, TEXT, LENGTHS), rows)


def test_a_layer_of_rows_with_padding_at_their_ends():
    attention = LayerAttention(layer(4, 16), scheduled=True)
    attention.dense, attention.image = False, torch.empty(TOKENS, 0, dtype=torch.float32)
    attention.blocks = torch.empty(3, 0)
    attention.count_into(LayerCounts(torch.device("cpu")))
    image, words = inputs()
    rows = [packed(x, w) for x, w in zip(image, words, strict=True)]
    o = attention(*rows, text="first", padding=TEXT - LENGTHS)
    for row, n in enumerate(LENGTHS.tolist()):
        expected = attention(*alone(image, words, "first", row), text="first")
        torch.testing.assert_close(o[row, :, : n + ACTIVE], expected[0])
    assert attention.tally[0] == 1 + len(LENGTHS)
    assert not attention.counts.any()


@pytest.mark.parametrize("where", ["first", "last"])
def test_errors_against_dense_attention_leave_padding_out(where):
    """Regression in fine-tuning compares image outputs of sparse and dense attention."""
    module = layer(4, 16)
    image, words = inputs()
    error = squared_error(
        module, *batch(image, words, where), text=where, text_tokens=TEXT, text_lengths=LENGTHS
    )
    for row, n in enumerate(LENGTHS.tolist()):
        qkv = alone(image, words, where, row)
        expected = squared_error(module, *qkv, text=where, text_tokens=n)
        torch.testing.assert_close(error[row : row + 1], expected)


def test_observers_of_a_paused_layer_see_the_lengths():
    attention = LayerAttention(layer(4, 16), scheduled=True)
    attention.image = torch.empty(TOKENS, 0, dtype=torch.float32)
    seen = []
    attention.observer = lambda *qkv, **options: seen.append((qkv, options))
    image, words = inputs()
    rows = [packed(x, w) for x, w in zip(image, words, strict=True)]
    assert attention(*rows, text="first", padding=TEXT - LENGTHS) is None
    [(qkv, options)] = seen
    assert torch.equal(options.pop("text_lengths"), LENGTHS)
    assert options == {"text": "last", "text_tokens": TEXT, "scale": None}
    for x, i, w in zip(qkv, image, words, strict=True):
        assert torch.equal(x, torch.cat([i, w], 2))
