"""Packed heads: query heads of a group that share lists, computed by one program, against the reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_accel.kernels import SparsePlan, block_sparse_attention
from dit_accel.kernels.block_sparse import triton_forward
from dit_accel.kernels.block_sparse.problem import Problem
from dit_accel.kernels.block_sparse.reference import block_sparse_reference
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.linear.spec import Linear

from ..kernels.plan_cases import masks, random_columns
from .cases import cases

INTERPRETER = Target("interpreter", "")
GROUPS = (2, 3, 4, 7, 8)


def tensors(plan, heads, kv_heads, d, *, batch=1, d_v=None, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    sizes = ((heads, plan.q_len, d), (kv_heads, plan.kv_len, d), (kv_heads, plan.kv_len, d_v or d))
    # Heads after lengths in memory, as models have them.
    return [torch.randn(batch, n, h, w, generator=g).to(dtype).transpose(1, 2) for h, n, w in sizes]


def attend(q, k, v, plan, *, want_lse=True, packed=True, **options):
    """Return output, lse and launches of the forward pass; with `packed=False` one head per program."""
    launches = []

    def run(launch: Launch) -> None:
        launches.append(launch)
        launch()

    options = {"scale": 0.3, "shared_softmax": False, "linear": None, **options}
    with pytest.MonkeyPatch.context() as patch:
        if not packed:
            patch.setattr(triton_forward, "packed_heads", lambda p: 1)
        o, lse, _, _ = triton_forward.forward(
            q, k, v, plan, want_lse=want_lse, target=INTERPRETER, run=run, **options
        )
    return o, lse, launches


def names(launches: list[Launch]) -> list[str]:
    return [x.kernel.__name__ for x in launches]


def most(group: int, block_q: int) -> int:
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * block_q <= 128))


def check(plan, group, kv_heads, d, *, dtype=torch.float32, **shape):
    """Compare with the reference over lists for each query head, check the launches, and return them."""
    heads = group * kv_heads
    q, k, v = tensors(plan, heads, kv_heads, d, dtype=dtype, **shape)
    expected, expected_lse = block_sparse_reference(
        *(x.double() for x in (q, k, v)), plan.for_heads(heads).listed(), scale=0.3
    )
    o, lse, launches = attend(q, k, v, plan)
    error = 5e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(o.double(), expected, rtol=error, atol=error)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=error, atol=error)
    assert torch.equal(attend(q, k, v, plan, want_lse=False)[0], o)
    packed = most(group, plan.block_q)
    assert launches[0].constants["HEADS_PACKED"] == packed
    assert launches[0].grid[1:] == (heads // packed, len(q))
    single, _, unpacked = attend(q, k, v, plan, packed=False)
    torch.testing.assert_close(single, o, rtol=error, atol=error)
    assert unpacked[0].constants["HEADS_PACKED"] == 1
    assert names(unpacked) == names(launches)
    return launches


@st.composite
def drawn_plans(draw, longest=80, long_rows=False):
    """Draw a plan with lists for each of 1 or 2 key heads, or for all, and the number of key heads."""
    kv_heads = draw(st.sampled_from([1, 2]), label="kv_heads")
    mask, geometry = draw(masks(longest, heads=(1, kv_heads), blocks=(16, 32, 64), batch=2))
    geometry.pop("skip", None)
    if long_rows:
        rows = draw(st.lists(st.integers(0, mask.shape[2] - 1), min_size=1, unique=True))
        mask[:, :, rows] = True
        geometry["long_rows"] = torch.tensor(rows)
    return SparsePlan.from_block_mask(mask, **geometry), kv_heads


# Every problem runs three times, for up to 32 heads.
@settings(max_examples=cases(3, 4), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=drawn_plans(), group=st.sampled_from(GROUPS), seed=st.integers(0, 99), half=st.booleans()
)
def test_drawn_plans(case, group, seed, half):
    plan, kv_heads = case
    dtype = torch.float16 if half else torch.float32
    check(plan, group, kv_heads, 16, batch=2, d_v=24, seed=seed, dtype=dtype)


@settings(max_examples=cases(3, 4), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=drawn_plans(60, long_rows=True), group=st.sampled_from(GROUPS), seed=st.integers(0, 99))
def test_drawn_plans_with_split_rows(case, group, seed):
    plan, kv_heads = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_forward, "SPLIT_TOKENS", 32)
        check(plan, group, kv_heads, 16, batch=2, seed=seed)


RULES = {
    "all": {},
    "causal": {"causal": True},
    "causal with an offset": {"causal": True, "q_offset": 37},
    "window": {"causal": True, "window": 40, "sink": 5},
    "columns": {"causal": True, "columns": (1, 2)},
    "columns of all": {"columns": (1, 1)},
    "kv_lengths": {"kv_lengths": torch.tensor([77])},
    "order of each key head": {"q_order": 2},
}


def ruled(rule: str, q_len: int, *, heads=2, block_q=64, **options) -> SparsePlan:
    """Return a plan of 150 keys in blocks of 32 with one of `RULES`."""
    g = torch.Generator().manual_seed(3)
    rules = {**RULES[rule], **options}
    if "columns" in rules:
        rules["columns"] = random_columns(150, rules["columns"], g)
    if "q_order" in rules:
        rules["q_order"] = torch.stack([torch.randperm(q_len, generator=g) for _ in range(2)])
    mask = torch.rand(1, heads, -(-q_len // block_q), 5, generator=g) < 0.5
    sizes = {"block_q": block_q, "block_k": 32, "q_len": q_len, "kv_len": 150}
    return SparsePlan.from_block_mask(mask, **sizes, **rules)


@pytest.mark.parametrize(
    ("q_len", "rule", "heads"),
    [
        *((100, rule, 2) for rule in RULES),
        *((1, rule, 1) for rule in RULES),
        *((100, rule, 1) for rule in ("causal", "columns of all")),
    ],
)
def test_rules_and_lengths(q_len, rule, heads):
    check(ruled(rule, q_len, heads=heads), 4, 2, 64)


@pytest.mark.parametrize(
    ("group", "d", "block_q"),
    [*((group, 64, 24) for group in GROUPS), (7, 64, 16), (8, 64, 16), (3, 128, 64), (4, 128, 64)],
)
def test_groups_and_head_dims(group, d, block_q):
    """Blocks of 24 rows, and groups of 3 and 7, leave rows of a tile unused."""
    check(ruled("causal", block_q + 6, block_q=block_q), group, 2, d)


def test_few_queries_split_over_programs(monkeypatch):
    monkeypatch.setattr(triton_forward, "SPLIT_TOKENS", 64)
    launches = check(ruled("columns", 2), 8, 2, 64)
    assert names(launches) == ["forward_kernel", "merge_kernel"]


@pytest.mark.parametrize("lists", [1, 2])
def test_block_means(lists):
    plan = ruled("all", 100, heads=lists)
    q, k, v = tensors(plan, 8, 2, 64)
    o, lse, launches = attend(q, k, v, plan, shared_softmax=True)
    expected, expected_lse, unpacked = attend(q, k, v, plan, packed=False, shared_softmax=True)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert launches[-1].constants["HEADS_PACKED"] == 2
    assert names(launches) == names(unpacked)


@pytest.mark.parametrize(("lists", "rows"), [(1, [0, 2]), (2, [1])], ids=str)
def test_split_rows_without_lists(lists, rows, monkeypatch):
    monkeypatch.setattr(triton_forward, "SPLIT_TOKENS", 32)
    mask = torch.rand(1, lists, 3, 6, generator=torch.Generator().manual_seed(5)) < 0.3
    mask[:, :, rows] = True
    sizes = {"block_q": 32, "block_k": 16, "q_len": 70, "kv_len": 90}
    plan = SparsePlan.from_block_mask(
        mask, **sizes, causal=True, long_rows=torch.tensor(rows), most=2
    )
    assert plan.has_prefix_rows
    launches = check(plan, 4, 2, 32)
    assert names(launches) == ["forward_kernel", "merge_kernel"]


@pytest.mark.parametrize("lists", [1, 2])
def test_public_function_packs_and_keeps_its_gradients(lists, monkeypatch):
    plan = ruled("columns" if lists == 2 else "window", 100, heads=lists)
    q, k, v = tensors(plan, 8, 2, 64)
    packed = []
    run = Launch.__call__
    monkeypatch.setattr(
        triton_forward.forward,
        "__kwdefaults__",
        {
            **triton_forward.forward.__kwdefaults__,
            "run": lambda launch: packed.append(launch.constants["HEADS_PACKED"]) or run(launch),
        },
    )
    o, lse = block_sparse_attention(q, k, v, plan, return_lse=True, backend="triton")
    expected, expected_lse = block_sparse_attention(q, k, v, plan, return_lse=True, backend="torch")
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert packed == [2]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = [
        torch.autograd.grad(block_sparse_attention(*leaves, plan, backend=x).square().sum(), leaves)
        for x in ("triton", "torch")
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def packed_on(target, group, *, d=128, dtype=torch.bfloat16, block_q=64, lists=2, linear=None):
    """Return the number of heads that a launch for a chip packs."""
    q, k = (torch.empty(1, n, 300, d, dtype=dtype, device="meta") for n in (2 * group, 2))
    mask = torch.ones(1, lists, -(-300 // block_q), 5, dtype=torch.bool)
    plan = SparsePlan.from_block_mask(mask, block_q=block_q, block_k=64, q_len=300, kv_len=300)
    return triton_forward.packed_heads(Problem(q, k, k, plan, False, linear, target, run=print))


CASES = {
    "four heads of blocks of 64": (2, {"group": 4}),
    "one set of lists for all": (2, {"group": 4, "lists": 1}),
    "as many as divide the group": (3, {"group": 6, "block_q": 32}),
    "the whole group": (7, {"group": 7, "block_q": 16}),
    "blocks of 128 fill a tile": (1, {"group": 4, "block_q": 128}),
    "two heads do not divide three": (1, {"group": 3}),
    "no group": (1, {"group": 1}),
    "lists for each query head": (1, {"group": 4, "lists": 8}),
    "smaller tiles in fp32": (1, {"group": 4, "dtype": torch.float32}),
    "smaller tiles of wide heads": (1, {"group": 4, "d": 256}),
    "linear branch": (1, {"group": 4, "lists": 1, "linear": Linear("softmax", "all")}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chip", ["80", "89", "90", "100", "120"])
def test_number_of_heads_by_tile(chip, case):
    expected, options = CASES[case]
    assert packed_on(Target("cuda", chip), **options) == expected


def test_tiles_of_64_rows_take_one_head():
    gfx942 = Target("hip", "gfx942")
    assert packed_on(gfx942, 4, d=128) == 1
    assert packed_on(gfx942, 4, d=64) == 2
