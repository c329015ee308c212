"""Benchmark of one attention layer that decodes a token from a long cache (kernels/bench_kv.py)."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from dit_accel.bench.prefill_speed import DTYPES
from dit_accel.bench.record import write_record
from dit_accel.bench.timing import seconds
from dit_accel.config import KVConfig
from dit_accel.llm.kvcache.cache import read_kv
from dit_accel.llm.kvcache.codebooks import CodebookForm, Codebooks, write_codebooks
from dit_accel.llm.kvcache.layer import ZoneLayer
from dit_accel.llm.kvcache.selector import selector_of
from dit_accel.llm.kvcache.store import ModelSizes, store_of

FORMAT_VERSION = 1
DENSE = "dense (sdpa)"
CLUSTER = 16
"""Average number of keys around one direction, so that clustering has structure to find."""


@dataclass
class KVDecode:
    """Seconds of one attention layer that reads a cache for one new token: dense attention of torch against caches."""

    output: Path
    lengths: tuple[int, ...] = (8192, 32768)
    heads: int = 4
    """Query heads."""
    kv_heads: int = 1
    """Key heads. Llama-3.1-8B has 32 query heads and 8 key heads."""
    head_dim: int = 128
    dtype: str = "fp32"
    """fp32 or bf16."""
    repeats: int = 20
    threads: int = 1
    device: str = "cpu"

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            settings = self._settings(Path(folder))
            for length in tqdm(self.lengths, desc="lengths"):
                rows += self._measure(length, settings)
        print_table(write_record(self.output, FORMAT_VERSION, self, rows))

    def _settings(self, folder: Path) -> dict[str, KVConfig]:
        """Return the settings of the caches by name. Codebooks are random; they cost the same as trained ones."""
        found = {name: read_kv(name) for name in KVConfig.PRESETS if name != "window"}
        wave = KVConfig.PRESETS["retroinfer"]
        two = {
            **wave,
            "select_options": {**wave.get("select_options", {}), "retrieve": 0.02, "least": 0},
        }
        found["retroinfer, 2 % read"] = read_kv(two)
        sizes = ModelSizes(1, self.kv_heads, self.head_dim)
        for bits, width, rope in (
            (4, 2, "after"),
            (2, 4, "after"),
            (4, 2, "before"),
            (2, 4, "before"),
        ):
            form = CodebookForm(
                sub_vectors=self.head_dim // width, bits=8, pairing="planes", rope=rope
            )
            books = torch.randn(1, 1, form.sub_vectors, 256, width)
            tensors = {"k": books, "v": books.clone()}
            if rope == "before":
                tensors["frequencies"] = 1e4 ** -torch.linspace(0, 1, self.head_dim // 2)
            path = folder / f"pq{bits}{rope}.safetensors"
            write_codebooks(path, Codebooks(form=form, sizes=sizes, layers=(0,), tensors=tensors))
            found[f"pq, {bits} bits{', keys before RoPE' if rope == 'before' else ''}"] = read_kv(
                {"store": "pq", "store_options": {"codebooks": str(path)}}
            )
        return found

    @torch.no_grad()
    def _measure(self, length: int, settings: dict[str, KVConfig]) -> list[dict[str, Any]]:
        q, k, v = self._tokens(length)
        new_q, new_k, new_v = (x[:, :, -1:] for x in (q, k, v))
        scale = self.head_dim**-0.5
        functions: dict[str, Callable[[], Any]] = {
            DENSE: lambda: scaled_dot_product_attention(new_q, k, v, enable_gqa=True)
        }
        layers: dict[str, ZoneLayer] = {}

        def one(layer: ZoneLayer) -> tuple[Tensor, ZoneLayer]:
            fork = layer.fork()
            return fork.attend(new_q, new_k, new_v, None, scale=scale, prompt=lambda: new_q), fork

        old_q, old_k, old_v = (x[:, :, :-1] for x in (q, k, v))
        for name, config in settings.items():
            layers[name] = layer = self._layer(config)
            # The outputs of the prompt are not needed.
            layer.attend(old_q, old_k, old_v, None, scale=scale, prompt=lambda: old_q)
            functions[name] = partial(one, layer)
        exact = functions[DENSE]()
        times = seconds(functions, self.repeats, self.device)
        dense = statistics.median(times[DENSE])
        whole = k.nbytes + v.nbytes
        found = []
        for name, values in times.items():
            took = statistics.median(values)
            row = {"length": length, "kind": name, "seconds": took, "dense_over_this": dense / took}
            if name in layers:
                out, fork = one(layers[name])
                row["bytes_share"] = layers[name].nbytes / whole
                row["read_share"] = fork.read / fork.calls
                row["error"] = float((out - exact).norm() / exact.norm())
            found.append(row)
        return found

    def _layer(self, config: KVConfig) -> ZoneLayer:
        store = store_of(config.store, config.store_options)
        store.prepare(0, ModelSizes(1, self.kv_heads, self.head_dim))
        selector = selector_of(config.select, config.select_options)
        return ZoneLayer(
            store, selector, sink=config.sink, recent=config.recent, flush=config.flush
        )

    def _tokens(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values. Keys are clustered around random directions, in random order."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.kv_heads, length, self.head_dim)
        centres = torch.randn(length // CLUSTER, self.head_dim, generator=generator)
        which = torch.randint(len(centres), shape[:3], generator=generator)
        k = centres[which] + 0.5 * torch.randn(shape, generator=generator)
        v = torch.randn(shape, generator=generator)
        q = 2 * centres[torch.randint(len(centres), (1, self.heads, length), generator=generator)]
        q, k, v = (x.to(self.device, DTYPES[self.dtype]) for x in (q, k, v))
        return q, k, v


def print_table(record: dict[str, Any]) -> None:
    """Print a line for each cache: speed-up over dense by length, bytes, tokens read, and error of the output."""
    rows = record["rows"]
    lengths = sorted({x["length"] for x in rows})
    last = lengths[-1]
    print(
        f"\n{record['heads']} heads over {record['kv_heads']}, head_dim {record['head_dim']}, {record['dtype']}, "
        f"{record['threads']} thread(s): dense over this\n"
    )
    heads = ["", *(str(n) for n in lengths), "bytes", "read", "error"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for kind in dict.fromkeys(x["kind"] for x in rows):
        found = {x["length"]: x for x in rows if x["kind"] == kind}
        if kind == DENSE:
            cells = [f"{1000 * found[n]['seconds']:.2f} ms" for n in lengths] + [
                "1.000",
                "1.000",
                "",
            ]
        else:
            x = found[last]
            cells = [f"{found[n]['dense_over_this']:.2f}x" for n in lengths]
            cells += [f"{x['bytes_share']:.3f}", f"{x['read_share']:.3f}", f"{x['error']:.3f}"]
        print(f"| {kind} | {' | '.join(cells)} |")
