"""Settings of sparse prefill by what a user calls them."""

import pytest

from dit_accel import llm
from dit_accel.config import PrefillConfig
from dit_accel.llm.settings import prefill_settings, read_prefill

from .models import make


def test_the_name_of_a_pattern_stands_for_its_defaults():
    assert read_prefill("triangle") == PrefillConfig(pattern="triangle")
    model = llm.enable(make("Llama"), prefill="triangle")
    assert llm.summary(model).config["pattern"] == "triangle"
    assert read_prefill("triangle_mix") == PrefillConfig.load("triangle_mix")


@pytest.mark.parametrize("dense", [None, "none"])
def test_dense_is_no_setting_of_enable(dense):
    assert prefill_settings(dense) is None
    with pytest.raises(ValueError, match=f"prefill={dense!r}"):
        llm.enable(make("Llama"), prefill=dense)


@pytest.mark.parametrize("name", ["missing.yaml", "missing.json"])
def test_a_missing_file_is_called_one(name):
    with pytest.raises(ValueError, match=rf"prefill='{name}'.*such file"):
        read_prefill(name)


def test_more_dense_layers_than_there_are_are_refused():
    model = make("Llama")
    layers = model.config.num_hidden_layers
    llm.enable(model, prefill={"dense_layers": layers})
    with pytest.raises(ValueError, match=f"dense_layers={layers + 1}"):
        llm.enable(model, prefill={"dense_layers": layers + 1})
