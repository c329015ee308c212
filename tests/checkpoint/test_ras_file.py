"""`ras.json`: what is written comes back, and everything else is refused with its reason."""

import json

import pytest

from dit_accel import RASConfig
from dit_accel.checkpoint.ras_file import read_ras, write_ras


@pytest.mark.parametrize(
    "config",
    [
        *({"preset": name} for name in RASConfig.PRESETS),
        {"ratio": [(0, 0.5), (0.5, 0.25)], "resets": [0.3, 7], "max_age": 5},
        {"warmup": 4, "tail": 0.1, "max_age": None, "n_levels": None, "kv_cache": "fp8"},
    ],
    ids=str,
)
def test_what_is_written_comes_back(config, tmp_path):
    config = RASConfig.load(config["preset"]) if "preset" in config else RASConfig(**config)
    path = tmp_path / "ras.json"
    write_ras(path, config)
    assert read_ras(path) == config
    assert json.loads(path.read_text())["format_version"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["ras.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ras.json"
    write_ras(path, RASConfig(ratio=0.25))

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("dit_accel.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_ras(path, RASConfig())
    assert read_ras(path) == RASConfig(ratio=0.25)
    assert [p.name for p in tmp_path.iterdir()] == ["ras.json"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": None}, "format=None"),
        ({"format": "dit_accel.sla"}, "format='dit_accel.sla'"),
        ({"format_version": 2}, "format_version=2"),
        ({"format_version": "1"}, "format_version='1'"),
        ({"format_version": True}, "format_version=True"),
        ({"more": 1}, "'more'"),
        ({"config": None}, "config=None"),
        ({"config": [1]}, r"config=\[1\]"),
        ({"config": {"ration": 0.5}}, "'ration'.*'ratio'"),
        ({"config": {"ratio": 2}}, "ratio=2"),
        ({"config": {"ratio": float("nan")}}, "ratio=nan"),
        ({"config": {"ratio": "half"}}, "ratio='half'"),
        ({"config": {"resets": {}}}, "resets={}"),
        ({"config": {"selection": []}}, r"selection=\[\]"),
    ],
    ids=str,
)
def test_contradictions_are_named(unchecked, changes, named, tmp_path):
    path = tmp_path / "ras.json"
    write_ras(path, RASConfig())
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=rf"ras\.json: .*{named}"):
        read_ras(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000], ids=lambda x: repr(x[:4]))  # fmt: skip
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "ras.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"ras\.json: "):
        read_ras(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"ras\.json: .*file"):
        read_ras(tmp_path / "ras.json")
