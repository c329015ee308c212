"""Random tokens, and a check of any store against a list of its decoded tokens."""

import torch
from hypothesis import strategies as st

from dit_accel.llm.kvcache.part import Part, joined
from dit_accel.llm.kvcache.partial import attention_part

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("crop"), st.integers(1, 70)),
        st.tuples(st.just("rows"), st.permutations([0, 1])),
        st.tuples(st.just("fork"), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=7,
)


def tokens(count, *, rows=2, heads=2, head_dim=16, seed=0, dtype=torch.float32, padding=0):
    """Return exact tokens; the first `padding` of row 1 hold nothing."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, rows, heads, count, head_dim, generator=generator).to(dtype)
    k = k * 3 + torch.linspace(-5, 5, head_dim, dtype=dtype)  # channels with large means
    valid = None
    if padding:
        valid = torch.ones(rows, 1, count, dtype=torch.bool)
        valid[1, :, :padding] = False
    first = torch.tensor([5, 2**17])[torch.arange(rows) % 2]  # of each row
    return Part.of(k, v, valid, (first[:, None, None] + torch.arange(count)).int())


def decoded(store):
    """Return the tokens of a store as it gives them back."""
    whole = store.cut(0, store.slots)
    return Part.of(*store.decode(whole.tensors), whole.valid)


def same(found, want):
    """Compare tokens bit by bit."""
    assert found.slots == want.slots
    assert torch.equal(found.k, want.k)
    assert torch.equal(found.v, want.v)
    assert torch.equal(*(real(x) for x in (found, want)))


def real(part):
    """Return the slots with a real token, for each head."""
    every = torch.ones(part.k.shape[:3], dtype=torch.bool)
    return every if part.valid is None else every & part.valid


def check_operations(store, operations, padding=0, **sizes):
    """Apply operations to a store; each must give the tokens that a list of decoded ones has."""
    granule, seed = store.granule, 0

    def read(store, count, padding=0):
        nonlocal seed
        seed += 1
        new = tokens(count * granule, seed=seed, padding=padding, **sizes)
        alone = store.fork()
        alone.clear()
        alone.append(new)
        store.append(new)
        return decoded(alone)

    want = read(store, 2, padding)
    for what, how in operations:
        if what == "append":
            want = joined(want, read(store, how))
        elif what == "rows":
            index = torch.tensor(how)
            store.rows(index)
            want = want.rows(index)
        elif what == "crop" and store.slots:
            kept = max(0, store.slots - how)
            whole = kept // granule * granule
            rest = store.crop(how)
            assert (rest is None) == (kept == whole)
            if rest is not None:
                same(rest, want.cut(whole, kept))
            want = want.cut(0, whole)
        elif what == "fork":
            read(store.fork(), how)
        if store.slots:
            same(decoded(store), want)
        else:
            assert want.slots == 0
    check_reading(store, want)


def check_reading(store, want):
    """Compare attention over all tokens, and over some, with attention over decoded ones."""
    if not store.slots:
        return
    generator = torch.Generator().manual_seed(1)
    rows, heads, slots, head_dim = want.k.shape
    q = torch.randn(rows, heads, 3, 2, head_dim, generator=generator).to(want.k.dtype)
    found = store.attend(q, 0.2)
    expected = attention_part(q, want.k, want.v, scale=0.2, visible=want.valid)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-5, atol=1e-5)
    some = expected.lse > -torch.inf  # outputs of rows without a key are never read
    torch.testing.assert_close(found.o[some], expected.o[some], rtol=1e-5, atol=1e-5)
    index = torch.randint(slots, (rows, heads, 5), generator=generator)
    some = store.take(index)
    same(Part.of(*store.decode(some.tensors), some.valid), want.take(index))
