import dataclasses
import json
import re

import pytest
import yaml

from dit_accel.config import PrefillConfig, RASConfig, SLAConfig

# A config comes from people, whose wrong types have to reach our own messages.
pytestmark = pytest.mark.usefixtures("unchecked")

BAD_VALUES = {
    "topk": [0, -0.1, 1.5, float("nan"), "half", True],
    "top_p": [0, -0.1, 1.5, float("nan"), "half", True],
    "router": ["max", "", None],
    "rounding": ["round", None, 1],
    "skip": [-0.1, 1, float("nan"), "0", True, None],
    "linear_scope": ["none", "", None],
    "feature_map": ["hedgehog", "", None],
    "block_q": [0, 48, 256, "64", 64.0, None, "wide"],
    "block_k": [0, 48, 256, "64", 64.0, None],
    "combine": ["sum", "", None, 1],
    "order": ["hilbert", (4, 4), (4, 4, 4, 1), (4, 4, 4.0), (0, 8, 8), (-4, -4, 4), 64],
    "dense_steps": [-1, 1.5, -0.1, float("nan"), "2", True, None],
    "dense_layers": [-1, 0.5, "0", True, None, [0.5], (0, "1"), (True,)],
    "topk_by_layer": [[0.5], 0.5, None, {"first": 0.5}, {0.5: 0.5}, {"²": 0.5}, {1: 0}, {1: "x"}],
    "crossover": ["always", None, 4096],
}
FULL = SLAConfig(
    topk=0.3,
    top_p=0.8,
    router="mean",
    rounding="floor",
    skip=0.1,
    block_q=32,
    block_k=32,
    combine="alpha",
    linear_scope="marginal",
    feature_map="elu",
    order=(2, 4, 4),
    dense_steps=3,
    dense_layers=(0, -1),
    topk_by_layer={2: 0.5, -2: 1.0},
    crossover="never",
)


def test_every_field_has_bad_values_here():
    assert set(BAD_VALUES) == {f.name for f in dataclasses.fields(SLAConfig)}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values]
)
def test_a_bad_value_is_refused_by_field_name_and_accepted_values(name, value):
    with pytest.raises(ValueError, match=rf"^{name}(\[.*\])?=") as error:
        SLAConfig(**{name: value})
    shown = value
    if isinstance(value, dict):  # the entry at fault, not the whole table
        shown = next(x for x in value.values()) if "[" in str(error.value) else next(iter(value))
    assert repr(shown) in str(error.value)


def test_the_order_follows_the_grid_unless_it_is_named():
    for block in (16, 32, 64, 128):
        for frames in (1, 2):
            tile = SLAConfig(block_q=block).tile_of((frames, 8, 8))
            assert tile[0] * tile[1] * tile[2] == block
            assert (tile[0] == 1) == (frames == 1)
    assert SLAConfig(order="raster").tile_of((2, 8, 8)) is None
    assert SLAConfig(order=(4, 4, 4)).tile_of((1, 8, 8)) == (4, 4, 4)


def test_one_of_topk_and_top_p_is_needed():
    config = SLAConfig(topk=None, top_p=0.9, crossover="never")
    assert config.layer_topk(0, 2) is None
    with pytest.raises(ValueError, match=r"^top_p=0.9: .*crossover"):
        SLAConfig(top_p=0.9)
    with pytest.raises(ValueError, match="topk=None, top_p=None"):
        SLAConfig(topk=None)


def test_skipping_needs_a_linear_branch_that_can_skip():
    SLAConfig(skip=0.1, combine="proj", linear_scope="marginal")
    for settings in ({}, {"combine": "alpha"}, {"linear_scope": "marginal"}):
        with pytest.raises(ValueError, match=r"skip=0\.1: .*combine"):
            SLAConfig(skip=0.1, **settings)


def test_a_tile_must_fill_its_block():
    SLAConfig(order=(4, 4, 4))
    with pytest.raises(ValueError, match=r"order=\(2, 4, 4\).*block_q.*64"):
        SLAConfig(order=(2, 4, 4))
    with pytest.raises(ValueError, match=r"order=\(4, 4, 4\).*block_k.*32"):
        SLAConfig(order=(4, 4, 4), block_k=32)


@pytest.mark.parametrize(
    "values",
    [
        {"topk": 1},
        {"topk": 1e-6},
        {"dense_steps": 0},
        {"dense_steps": 0.0},
        {"dense_steps": 1.0},
        {"dense_steps": 50},
        {"dense_layers": 0},
        {"dense_layers": ()},
        {"block_q": 16, "block_k": 128},
    ],
    ids=str,
)
def test_the_ends_of_each_range_are_accepted(values):
    config = SLAConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_presets_range_from_quality_to_fast():
    quality, balanced, fast = map(SLAConfig.load, ("quality", "balanced", "fast"))
    assert list(SLAConfig.PRESETS) == ["quality", "balanced", "fast", "few-step"]
    assert balanced == SLAConfig()
    assert quality.topk > balanced.topk > fast.topk
    assert quality.dense_steps > balanced.dense_steps > fast.dense_steps


def test_load_returns_a_config_as_it_is_and_reads_dicts():
    assert SLAConfig.load(FULL) is FULL
    assert SLAConfig.load({"topk": 0.5}) == SLAConfig(topk=0.5)


@pytest.mark.parametrize(("typo", "meant"), [("ballanced", "balanced"), ("Fast", "fast")])
def test_an_unknown_preset_suggests_the_nearest_one(typo, meant):
    with pytest.raises(ValueError, match=rf"sla='{typo}'.*'{meant}'.*quality"):
        SLAConfig.load(typo)


