"""Time and memory of training steps, dense and sparse."""

import json
import weakref

import pytest
import torch

from dit_accel import control
from dit_accel.bench.training_kinds import PARTS, settings
from dit_accel.bench.training_memory import attention_operators, peak_bytes, saved_bytes
from dit_accel.bench.training_step import TrainingStep, compared, misses

KIB = 1024
TINY = {
    "heads": 2,
    "head_dim": 16,
    "ffn_dim": 64,
    "text_dim": 32,
    "grid": (2, 8, 8),
    "topk": 0.5,
    "block": 16,
    "repeats": 1,
    "most_rounds": 2,
}


def leaf(kib):
    return torch.randn(kib * KIB // 4, requires_grad=True)


@pytest.mark.parametrize(
    ("forward", "kib"),
    [
        (lambda x: x.sin(), 4),  # its input
        (lambda x: x.exp(), 4),  # its output
        (lambda x: x.exp().sin(), 4),  # one storage, saved twice
        (lambda x: x.sin().sin(), 8),
        (lambda x: x + 1, 0),
        (lambda x: x[:8].sin(), 4),  # a view holds its whole storage
        (lambda x: x.exp() * x.sin(), 12),
    ],
)
def test_what_a_graph_saves_is_counted_exactly(forward, kib):
    x = leaf(4)
    assert saved_bytes(lambda: forward(x)) == kib * KIB


def test_known_storages_do_not_count_as_saved():
    x, weight = leaf(4), leaf(4)
    assert saved_bytes(lambda: (x * weight).sin(), [x, weight]) == 4 * KIB
    assert saved_bytes(lambda: x[1:] * weight[1:], [weight.detach()]) == 4 * KIB


def test_counting_what_is_saved_keeps_nothing():
    x, outputs = leaf(4), []

    def forward():
        y = x.exp()
        outputs.append(weakref.ref(y))
        return y

    assert saved_bytes(forward) == 4 * KIB
    assert outputs[0]() is None


def test_the_peak_counts_what_is_held_at_once():
    x = torch.zeros(KIB)  # 4 KiB, there before
    assert peak_bytes(lambda: x.sin().cos().sin(), "cpu") == 8 * KIB
    assert peak_bytes(lambda: [x.sin(), x.cos(), x.exp()], "cpu") == 12 * KIB
    assert peak_bytes(lambda: x.sin_(), "cpu") == 0


def test_the_peak_counts_forward_and_backward():
    x, gradient = leaf(4), torch.ones(KIB)
    step = lambda: x.exp().exp().backward(gradient)  # noqa: E731
    # Both outputs are saved, and the gradient of the first one needs as much again, as does that of x.
    assert saved_bytes(lambda: x.exp().exp()) == 8 * KIB
    assert 12 * KIB <= peak_bytes(step, "cpu") <= 16 * KIB


def test_dense_attention_on_a_cpu_is_flash_attention():
    q = torch.randn(1, 2, 64, 16, requires_grad=True)
    found = attention_operators(
        lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    )
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert found == [flash, f"{flash}_backward"]


@pytest.mark.parametrize(
    "changed",
    [{}, {"gradient_checkpointing": True, "bf16": True, "kinds": ("dense", "proj", "learned")}],
    ids=["plain", "checkpointed in bf16"],
)
def test_a_report_has_every_kind_and_part(tmp_path, capsys, changed):
    path = tmp_path / "results" / "training.json"
    record = TrainingStep(output=path, layers=1, **TINY, **changed).run()
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    assert record["dense_operators"] == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert record["options"]["topk"] == 0.5
    assert not record["real_width"]
    assert {"machine", "versions", "bounds", "misses", "format_version"} < set(record)
    kinds = list(settings(0.5, 16))
    assert kinds == ["dense", "none", "shared_softmax", "alpha", "proj", "learned"]
    kinds = changed.get("kinds", kinds)
    expected = [(part, kind) for part in PARTS for kind in kinds]
    assert [(row["part"], row["kind"]) for row in record["rows"]] == expected
    for row in record["rows"]:
        assert row["density"] == (None if row["kind"] == "dense" else pytest.approx(0.5))
        assert min(row["seconds"]["p50"], row["cpu_seconds"]["p50"], row["saved_bytes"]) > 0
        assert row["timed_steps"] in (1, 2)
        assert row["steps_per_second"] == pytest.approx(1 / row["seconds"]["p50"])
        # Autograd keeps no more than is held at the peak.
        assert changed or row["part"] != "transformer" or row["saved_bytes"] < row["peak_bytes"]
    printed = capsys.readouterr().out
    for part, kind in expected:
        assert f"| {part} | {kind} |" in printed


def row(kind, time, saved, peak, part="block"):
    return {
        "part": part,
        "kind": kind,
        "seconds": {"p50": time},
        "cpu_seconds": {"p50": 2 * time},
        "saved_bytes": saved,
        "peak_bytes": peak,
    }


def test_shares_are_those_of_dense_training_and_misses_name_them():
    rows = compared([row("dense", 4.0, 100, 200), row("none", 2.0, 130, 220)])
    assert rows[1]["time_share"] == rows[1]["cpu_time_share"] == 0.5
    assert rows[1]["speedup"] == 2.0
    assert rows[1]["saved_share"] == 1.3
    assert rows[1]["peak_share"] == 1.1
    assert misses(rows) == ["block, none: saved_share 1.30, bound 1.2"]
    slow = compared([row("dense", 1.0, 100, 200), row("alpha", 0.8, 100, 200)])
    assert misses(slow) == ["block, alpha: time_share 0.80, bound 0.75"]
    assert misses([{**x, "part": "attention"} for x in slow]) == []


def test_kinds_share_their_weights_and_run_sparse_in_every_layer():
    measured = TrainingStep(**TINY, layers=2, kinds=("dense", "proj"))
    kinds = measured._passes()
    dense, proj = (kinds[name]["transformer"].transformer for name in ("dense", "proj"))
    names = dict(proj.named_parameters())
    assert all(names[name] is x for name, x in dense.named_parameters())
    kinds["proj"]["transformer"].step()()
    assert not control.summary(dense).enabled
    summary = control.summary(proj, strict=True)
    assert [x.dense_calls for x in summary.layers] == [{}, {}]


@pytest.mark.parametrize("part", PARTS)
def test_a_step_leaves_no_gradients_and_reaches_weights_and_inputs(part):
    found = TrainingStep(**TINY, kinds=("dense", "learned"))._passes()["learned"][part]
    step = found.step()
    reached = []
    for x in found.tensors():
        if x.requires_grad:
            x.register_post_accumulate_grad_hook(lambda x: reached.append(id(x)))
    step()
    assert all(x.grad is None for x in found.tensors())
    own = {id(x) for x in found.module.parameters()}
    assert own <= set(reached)
    if part != "transformer":
        assert id(found.args[0]) in reached


def test_recorded_arguments_are_those_of_the_call():
    torch.manual_seed(0)
    measured = TrainingStep(**TINY, kinds=("dense",))
    found = measured._passes()["dense"]
    seen = []
    block = found["block"].module
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        found["transformer"]()
        found["block"]()
    torch.testing.assert_close(*seen, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kinds": ("none",)}, r"kinds=\('none',\).*dense"),
        ({"kinds": ("dense", "sparse")}, r"kinds=.*dense, none"),
        ({"parts": ("ffn",)}, r"parts=.*transformer, block, attention"),
        ({"parts": ()}, r"parts=\(\)"),
    ],
)
def test_what_is_not_measured_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        TrainingStep(**TINY, **changed)


def test_a_gpu_measures_the_whole_of_wan():
    measured = TrainingStep(device="cuda")
    assert (measured.layers, measured.grid) == (30, (21, 30, 52))
    assert measured.bf16
    assert measured.gradient_checkpointing
