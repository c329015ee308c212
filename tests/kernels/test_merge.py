import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.kernels import SparsePlan, block_sparse_attention, merge_lse

ROWS = {"block_q": 16, "block_k": 16, "q_len": 40, "kv_len": 75}


def tensors(dtype=torch.float64, requires_grad=False):
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, h, n, 8, generator=g, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
        for h, n in ((4, 40), (2, 75), (2, 75))
    ]  # fmt: skip


def attend(qkv, mask):
    return block_sparse_attention(
        *qkv, SparsePlan.from_block_mask(mask, **ROWS), return_lse=True, backend="torch"
    )


@given(st.integers(1, 4), st.integers(0, 2**16))
def test_parts_over_disjoint_keys_merge_into_attention_over_all_of_them(n_parts, seed):
    owner = torch.randint(-1, n_parts, (1, 4, 3, 5), generator=torch.Generator().manual_seed(seed))
    qkv = tensors()
    expected = attend(qkv, owner >= 0)  # rows without any key among them
    merged = merge_lse(*(attend(qkv, owner == part) for part in range(n_parts)))
    for a, b in zip(merged, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_pass_through_a_merge():
    mask = torch.rand(1, 4, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, :, 1] = False
    whole, parts = tensors(requires_grad=True), tensors(requires_grad=True)
    o, lse = attend(whole, torch.ones_like(mask))
    merged, merged_lse = merge_lse(attend(parts, mask), attend(parts, ~mask))
    g = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in (o, lse)]
    expected = torch.autograd.grad((o, lse), whole, upstream)
    actual = torch.autograd.grad((merged, merged_lse), parts, upstream)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_half_parts_are_merged_in_single_precision():
    mask = torch.arange(5) < 2
    qkv = [x.half().double() for x in tensors()]
    parts = [attend(qkv, m.expand(1, 1, 3, 5)) for m in (mask, ~mask)]
    half = [(o.half(), lse.float()) for o, lse in parts]
    o, lse = merge_lse(*half)
    assert (o.dtype, lse.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(o.double(), merge_lse(*parts)[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_a_part_holds_where_it_has_no_key_does_not_matter(value):
    o, lse = attend(tensors(), torch.ones(1, 1, 3, 5, dtype=torch.bool))
    empty = torch.full_like(o, value), torch.full_like(lse, -torch.inf)
    merged = merge_lse(empty, (o, lse))
    torch.testing.assert_close(merged[0], o)
    nothing = merge_lse(empty, empty)
    assert (nothing[0] == 0).all()
    assert (nothing[1] == -torch.inf).all()


def test_huge_sums_do_not_overflow():
    o = torch.ones(1, 1, 1, 4)
    merged, lse = merge_lse((o, torch.full((1, 1, 1), 3e4)), (3 * o, torch.full((1, 1, 1), 3e4)))
    torch.testing.assert_close(merged, 2 * o)
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 3e4) + torch.tensor(2.0).log())


O = torch.zeros(1, 2, 3, 4)
LSE = torch.zeros(1, 2, 3)
BAD = {
    "no part": ("parts: ", []),
    "tensors in place of pairs": (r"parts\[0\]: .*Tensor", [O, LSE]),
    "other lengths": (r"parts\[1\]: o .*2, 4\)", [(O, LSE), (O[:, :, :2], LSE[..., :2])]),
    "other dtype": (r"parts\[1\]: o .*float16", [(O, LSE), (O.half(), LSE)]),
    "lse of another shape": (r"parts\[0\]: lse .*3, 1\)", [(O, LSE[..., None])]),
    "lse elsewhere": (r"parts\[1\]: lse .*meta", [(O, LSE), (O, LSE.to("meta"))]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_part_is_named(case, unchecked):
    message, parts = BAD[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        merge_lse(*parts)
