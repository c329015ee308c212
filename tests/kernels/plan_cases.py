"""Random geometries for property tests, and their meaning spelled out without any block logic."""

import torch
from hypothesis import strategies as st
from torch import Tensor

RULES = ("all", "causal", "shifted", "window", "kv_lengths", "causal_kv_lengths", "ragged")
DENSITIES = (0.0, 0.1, 0.4, 0.8, 1.0)


@st.composite
def geometries(draw, longest: int, blocks=(16, 32, 64, 128), rules=RULES, batch=None) -> dict:
    """Keyword arguments of `SparsePlan.from_block_mask`, for any length and visibility rule."""
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
    """`[*leading, T_q, T_k]` with about `density` of the blocks and, now and then, an empty row."""
    n_q = -(-geometry["q_len"] // geometry["block_q"])
    n_k = -(-geometry["kv_len"] // geometry["block_k"])
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(*leading, n_q, n_k, generator=g) < density
    if density < 1:
        mask &= torch.rand(*leading, n_q, 1, generator=g) < 0.9
    return mask


def visible_pairs(geometry: dict, *, windowed: bool = True) -> Tensor:
    """Which keys each query may see when every block is read, `[B|1, 1, Lq, Lk]`."""
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
    """A block mask with every block written out as tokens and the rules of `geometry` applied."""
    tokens = mask.repeat_interleave(geometry["block_q"], 2).repeat_interleave(
        geometry["block_k"], 3
    )
    return tokens[..., : geometry["q_len"], : geometry["kv_len"]] & visible_pairs(geometry)
