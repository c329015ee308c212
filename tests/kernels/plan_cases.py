"""Random geometries for property tests, and their dense masks, computed without block logic."""

import torch
from hypothesis import strategies as st
from torch import Tensor

RULES = ("all", "causal", "shifted", "window", "kv_lengths", "causal_kv_lengths", "ragged")
DENSITIES = (0.0, 0.1, 0.4, 0.8, 1.0)


@st.composite
def geometries(draw, longest: int, blocks=(16, 32, 64, 128), rules=RULES, batch=None) -> dict:
    """Draw keyword arguments of `SparsePlan.from_block_mask`, for any length and visibility rule."""
    rule = draw(st.sampled_from(rules), label="rule")
    q_len, kv_len = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    block_q, block_k = draw(st.sampled_from(blocks)), draw(st.sampled_from(blocks))
    geometry = {"block_q": block_q, "block_k": block_k, "q_len": q_len, "kv_len": kv_len}
    if "causal" in rule or rule in ("window", "shifted"):
        geometry["causal"] = True
    if rule == "shifted":
        geometry["q_offset"] = draw(st.integers(-q_len, kv_len))
    if rule == "window":
        geometry["window"] = draw(st.integers(1, kv_len))
        geometry["sink"] = draw(st.integers(0, 40))
    if "kv_lengths" in rule:
        n = batch or draw(st.integers(1, 2))
        lengths = draw(st.lists(st.integers(0, kv_len), min_size=n, max_size=n))
        geometry["kv_lengths"] = torch.tensor(lengths)
    if rule == "ragged":
        for name, n, block in (
            ("q_block_sizes", -(-q_len // block_q), block_q),
            ("k_block_sizes", -(-kv_len // block_k), block_k),
        ):
            sizes = st.lists(st.integers(0, block) | st.just(block), min_size=n, max_size=n)
            if draw(st.booleans()):
                geometry[name] = torch.tensor(draw(sizes))
    return geometry


def random_block_mask(
    geometry: dict, density: float, leading: tuple[int, int], seed: int
) -> Tensor:
    """Return a mask `[*leading, T_q, T_k]` with about `density` of the blocks, and sometimes an empty row."""
    n_q = -(-geometry["q_len"] // geometry["block_q"])
    n_k = -(-geometry["kv_len"] // geometry["block_k"])
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(*leading, n_q, n_k, generator=g) < density
    if density < 1:
        mask &= torch.rand(*leading, n_q, 1, generator=g) < 0.9
    return mask


def visible_pairs(geometry: dict, *, windowed: bool = True) -> Tensor:
    """Return the mask of visible pairs if every block is read, `[B|1, 1, Lq, Lk]`."""
    q_len, kv_len = geometry["q_len"], geometry["kv_len"]
    q, k = torch.arange(q_len)[:, None], torch.arange(kv_len)
    seen = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
    if geometry.get("causal"):
        last = q + geometry.get("q_offset", kv_len - q_len)
        seen = seen & (k <= last)
        if windowed and geometry.get("window"):
            seen = seen & ((k > last - geometry["window"]) | (k < geometry["sink"]))
    if (lengths := geometry.get("kv_lengths")) is not None:
        seen = seen & (k < lengths[:, None, None, None])
    if (sizes := geometry.get("q_block_sizes")) is not None:
        seen = seen & (q % geometry["block_q"] < sizes[q // geometry["block_q"]])
    if (sizes := geometry.get("k_block_sizes")) is not None:
        seen = seen & (k % geometry["block_k"] < sizes[k // geometry["block_k"]])
    return seen


def dense_mask(mask: Tensor, geometry: dict) -> Tensor:
    """Return a block mask expanded to tokens, with the rules of `geometry` applied."""
    tokens = mask.repeat_interleave(geometry["block_q"], 2).repeat_interleave(
        geometry["block_k"], 3
    )
    tokens = tokens[..., : geometry["q_len"], : geometry["kv_len"]]
    if (order := geometry.get("q_order")) is not None:
        tokens = tokens.repeat(1, max(1, len(order) // tokens.shape[1]), 1, 1)
        in_rows, tokens = tokens, torch.empty_like(tokens)
        for h in range(tokens.shape[1]):
            tokens[:, h, order[h % len(order)]] = in_rows[:, h]
    if (columns := geometry.get("columns")) is not None:
        shape = torch.broadcast_shapes(tokens.shape[:2], columns.shape[:2])
        tokens = tokens.expand(*shape, -1, -1).clone()
        for b in range(shape[0]):
            for h in range(shape[1]):
                keys = columns[b % len(columns), h % columns.shape[1]]
                tokens[b, h, :, keys[keys < geometry["kv_len"]]] = True
    return tokens & visible_pairs(geometry)


@st.composite
def masks(draw, longest: int, *, heads=(1, 3), **options) -> tuple[Tensor, dict]:
    """Draw a block mask and the other arguments of `from_block_mask`, sometimes with columns, a query order, or a skip mask."""
    geometry = draw(geometries(longest, **options))
    n_heads, seed = draw(st.sampled_from(heads)), draw(st.integers(0, 2**16), label="seed")
    mask = random_block_mask(geometry, draw(st.sampled_from(DENSITIES)), (1, n_heads), seed)
    g = torch.Generator().manual_seed(seed)
    if draw(st.booleans(), label="skip"):
        geometry["skip"] = torch.rand(mask.shape, generator=g) < 0.3
    if draw(st.booleans(), label="columns"):
        leading = len(geometry.get("kv_lengths", [0])), draw(st.sampled_from(heads))
        geometry["columns"] = random_columns(geometry["kv_len"], leading, g)
    if "q_block_sizes" not in geometry and draw(st.booleans(), label="q_order"):
        n = draw(st.sampled_from(sorted({1, n_heads})))
        order = [torch.randperm(geometry["q_len"], generator=g) for _ in range(n)]
        geometry["q_order"] = torch.stack(order)
        if "columns" in geometry:  # one number of heads, or one for all
            geometry["columns"] = geometry["columns"][:, : max(n, n_heads)]
    return mask, geometry


def random_columns(kv_len: int, leading: tuple[int, int], g: torch.Generator) -> Tensor:
    """Return columns `[*leading, 12]`: ascending keys, and `kv_len` in unused places."""
    columns = torch.full((*leading, 12), kv_len)
    for row in columns.flatten(0, 1):
        n = int(torch.randint(0, min(12, kv_len) + 1, (1,), generator=g))
        row[:n] = torch.randperm(kv_len, generator=g)[:n].sort().values
    return columns
