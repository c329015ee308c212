"""JSON files with patterns by head: results of a search, and files of MInference."""

import json

import pytest
import torch

from dit_accel import llm
from dit_accel.config import PrefillConfig
from dit_accel.llm.prefill import Prompt, pattern_of
from dit_accel.llm.settings import prefill_settings

from .models import make, prompt

FOUND = {
    "format_version": 1,
    "kind": "llm-search",
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "by": "head",
    "block": 16,
    "tail": 16,
    "candidates": {
        "near": {"pattern": "triangle", "options": {"window": 0.1}},
        "far": {"pattern": "hybrid", "options": {"top_p": 0.8, "columns": 0.05}},
    },
    "chosen": [["dense"] * 4, ["near", "far", "dense", "near"], "near"],
}
LEGACY = [
    {
        "0": ["vertical_and_slash", 1000, 6096, 0.96],
        "1": ["stream_llm", 100, 800, 0.9],
        "2": ["block_sparse", 8, 1, 0.8],
    },
    {"0": ["vertical_and_slash", 10, 40, 0.9], "3": ["stream_llm", 8, 64, 0.9]},
    {},
]


@pytest.fixture
def write(tmp_path):
    def call(data):
        path = tmp_path / "found.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(path)

    return call


def test_a_result_of_a_search_is_a_setting(write):
    config = PrefillConfig.load(write(FOUND))
    assert (config.num_layers, config.block, config.tail) == (3, 16, 16)
    assert config.of_layer(0, 3) is None
    name, options = config.of_layer(1, 3)
    assert name == "by_head"
    assert options["heads"] == ["near", "far", "dense", "near"]
    assert options["choices"] == FOUND["candidates"]
    assert config.of_layer(2, 3) == ("triangle", {"window": 0.1})
    assert prefill_settings(write(FOUND), 0).crossover == 0
    model = llm.enable(make("Llama"), prefill=prefill_settings(write(FOUND), 0))
    with torch.no_grad():
        model(prompt(length=300))
    first, *others = llm.summary(model).layers
    assert first.dense_calls == {"dense layer": 1}
    assert all(x.sparse_calls == 1 and x.density < 0.95 for x in others)


def test_groups_count_as_groups(write):
    rows = [["near", "far"], ["far", "far"], ["near", "dense"]]
    config = PrefillConfig.load(write({**FOUND, "by": "group", "chosen": rows}))
    assert config.of_layer(0, 3)[1]["by"] == "group"
    assert config.of_layer(1, 3)[0] == "hybrid"
    llm.enable(make("Llama"), prefill=config)


@pytest.mark.parametrize("data", [FOUND, LEGACY], ids=["search", "minference"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, r"num_layers=3\b.*\b4\b"),
        ({"num_attention_heads": 8}, "heads has 4 entries.* 8 query heads"),
    ],
)  # fmt: skip
def test_a_model_of_another_size_is_refused(write, data, changes, message):
    with pytest.raises(ValueError, match=message):
        llm.enable(make("Llama", **changes), prefill=write(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"format_version=2\b.*\b1\b"),
        ({"candidates": None}, "candidates, chosen"),
        ({"chosen": []}, "candidates, chosen"),
        ({"by": "layer"}, "by='layer'.*group"),
        ({"heads": None}, "by='head'"),
        ({"heads": 5}, r"chosen\[0\]: .*4\b.*\b5\b"),
        ({"chosen": [["far"] * 4, ["fa"] * 4, "far"]}, r"chosen\[1\]: .*'fa'"),
        ({"layers": 4}, r"layers=4\b.*\b3\b"),
    ],
)
def test_a_bad_result_is_named_with_its_file(write, changes, message):
    path = write({**FOUND, **changes})
    with pytest.raises(ValueError, match=message) as error:
        PrefillConfig.load(path)
    assert str(error.value).startswith(path)


def test_other_json_files_are_read_as_yaml(write):
    assert PrefillConfig.load(write({"prefill": {"pattern": "triangle"}})).pattern == "triangle"
    with pytest.raises(ValueError, match=r"\.json.*JSON"):
        PrefillConfig.load(write("{"))
    with pytest.raises(ValueError, match=r"\.json.*'a'"):
        PrefillConfig.load(write({"a": 1}))


def test_files_of_minference_keep_their_numbers(write):
    config = PrefillConfig.load(write(LEGACY))
    assert (config.num_layers, config.block) == (3, 64)
    name, options = config.of_layer(0, 3)
    assert name == "by_head"
    chosen = [options["choices"][x] for x in options["heads"]]
    assert [x["pattern"] for x in chosen] == ["vertical_slash", "triangle", "blocks", "vertical_slash"]  # fmt: skip
    assert chosen[0] == chosen[3]  # heads that are not named have the default
    assert chosen[0]["options"]["min_columns"] == 1000
    assert chosen[0]["options"]["min_slashes"] == 96  # bands of 64
    assert chosen[1]["options"] == {"sink": 100, "window": 800}
    assert chosen[2]["options"]["count"] == 100
    least = config.of_layer(1, 3)[1]["choices"]["vertical_and_slash 10 40"]["options"]
    assert (least["min_columns"], least["min_slashes"]) == (30, 1)
    llm.enable(make("Llama"), prefill=config)


def test_numbers_of_a_file_hold_at_every_length():
    for length in (512, 1024):
        q, k = (torch.randn(1, 1, length, 8) for _ in range(2))
        options = {"columns": 1e-6, "min_columns": 30, "slashes": 1e-6, "min_slashes": 2}
        plan = pattern_of("vertical_slash", options).plan(Prompt(q, k, scale=0.3, tail=0))
        assert (plan.columns < length).sum() == 30
        # Two bands of distances lie in three or four blocks of a row; the first block, the diagonal and the one before.
        assert plan.to_block_mask()[0, 0, -1].sum() <= 7


def test_a_number_of_blocks_is_that_of_each_row():
    q, k = (torch.randn(1, 1, 512, 8) for _ in range(2))
    options = {"top_p": None, "count": 3}
    plan = pattern_of("blocks", options).plan(Prompt(q, k, scale=0.3, block=16, tail=0))
    rows = plan.to_block_mask()[0, 0].sum(-1)
    assert 3 <= rows[-1] <= 6
    many = pattern_of("blocks", {"top_p": None, "count": 99})
    assert many.plan(Prompt(q, k, scale=0.3, block=16)).density() == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "head"),
        ([{}], "head"),
        ([5], "layer 0: .*mapping"),
        ([{"a": ["stream_llm", 1, 2]}], "layer 0: .*mapping"),
        ([{"0": ["stream_llm", 1]}], "layer 0, head 0: .*score"),
        ([{}, {"1": ["flex", 1, 2, 0.5]}], "layer 1, head 1: .*'flex'.*vertical"),
    ],
)
def test_bad_files_of_minference_are_named(write, data, message):
    with pytest.raises(ValueError, match=message):
        PrefillConfig.load(write(data))
