"""Reading settings: YAML numbers, duplicate keys, and methods that are off."""

import pytest
import yaml

from dit_accel.checkpoint.file import settings_of
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.config.base import read_yaml


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    "text", ["1e-1", "1E-1", "+1e-1", ".1e0", "1.e-1", "10e-2", "0.01e+1", "0.1", ".1", "1.0e-1"]
)
def test_every_spelling_of_a_number_is_one(text, written):
    assert SLAConfig.load(written(f"sla:\n  topk: {text}\n")).topk == pytest.approx(0.1)


@pytest.mark.parametrize("text", ["-1e-1", "-1E2", "-.5e1"])
def test_numbers_below_zero_are_refused_as_numbers(text, written):
    with pytest.raises(ValueError, match=rf"topk={float(text)!r}"):
        SLAConfig.load(written(f"sla: {{topk: {text}}}"))


@pytest.mark.parametrize("text", ["e1", "1e", "1e-", ".e1", "1e1x", "'1e-1'", "1e5.0", "-e3"])
def test_what_only_looks_like_a_number_stays_text(text, written):
    assert isinstance(read_yaml(written(f"a: {text}"))["a"], str)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("sla: {topk: 0.5}\nsla: {topk: 0.4}\n", "sla"),
        ("sla:\n  topk: 0.5\n  block_q: 16\n  topk: 0.5\n", "topk"),
        ('sla: {topk: 0.5, "topk": 0.4}', "topk"),
        ("sla: {topk_by_layer: {3: 0.5, 3: 0.4}}", "3"),
        ("sla: {topk_by_layer: {3: 0.5, 0x3: 0.4}}", "0x3"),
        ("ras: {ratio: 0.5}\nsla: {topk: 0.5, topk: 0.4}\n", "topk"),
        ("? sla\n: {}\n? sla\n: {}\n", "sla"),
    ],
)
@pytest.mark.parametrize("config", [RASConfig, SLAConfig])
def test_a_key_given_twice_is_refused_by_name_and_file(text, key, config, written):
    path = written(text)
    with pytest.raises(ValueError, match="twice") as error:
        config.load(path)
    assert str(path) in str(error.value)
    assert repr(key) in str(error.value)


def test_one_key_in_several_mappings_is_not_twice(written):
    both = written("ras: {ratio: 0.5}\nsla: {topk: 0.5}\n")
    assert (RASConfig.load(both).ratio, SLAConfig.load(both).topk) == (0.5, 0.5)
    merged = written("sla: {<<: {topk: 0.5, block_q: 32}, topk: 0.4}")  # what a merge key is for
    assert SLAConfig.load(merged) == SLAConfig(topk=0.4, block_q=32)
    assert read_yaml(written("{1: a, '1': b}")) == {1: "a", "1": "b"}


@pytest.mark.usefixtures("unchecked")
def test_a_layer_named_in_two_ways_is_refused(written):
    for layers in ({3: 0.5, "3": 0.4}, {"-1": 0.5, -1: 0.4}, {"3": 0.5, "03": 0.4}):
        with pytest.raises(ValueError, match="topk_by_layer"):
            SLAConfig(topk_by_layer=layers)
        with pytest.raises(ValueError, match="topk_by_layer"):
            SLAConfig.load(written(yaml.safe_dump({"sla": {"topk_by_layer": layers}})))


@pytest.mark.parametrize(
    "text", ["{[1]: 2}", "{{a: b}: 2}", "[", "!!python/name:os.system", "a: *b"]
)
def test_what_is_no_plain_yaml_is_refused_with_its_path(text, written):
    path = written(text)
    with pytest.raises(ValueError, match="YAML") as error:
        read_yaml(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("off", [None, "none"])
def test_a_method_that_is_off_has_no_settings(off, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()  # a word of ours, whatever stands in the folder
    assert RASConfig.load(off) is None
    assert SLAConfig.load(off) is None
    assert settings_of(off) is None


@pytest.mark.parametrize("read", [RASConfig.load, SLAConfig.load, settings_of])
def test_an_unknown_preset_names_none_among_what_is_accepted(read):
    with pytest.raises(ValueError, match=r"'nome'.*mean 'none'.*fast,.* none,"):
        read("nome")
