"""Pausing sparse attention, and changing `topk`, without new modules."""

import copy
import re

import pytest
import torch

import dit_accel
from dit_accel.runtime.install import method_of

from ..random_pipelines import make, relative, run
from ..runtime.training_worker import bare_wan, batch
from .test_schedule import begin, call, stats
from .test_schedule import make as make_attention

SPARSE = {"topk": 0.25, "block_q": 16, "block_k": 16, "crossover": "never", "dense_layers": 1}


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 96, 16, generator=generator) for _ in range(3)]


def enabled(**changed):
    transformer = bare_wan().eval()
    with torch.no_grad():
        plain = transformer(**batch(), return_dict=False)[0]
    dit_accel.enable(transformer, sla={**SPARSE, **changed})
    return transformer, method_of(transformer, "sla"), plain


# Pausing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["raster", (1, 4, 4)], ids=["raster", "tiles"])
def test_a_paused_model_is_the_dense_one(order):
    transformer, sla, plain = enabled(order=order, combine="proj")
    with torch.no_grad():
        sparse = transformer(**batch(), return_dict=False)[0]
        with sla.paused():
            paused = transformer(**batch(), return_dict=False)[0]
        again = transformer(**batch(), return_dict=False)[0]
    torch.testing.assert_close(paused, plain, rtol=1e-4, atol=1e-5)
    assert relative(sparse, plain) > 1e-3
    torch.testing.assert_close(again, sparse, rtol=0, atol=0)
    report = dit_accel.summary(transformer)
    assert [x.sparse_calls for x in report.layers] == [0, 2, 2]
    assert [x.dense_calls for x in report.layers] == [
        {"dense layer": 2, "paused": 1},
        {"paused": 1},
        {"paused": 1},
    ]


def test_pauses_nest(qkv):
    attention = make_attention(dense_layers=0, dense_steps=0)
    outcomes = []

    def note():
        begin(attention, 0)
        outcomes.append(call(attention, 1, qkv) is None)

    note()
    with attention.paused():
        note()
        with attention.paused():
            note()
        note()
    note()
    assert outcomes == [False, True, True, True, False]


def test_a_pause_ends_after_a_failure(qkv):
    attention = make_attention(dense_layers=0, dense_steps=0)
    with pytest.raises(ZeroDivisionError), attention.paused():
        raise ZeroDivisionError
    begin(attention, 0)
    assert call(attention, 1, qkv) is not None


def test_observers_see_what_would_have_run_sparse(qkv):
    attention = make_attention(dense_layers=[0], dense_steps=1.0)
    seen = []

    def observe(*inputs, **options):
        seen.append((inputs, options))

    names = list(attention.layers)
    with attention.paused(dict.fromkeys(names, observe)):
        begin(attention, 0)
        call(attention, 0, qkv)  # a dense layer
        call(attention, 1, qkv, masked=True)
        assert not seen
        call(attention, 1, qkv, text="last", scale=0.5)
        begin(attention, 0, grid=(1, 4, 4))
        call(attention, 1, [x[:, :, :16] for x in qkv])  # one block
    assert len(seen) == 1
    inputs, options = seen[0]
    assert all(a is b for a, b in zip(inputs, qkv, strict=True))
    assert options == {"text": "last", "text_tokens": 0, "scale": 0.5}
    begin(attention, 0)
    call(attention, 1, qkv)
    assert len(seen) == 1


