"""Benchmarks of key-value caches: times of a layer, and number of keys that indexes compare."""

import json

from dit_accel.bench.kv_decode import DENSE, KVDecode
from dit_accel.bench.kv_search import KVSearch
from dit_accel.config import KVConfig


def test_times_of_a_layer(tmp_path, capsys):
    path = tmp_path / "decode.json"
    KVDecode(output=path, lengths=(1024,), head_dim=32, repeats=2).run()
    rows = {x["kind"]: x for x in json.loads(path.read_text())["rows"]}
    assert {DENSE, *KVConfig.PRESETS} - {"window"} <= set(rows)
    assert rows["dense"]["error"] < 1e-5
    assert rows["dense"]["bytes_share"] == 1023 / 1024  # the new token is not there yet
    assert rows["int4"]["bytes_share"] < 0.5
    assert rows["quest"]["read_share"] < 0.6
    assert all(x["seconds"] > 0 for x in rows.values())
    assert "| pq, 4 bits, keys before RoPE |" in capsys.readouterr().out


def test_keys_that_indexes_compare(tmp_path, capsys):
    path = tmp_path / "search.json"
    KVSearch(
        output=path, keys=1024, head_dim=16, groups=(16,), topk=(8,), seen=256, queries=10
    ).run()
    rows = {x["kind"]: x for x in json.loads(path.read_text())["rows"]}
    assert rows["flat"]["recall"] == rows["flat"]["compared_share"] == 1.0
    assert rows["graph"]["recall"] >= 0.95
    assert rows["graph"]["compared_share"] < 0.3
    assert "| 16 | 8 | `graph` |" in capsys.readouterr().out
