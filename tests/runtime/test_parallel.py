"""Context parallelism in two processes (torchrun, gloo, CPU) against one process."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCENARIOS = (
    *("equal_to_one_process", "training_step", "uneven_heads"),
    *("short_text", "other_settings", "adapters"),
    *("before_and_after", "refusals", "traffic"),
)


def run_worker(folder, *scenarios, timeout=480):
    """Run scenarios in two processes, and return what each found; a process that hangs fails the test."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(str(Path(__file__).with_name("parallel_worker.py")), str(folder), *scenarios),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results of all scenarios. If pytest-xdist splits this file, its workers share them."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "context-parallelism"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = folder / "found.json"
        if not kept.exists():
            kept.write_text(json.dumps(run_worker(folder, *SCENARIOS)))
        return json.loads(kept.read_text())


@pytest.mark.combines("sla", "ras partial", "ras forecast", "sla and ras", "context parallelism")
def test_two_processes_equal_one(found):
    first, second = (x["equal_to_one_process"] for x in found)
    assert first == second, "both processes get the same latents, to the last bit"
    assert {name.split("/")[0] for name in first} >= {"wan", "sd3", "sd35", "lumina", "lumina2"}
    for name, case in first.items():
        assert case["error"] < 1e-5, name
        assert case["exchanges"] > 0, name


def test_gradients_of_two_processes_add_up_to_those_of_one(found):
    for case in found:
        for name, errors in case["training_step"].items():
            assert errors["ours"] < 1e-5, name
            assert errors["model"] < 1e-5, name


def test_heads_that_do_not_divide_are_shared_where_that_is_asked_for(found):
    for case in found:
        assert all(error < 1e-5 for error in case["uneven_heads"].values()), case["uneven_heads"]


def test_a_process_may_have_no_text(found):
    for x in found:
        error, refused = x["short_text"]
        assert error < 1e-5
        assert "1 text tokens, and 2 processes" in refused  # where the model itself cannot


def test_it_stays_on_when_methods_change(found):
    for case in found:
        for family, x in case["other_settings"].items():
            assert "kv_cache='fp8'" in x["refused"]
            assert x["error"] < 1e-5, family
            assert x["exchanges"] > 0, family


def test_adapters_come_and_go(found):
    for case in found:
        assert all(error < 1e-5 for error in case["adapters"].values()), case["adapters"]


def test_diffusers_can_switch_it_on_before_and_after_enable(found):
    for case in found:
        case = case["before_and_after"]
        assert all(case[order] < 1e-5 for order in ("before", "after", "between runs"))
        assert case["same attributes"]
        error, collectives = case["switched off"]
        assert error < 1e-5
        assert collectives == 0


def test_it_ends_with_acceleration_where_diffusers_does_not_know_it(found):
    for case in found:
        case = case["before_and_after"]
        assert case["sd3 afterwards"] == 0
        assert "SD3Transformer2DModel" in case["sd3 warning"][0]


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("plain sd3", ["SD3Transformer2DModel", "dit_accel.enable"]),
        ("plain hunyuan_video", ["HunyuanVideoTransformer3DModel", "dit_accel.enable"]),
        ("heads", ["ulysses_degree=2", "1 heads"]),
        ("ring", ["ring_degree=2", "ulysses_degree="]),
        ("ring_through_diffusers", ["ring_degree=2", "ulysses_degree="]),
        ("degree", ["ulysses_degree=4", "2 processes"]),
        ("twice", ["transformer: parallelism"]),
        ("in_mid_run", ["transformer: context parallelism", "run"]),
        ("settings", ["sla.topk: 0.3 (process 0), 0.4 (process 1)"]),
        ("long_values", ["field 7: xxx"]),
        ("prompts", ["encoder_hidden_states", "latents"]),
        ("steps", ["steps: 6 (process 0), 7 (process 1)"]),
        ("sizes", ["[2, 16, 22, 26] (process 0), float32 [2, 16, 24, 26] (process 1)"]),
        ("mesh", ["ulysses_degree=2", "{'ring': 2, 'ulysses': 1}"]),
        ("a_refused_call", ["ip_adapter_image_embeds: "]),
        ("timesteps", ["timestep: [500.0, 500.0] (process 0), [501.0, 501.0] (process 1)"]),
        ("few_tokens", ["1 image tokens", "2 processes"]),
        ("a_failure", ["transformer_blocks.0.attn", "changed"]),
    ],
)
def test_every_process_stops_with_one_clear_error(found, case, messages):
    for rank, x in enumerate(found):
        said = x["refusals"][case]
        assert all(message in said for message in messages), (rank, said)
        assert len(said) < 600


def test_a_run_after_a_refused_one_works(found):
    assert len({x["refusals"]["a run after that"] for x in found}) == 1


def test_bytes_and_collectives(found):
    for case in found:
        for name, x in case["traffic"].items():
            # One exchange before attention and one behind it, where diffusers has four; and the output.
            for calls, _ in x["steps"]:
                assert calls["all_to_all_single"] == 2 * x["layers"], name
                assert sum(calls.values()) == 2 * x["layers"] + 1, name
        ras = case["traffic"]["wan/ras"]
        dense = ras["steps"][0][1]["all_to_all_single"] / ras["active"][0]
        for (_, nbytes), active in zip(ras["steps"], ras["active"], strict=True):
            assert nbytes["all_to_all_single"] / active == pytest.approx(dense, rel=0.02)
        # q, k, v and o: tokens x width / processes, of which this process keeps its own.
        width = 2 * 12 * 4  # heads x head_dim x bytes
        formula = 4 * ras["active"][0] * width / 2 / 2
        sent = ras["steps"][0][1]["all_to_all_single"] / ras["layers"]
        assert sent == pytest.approx(formula, rel=0.02)