@pytest.mark.parametrize("teacher", ["before", "after"])
def test_a_teacher_call_does_not_disturb_a_checkpointed_backward(teacher):
    """Gradient checkpointing runs the blocks again in the backward pass, after the call of the teacher."""
    grads = []
    for checkpointed in (False, True):
        transformer, sla, _ = enabled(combine="proj")
        transformer.train()
        if checkpointed:
            transformer.enable_gradient_checkpointing()

        def target(transformer=transformer, sla=sla):
            with torch.no_grad(), sla.paused():
                return transformer(**batch(), return_dict=False)[0]

        first = target() if teacher == "before" else None
        student = transformer(**batch(), return_dict=False)[0]
        ((student - (target() if first is None else first)) ** 2).mean().backward()
        grads.append([x.grad for x in transformer.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_run_that_is_paused_on_purpose_gives_no_warning(recwarn):
    pipe = make("wan")
    plain = run(pipe, "wan", steps=3)
    dit_accel.enable(pipe, sla=SPARSE)
    with method_of(pipe, "sla").paused():
        paused = run(pipe, "wan", steps=3)
    assert relative(paused, plain) < 1e-5
    assert not [x for x in recwarn if "accelerated nothing" in str(x.message)]
    report = dit_accel.summary(pipe)
    assert report.dense_calls == {"paused": 18}  # 3 steps, 3 layers, 2 halves of guidance
    with pytest.raises(RuntimeError, match=r"sla: .*paused"):
        dit_accel.summary(pipe, strict=True)


# Another share of the blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("values", [(0.5, 1 / 3, 1 / 6), (1 / 6, 0.5, 1.0)], ids=["down", "up"])
def test_the_density_follows_in_both_directions(values, qkv):
    attention = make_attention(dense_layers=0, dense_steps=0, topk=0.9)
    modules = attention.attention
    for value in values:
        attention.set_topk(value)
        begin(attention, 0)
        call(attention, 1, qkv)
        assert stats(attention, 1).density == pytest.approx(value)
        assert attention.config.topk == value
    assert attention.attention == modules  # the very same


def test_a_reading_of_another_share_is_what_that_setting_gives(qkv):
    changed = make_attention(dense_layers=0, dense_steps=0, topk=0.9, rounding="floor")
    changed.set_topk(0.4)
    fresh = make_attention(dense_layers=0, dense_steps=0, topk=0.4, rounding="floor")
    outputs = []
    for attention in (changed, fresh):
        begin(attention, 0)
        outputs.append(call(attention, 1, qkv))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    # A layer alone takes the same number of blocks as one that is told.
    torch.testing.assert_close(changed.attention["blocks.1"](*qkv), outputs[0], rtol=0, atol=0)


def test_overrides_of_single_layers_stay(qkv):
    attention = make_attention(dense_layers=0, dense_steps=0, topk=0.5, topk_by_layer={-1: 1.0})
    attention.set_topk(0.25)
    begin(attention, 0)
    for layer in (0, 3):
        call(attention, layer, qkv)
    assert stats(attention, 0).density == pytest.approx(1 / 3)  # 2 of 6 blocks
    assert stats(attention, 3).density == 1


def test_the_summary_and_what_is_saved_have_the_value_in_use(tmp_path):
    transformer, sla, _ = enabled(combine="proj")
    sla.set_topk(0.5)
    with torch.no_grad():
        transformer(**batch())
    assert dit_accel.summary(transformer).to_dict()["config"]["topk"] == 0.5
    dit_accel.save_sla(transformer, tmp_path)
    other = bare_wan()
    dit_accel.load_sla(other, tmp_path)
    assert method_of(other, "sla").config.topk == 0.5


def test_the_crossover_follows(monkeypatch, qkv):
    from dit_accel.sla import crossover

    rows = [
        {"device": "cpu", "topk": 0.1, "block": 16, "min_length": 90},
        {"device": "cpu", "topk": 0.5, "block": 16, "min_length": 5000},
    ]
    monkeypatch.setattr(crossover, "_table", lambda: rows)
    attention = make_attention(dense_layers=0, dense_steps=0, topk=0.5, crossover="auto")
    run = begin(attention, 0)
    assert call(attention, 1, qkv) is None
    attention.set_topk(0.1)
    begin(attention, 0, run=run)
    assert call(attention, 1, qkv) is not None


@pytest.mark.parametrize("value", [0, -0.1, 1.5, "0.5", None])
def test_other_values_are_refused(value, unchecked):
    attention = make_attention()
    with pytest.raises(ValueError, match=rf"topk={re.escape(repr(value))}: .*\(0, 1\]"):
        attention.set_topk(value)
    assert attention.config.topk == 0.25


def test_top_p_alone_has_no_share_to_change():
    attention = make_attention(topk=None, top_p=0.5)
    with pytest.raises(ValueError, match=r"topk=0\.5: .*top_p"):
        attention.set_topk(0.5)


def test_a_copy_has_its_own_share():
    transformer, sla, _ = enabled()
    twin = copy.deepcopy(transformer)
    sla.set_topk(0.75)
    assert method_of(twin, "sla").config.topk == 0.25
    assert {x.topk for x in method_of(twin, "sla").attention.values()} == {0.25}