def test_a_source_of_another_kind_is_refused_by_name():
    with pytest.raises(ValueError, match=r"sla=0\.5: .*SLAConfig"):
        SLAConfig.load(0.5)


def test_an_unknown_key_suggests_the_nearest_one():
    with pytest.raises(ValueError, match=r"'top_k'.*mean 'topk'"):
        SLAConfig.from_dict({"top_k": 0.5})
    with pytest.raises(ValueError, match="'zzz'") as error:
        SLAConfig.from_dict({"zzz": 1})
    assert all(f.name in str(error.value) for f in dataclasses.fields(SLAConfig))


@pytest.mark.parametrize("config", [SLAConfig(), FULL], ids=["default", "full"])
def test_a_config_survives_dict_json_and_yaml(config, tmp_path):
    values = config.to_dict()
    assert SLAConfig.from_dict(values) == config
    assert SLAConfig.from_dict(json.loads(json.dumps(values))) == config
    path = tmp_path / "sla.yaml"
    path.write_text(yaml.safe_dump({"sla": values}), encoding="utf-8")
    assert SLAConfig.load(path) == SLAConfig.load(str(path)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sia:\n  topk: 0.5\n",
            r"'sia'.*mean 'sla'.*ras:, sla:, prefill:, kv:",
        ),
        (
            "sla: {topk: 0.5}\ntrain: {}\n",
            "'train'; .*ras:, sla:, prefill:, kv:",
        ),
        ("ras: {}\n", "sla:"),
        ("sla:\n", "sla:"),
        ("sla: [1]\n", "sla:"),
        ("topk", "mapping.*sla:"),
        ("", "mapping.*sla:"),
        ("sla: {topk: [", "YAML"),
        ("sla: {topkk: 0.5}", "'topkk'.*mean 'topk'"),
        ("sla: {topk: 2}", "topk=2"),
    ],
    ids=lambda x: None,
)
def test_a_bad_yaml_file_is_refused_with_its_path(text, message, tmp_path):
    path = tmp_path / "sla.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}"):
        SLAConfig.load(path)


def test_a_file_that_is_no_text_or_not_there_is_refused_with_its_path(tmp_path):
    path = tmp_path / "sla.yaml"
    with pytest.raises(ValueError, match=re.escape(str(path))):
        SLAConfig.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*YAML"):
        SLAConfig.load(path)


@pytest.mark.parametrize(
    ("dense_layers", "dense"),
    [
        (0, []),
        (2, [0, 1]),
        (5, [0, 1, 2, 3, 4]),
        ((), []),
        ((0, -1), [0, 4]),
        ((3,), [3]),
        ([-2, 1], [1, 3]),
        ((-5, 4), [0, 4]),
    ],
    ids=str,
)
def test_dense_layers_count_from_either_end(dense_layers, dense):
    config = SLAConfig(dense_layers=dense_layers)
    config.check_layers(5)
    assert [i for i in range(5) if config.is_dense_layer(i, 5)] == dense


def test_topk_by_layer_overrides_single_layers_from_either_end():
    config = SLAConfig(topk=0.25, topk_by_layer={0: 0.5, "2": 0.6, "-1": 1.0})
    assert [config.layer_topk(i, 5) for i in range(5)] == [0.5, 0.25, 0.6, 0.25, 1.0]


@pytest.mark.parametrize(
    "values",
    [
        {"dense_layers": 6},
        {"dense_layers": (0, 5)},
        {"dense_layers": (-6,)},
        {"topk_by_layer": {5: 0.5}},
        {"topk_by_layer": {-6: 0.5}},
    ],
    ids=str,
)
def test_a_layer_that_the_model_does_not_have_is_refused_by_field(values):
    (name,) = values
    with pytest.raises(ValueError, match=rf"^{name}=.*5"):
        SLAConfig(**values).check_layers(5)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.topk = 0.5


@pytest.mark.parametrize(
    ("settings", "capability", "expected"),
    [
        ({}, None, 64),
        ({}, (8, 0), 64),
        ({}, (9, 0), 128),
        ({}, (10, 0), 64),
        ({"block_k": 32}, (9, 0), 64),
        ({"order": (4, 2, 8)}, (9, 0), 64),
        ({"order": "raster"}, (9, 0), 128),
        ({"block_q": 64}, (9, 0), 64),
        ({"block_q": 32}, None, 32),
    ],
)
def test_query_blocks_follow_the_device_where_they_are_not_given(settings, capability, expected):
    config = SLAConfig(**settings)
    assert config.query_block(capability) == expected
    assert SLAConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("settings", "steps", "kind"),
    [
        ({}, 30, "fitted"),
        ({}, 31, "linear"),
        ({"control": 0.1}, 30, "fitted"),
        ({"ratio": 0.5}, 12, "linear"),
        ({"ratio": 0.5, "budget": 0.6}, 12, "fitted"),
        ({"predictor": "fitted"}, 50, "fitted"),
        ({"predictor": "hold"}, 12, "hold"),
    ],
)
def test_the_line_is_damped_in_short_runs_with_a_budget(settings, steps, kind):
    assert RASConfig(**settings).output_predictor(steps) == kind


def test_prefill_settings_survive_json():
    config = PrefillConfig.load("triangle_mix")
    config = dataclasses.replace(
        config, by_layer={**config.by_layer, -1: "dense", 2: {"pattern": "blocks"}}
    )
    assert PrefillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="by_layer='first'"):
        PrefillConfig(by_layer={"first": "dense"})
