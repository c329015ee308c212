"""Benchmark of key indexes: number of keys that they compare to find the best ones (kernels/bench_kv.py)."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from dit_accel.bench.record import write_record
from dit_accel.bench.timing import seconds
from dit_accel.llm.kvcache.graphs import KeyIndex, index_of
from dit_accel.llm.kvcache.selectors.graph import SAMPLES

FORMAT_VERSION = 1
WIDER = 1.5
"""Ratio of successive numbers of candidates."""
WIDEST = 2**13
"""Largest number of candidates of a search."""


@dataclass
class KVSearch:
    """Share of the keys that an index compares to find most of the best ones, for queries unlike the keys.

    Each index is searched with increasing numbers of candidates, until it finds the share `recall` of the `topk` best keys.
    """

    output: Path
    keys: int = 32768
    head_dim: int = 64
    groups: tuple[int, ...] = (64, 1024)
    """Numbers of different kinds of queries."""
    seen: int = SAMPLES
    """Number of prompt queries from which a graph is built."""
    topk: tuple[int, ...] = (16, 128)
    recall: float = 0.95
    degree: int = 32
    """Number of neighbours of each key in a graph."""
    queries: int = 50

    def run(self) -> None:
        torch.set_num_threads(1)
        kinds = ["flat", "graph"]
        if importlib.util.find_spec("faiss"):
            kinds += ["hnsw", "nsg"]
        rows = []
        with tqdm(total=len(self.groups) * len(kinds), desc="indexes") as bar:
            for groups in self.groups:
                k, seen, new = unlike_keys(
                    self.keys, self.head_dim, groups, self.queries, self.seen
                )
                for kind in kinds:
                    rows += self._measure(kind, k, seen, new, groups)
                    bar.update()
        print_table(write_record(self.output, FORMAT_VERSION, self, rows))

    def _measure(
        self, kind: str, k: Tensor, seen: Tensor, new: Tensor, groups: int
    ) -> list[dict[str, Any]]:
        slots = torch.arange(len(k))
        made: list[KeyIndex] = []

        def build() -> None:
            flat = kind == "flat"
            made.append(KeyIndex(k, slots) if flat else index_of(kind, k, slots, seen, self.degree))

        took = seconds({kind: build}, 1, "cpu")[kind][0]
        rows = []
        for count in self.topk:
            best, width = (new @ k.mT).topk(count).indices, count
            while True:
                found, _, compared = made[-1].search(new, count, width)
                recall = found_share(found, best)
                if recall >= self.recall or kind == "flat" or WIDER * width > min(WIDEST, len(k)):
                    break
                width = math.ceil(WIDER * width)
            row = {"groups": groups, "topk": count, "kind": kind, "width": width, "recall": recall}
            rows.append(row | {"compared_share": compared, "build_seconds": took})
        return rows


def unlike_keys(
    n: int = 2048, dim: int = 32, groups: int = 64, new: int = 50, seen: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys `[n, dim]`, queries of a prompt, and new queries.

    A query matches a group of keys in a quarter of the channels. The other channels of a key depend on its position, and
    determine most of the distance between keys.
    """
    generator = torch.Generator().manual_seed(0)
    content = dim // 4

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    codes = normalize(noise(groups, content), dim=1)
    turn = torch.linspace(0, 1, n)[:, None] * torch.arange(1, (dim - content) // 2 + 1) * 2
    place = torch.cat([turn.cos(), turn.sin()], 1) * 2 + 0.3 * noise(n, dim - content)
    own = torch.randint(0, groups, (n,), generator=generator)
    k = torch.cat([codes[own] * 2 + 0.2 * noise(n, content), place], 1)
    asked = torch.randint(0, groups, (seen + new,), generator=generator)
    match = codes[asked] * 8 + 0.3 * noise(len(asked), content)
    q = torch.cat([match, -1 + 0.1 * noise(len(asked), dim - content)], 1)
    return k, q[:seen], q[seen:]


def found_share(found: Tensor, best: Tensor) -> float:
    """Return the share of the best keys `[l, n]` that are in `found`."""
    return (found[:, :, None] == best[:, None]).any(1).float().mean().item()


def print_table(record: dict[str, Any]) -> None:
    """Print a line for each kind of index and set of queries."""
    keys, dim, recall = record["keys"], record["head_dim"], record["recall"]
    print(
        f"\n{keys} keys of {dim} channels: share compared to find {recall:.0%} of the best ones\n"
    )
    print("| kinds of queries | best keys | index | candidates | found | compared | building |")
    print("|---|---|---|---|---|---|---|")
    for x in record["rows"]:
        share = "not counted" if x["compared_share"] is None else f"{x['compared_share']:.1%}"
        print(
            f"| {x['groups']} | {x['topk']} | `{x['kind']}` | {x['width']} | {x['recall']:.1%} | {share} | "
            f"{x['build_seconds']:.1f} s |"
        )
