"""Kernel of look-up attention against attention over decoded keys and values."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels.lut_attention import kernel, lut_attention, op
from dit_accel.llm.kvcache.codebooks import CodebookForm, Codebooks, write_codebooks
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.store import ModelSizes, store_of
from dit_accel.llm.kvcache.stores import codes

from .cases import cases

close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True, scope="module")
def short_spans():
    """Use short spans, so that a small problem has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "SPAN", 16)
        patch.setattr(kernel, "PROGRAMS", 12)
        yield


def problem(batch, heads, rows, length, parts, width, count, books, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, rows, parts * width, generator=g).to(dtype)
    numbers = torch.randint(count, (2, batch, heads, length + 3, parts), generator=g).byte()
    centroids = torch.randn(2, books, parts, count, width, generator=g).to(dtype)
    k_codes, v_codes = numbers[:, :, :, 1 : length + 1]  # a view, as stores cut them
    return q, k_codes, v_codes, *centroids


def decoded(codes, centroids):
    books = centroids.expand(codes.shape[1], -1, -1, -1)
    heads = torch.arange(codes.shape[1])[:, None, None]
    return books[heads, torch.arange(codes.shape[3]), codes.long()].flatten(3)


def launched(*arguments, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "runs_here", lambda x: True)
        patch.setattr(op, "lut_reference", None)  # would fail if it was called
        return lut_attention(*arguments, **options)


@settings(max_examples=cases(6, 10), deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    rows=st.sampled_from([1, 2, 3, 8, 16]),
    length=st.integers(1, 90),
    sizes=st.sampled_from([(8, 2), (4, 4), (6, 2), (5, 1), (2, 8), (9, 4)]),
    count=st.sampled_from([4, 16, 256]),
    shared=st.booleans(),
    share=st.sampled_from([None, 1.0, 0.5, 0.0]),
    seed=st.integers(0, 99),
)
def test_attention_is_that_over_decoded_keys(
    batch, heads, rows, length, sizes, count, shared, share, seed
):
    given = problem(batch, heads, rows, length, *sizes, count, 1 if shared else heads, seed)
    visible = None
    if share is not None:
        generator = torch.Generator().manual_seed(seed)
        some = 1 if seed % 2 else heads
        visible = torch.rand(batch, some, length, generator=generator) < share
    q, k, v = given[0], decoded(given[1], given[3]), decoded(given[2], given[4])
    scores = q @ k.mT * 0.3
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    want = scores.softmax(-1).nan_to_num() @ v
    for found in (launched(*given, scale=0.3, visible=visible), lut_attention(*given, scale=0.3, visible=visible)):  # fmt: skip
        close(found[0], want)
        close(found[1], scores.logsumexp(-1))


@settings(max_examples=cases(4, 10), deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    rows=st.sampled_from([1, 3, 16]),
    length=st.integers(1, 70),
    sizes=st.sampled_from([(8, 2), (4, 4), (3, 2), (2, 8), (5, 6)]),
    shared=st.booleans(),
    hidden=st.booleans(),
    first=st.sampled_from([0, 100, 4000]),
    seed=st.integers(0, 99),
)
def test_keys_before_rope_are_rotated(
    batch, heads, rows, length, sizes, shared, hidden, first, seed
):
    given = problem(batch, heads, rows, length, *sizes, 16, 1 if shared else heads, seed)
    generator = torch.Generator().manual_seed(seed)
    some = 1 if seed % 2 else heads
    positions = first + torch.randint(90, (batch, some, length), generator=generator).int()
    half = sizes[0] * sizes[1] // 2
    frequencies = 1e4 ** -torch.linspace(0, 1, half)
    visible = torch.rand(batch, 1, length, generator=generator) < 0.7 if hidden else None
    q, k, v = given[0], decoded(given[1], given[3]), decoded(given[2], given[4])
    angles = positions[..., None].double() * frequencies.double()
    cos, sin = angles.cos().float(), angles.sin().float()
    real, imag = k.unflatten(-1, (half, 2)).unbind(-1)
    turned = torch.stack([real * cos - imag * sin, real * sin + imag * cos], -1).flatten(-2)
    scores = q @ turned.mT * 0.3
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    want = scores.softmax(-1).nan_to_num() @ v
    options = {"visible": visible, "positions": positions, "frequencies": frequencies}
    for call in (launched, lut_attention):
        o, lse = call(*given, scale=0.3, **options)
        torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_half_precision_and_equal_bits():
    given = problem(2, 2, 4, 100, 8, 2, 256, 1, 0, torch.float16)
    o, lse = launched(*given, scale=0.3)
    want, sums = lut_attention(*(x.double() if x.is_floating_point() else x for x in given), scale=0.3)  # fmt: skip
    assert (o.dtype, lse.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(o.double(), want, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-3, atol=1e-3)
    again = launched(*given, scale=0.3)
    assert torch.equal(again[0], o)
    assert torch.equal(again[1], lse)


def test_sizes_that_do_not_fit():
    q, k_codes, v_codes, k, v = problem(1, 2, 1, 5, 4, 2, 16, 1, 0)
    with pytest.raises(ValueError, match=r"^v_centroids: .*4, C, 2\]"):
        lut_attention(q, k_codes, v_codes, k, v[:, :2], scale=1.0)


@pytest.mark.parametrize("options", [{"frequencies": torch.ones(8)}, {"positions": None}])
def test_rotations_that_do_not_fit(options):
    given = problem(1, 2, 1, 5, 2, 3, 16, 1, 0)
    positions = torch.zeros(1, 1, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="frequencies: "):
        lut_attention(
            *given, scale=1.0, **{"positions": positions, "frequencies": torch.ones(3), **options}
        )


@pytest.mark.parametrize(
    "form", [{}, {"pairing": "planes"}, {"pairing": "planes", "rope": "before"}], ids=str
)
@pytest.mark.parametrize("scope", ["layer", "head"])
def test_the_cache_of_a_language_model_takes_the_kernel_on_a_gpu(
    form, scope, tmp_path, monkeypatch
):
    g = torch.Generator().manual_seed(0)
    form = CodebookForm(sub_vectors=8, bits=8, scope=scope, centred=True, **form)
    books = {x: torch.randn(1, 2 if scope == "head" else 1, 8, 256, 2, generator=g) for x in "kv"}
    books |= {f"{x}_mean": torch.randn(1, 2, 16, generator=g) for x in "kv"}
    if form.rope == "before":
        books["frequencies"] = 1e4 ** -torch.linspace(0, 1, 8)
    sizes = ModelSizes(1, 2, 16)
    path = tmp_path / "pq.safetensors"
    write_codebooks(path, Codebooks(form=form, sizes=sizes, layers=(0,), tensors=books))
    store = store_of("pq", {"codebooks": str(path)})
    store.prepare(0, sizes)
    k, v = torch.randn(2, 2, 2, 70, 16, generator=g)
    valid = torch.ones(2, 1, 70, dtype=torch.bool)
    valid[1, :, :20] = False
    store.append(Part.of(k, v, valid, torch.arange(70).expand(2, 1, 70)))
    q = torch.randn(2, 2, 3, 1, 16, generator=g)
    want = store.attend(q, 0.3)
    for module in (op, codes):
        monkeypatch.setattr(module, "runs_here", lambda x: True)
    monkeypatch.setattr(codes, "coded_attention", None)
    found = store.attend(q, 0.3)
    close(found.o, want.o)
    close(found.lse, want.lse)
