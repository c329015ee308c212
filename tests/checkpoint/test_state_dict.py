"""State dicts are found in whatever holds them, and prefixes of wrappers go; what is ambiguous is refused."""

import itertools

import pytest
import torch
from torch import nn

from dit_accel.checkpoint.state_dict import (
    OTHER_NETWORKS,
    PREFIXES,
    WRAPPERS,
    find_state_dict,
    plain_names,
    plain_tensors,
)

ROOTS = ("blocks", "head")


def weights(prefix="", value=0.0):
    names = ("blocks.0.net.0.weight", "blocks.1.model.bias", "head.weight")
    return {prefix + name: torch.full((2,), value + i) for i, name in enumerate(names)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


ORDERS = [".".join(x) + "." for n in (1, 2, 3) for x in itertools.permutations(("module", "_orig_mod", "model", "net"), n)]  # fmt: skip
MORE = [f"{name}." for name in (*PREFIXES, *WRAPPERS)] + [
    "model.diffusion_model.",
    "module.module.",
    "generator.model._fsdp_wrapped_module.",
    "_orig_mod.module._checkpoint_wrapped_module.transformer.",
]


@pytest.mark.parametrize("prefix", ["", *ORDERS, *MORE])
def test_prefixes_in_front_are_removed(prefix):
    assert equal(plain_tensors(weights(prefix), ROOTS, "x"), weights())


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("place", ["blocks.0.", "blocks.1.", "head."])
def test_wrappers_inside_a_key_are_removed_and_names_of_the_model_stay(wrapper, place):
    wrapped = {name.replace(place, f"{place}{wrapper}."): x for name, x in weights().items()}
    assert wrapped.keys() != weights().keys()
    assert equal(plain_tensors(wrapped, ROOTS, "x"), weights())


def test_the_wrappers_of_torch_are_understood():
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2)), "head": nn.Linear(2, 1)})
    plain = {name: x.clone() for name, x in model.state_dict().items()}
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):  # fmt: skip
        assert wrapped.state_dict().keys() != plain.keys()
        assert equal(plain_tensors(wrapped.state_dict(), ROOTS, "x"), plain)


def test_a_root_that_is_also_a_prefix_stays():
    own = {"model.weight": torch.ones(1), "blocks.0": torch.ones(2)}
    assert equal(plain_tensors(own, ("model", "blocks"), "x"), own)
    assert equal(plain_tensors({f"net.{n}": x for n, x in own.items()}, ("model", "blocks"), "x"), own)  # fmt: skip


@pytest.mark.parametrize("prefix", ["teacher", "student", "foo.bar", "module.text_encoder"])
def test_unknown_prefixes_are_named(prefix):
    with pytest.raises(ValueError, match=r"^x: .*prefix '(\S+)' of") as error:
        plain_names(weights(f"{prefix}."), ROOTS, "x")
    assert f"'{prefix.removeprefix('module.')}'" in str(error.value)
    assert f"{prefix}.blocks.0" in str(error.value)


def test_two_keys_of_one_name_are_both_named():
    both = weights("model.") | weights("ema.")
    with pytest.raises(ValueError, match=r"^x: blocks\.0.*model\.blocks\.0.*ema\.blocks\.0"):
        plain_names(both, ROOTS, "x")


def test_entries_that_are_not_of_the_model_stay_to_be_refused_by_name():
    found = plain_names(weights() | {"step": 3, "net.more": 4}, ROOTS, "x")
    assert found["step"] == ("step", 3)
    assert found["more"] == ("net.more", 4)


@pytest.mark.parametrize("key", ["model", "state_dict", "module", "ema", "generator", "anything"])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_a_state_dict_may_be_inside(key, prefix):
    optimizer = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}
    data = {key: weights(prefix), "optimizer": optimizer, "iteration": 7, "args": None}
    assert equal(find_state_dict(data, ROOTS, "x"), weights(prefix))
    assert equal(find_state_dict({"outer": data}, ROOTS, "x"), weights(prefix))


@pytest.mark.parametrize("other", OTHER_NETWORKS)
def test_networks_of_training_are_not_the_model(other):
    data = {other: weights(value=5.0), "generator": weights()}
    assert equal(find_state_dict(data, ROOTS, "x"), weights())
    assert equal(find_state_dict({other: weights(value=5.0)}, ROOTS, "x"), weights(value=5.0))


@pytest.mark.parametrize("keys", [("model", "ema"), ("generator", "generator_ema"), ("a", "b", "critic")])  # fmt: skip
def test_several_state_dicts_are_refused_by_name(keys):
    data = {key: weights(value=i) for i, key in enumerate(keys)}
    with pytest.raises(ValueError, match=r"^x: .*several") as error:
        find_state_dict(data, ROOTS, "x")
    assert [f"'{key}'" in str(error.value) for key in keys if key != "critic"] == [True, True]


@pytest.mark.parametrize(
    "data", [{}, [], None, 3, {"a": 1}, {"a": {"b": {}}}, [weights()]], ids=str
)
def test_what_holds_none_is_refused(data):
    with pytest.raises(ValueError, match=r"^x: .*no state dict"):
        find_state_dict(data, ROOTS, "x")


def test_a_dict_that_holds_itself_ends():
    data = {}
    data["a"] = data
    with pytest.raises(ValueError, match=r"^x: .*no state dict"):
        find_state_dict(data, ROOTS, "x")
