"""Two processes (torchrun, gloo, CPU): DDP and FSDP2 against one process with the same global batch."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel.finetune.checkpoints import find_latest, read_checkpoint
from dit_accel.finetune.resume import check_settings

from .fakes import FakeConfig, make_loop, values_of
from .test_loop import train

SINGLE = FakeConfig(train_batch_size=4)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    (values, numbers), log = train(folder, SINGLE)
    return folder, values, numbers, log


@pytest.fixture(scope="module")
def found(single, tmp_path_factory):
    """Return the results of both processes by rank, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    begun = tmp_path_factory.mktemp("begun")
    for kind in ("ddp", "fsdp"):  # runs that one process has begun
        (begun / kind).mkdir()
        shutil.copytree(single[0] / "checkpoint-3", begun / kind / "checkpoint-3")
        lines = (single[0] / "log.jsonl").read_text().splitlines(keepends=True)
        (begun / kind / "log.jsonl").write_text("".join(lines[:3]))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(str(Path(__file__).with_name("distributed_worker.py")), str(folder), str(begun)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)], folder


def assert_equal(found, single, rel):
    _, values, _, log = single
    assert found["losses"] == pytest.approx([x["loss"] for x in log], rel=rel)
    assert found["sigmas"] == pytest.approx([x["sigma"] for x in log], rel=rel)
    assert found["norms"] == pytest.approx([x["gradient_norm"] for x in log], rel=rel)
    assert found["updates"] == pytest.approx([x["update/weights"] for x in log], rel=10 * rel)
    assert found["densities"] == [x["density"] for x in log]
    for name, value in values.items():
        if name.startswith(("weights/", "ema/")):
            assert found["tensors"][name] == pytest.approx(value, rel=10 * rel, abs=10 * rel), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "ddp-accumulated", "fsdp-accumulated"])
def test_two_processes_equal_one_with_the_same_global_batch(found, single, kind):
    assert_equal(found[0][0][kind], single, rel=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_processes_agree(found, kind):
    ranks = found[0]
    assert ranks[0][kind] == ranks[1][kind]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(found, kind):
    whole, resumed = found[0][0][kind], found[0][0][f"{kind}-resumed"]
    assert resumed["tensors"] == whole["tensors"]
    assert resumed["losses"] == whole["losses"][3:]
    assert resumed["counters"] == whole["counters"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_run_of_one_process_goes_on_in_two(found, single, kind):
    assert_equal(
        found[0][0][f"{kind}-from-single"] | {"updates": [x["update/weights"] for x in single[3]]},
        single,
        rel=1e-5,
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_run_of_two_processes_goes_on_in_one(found, single, kind, tmp_path):
    checkpoint = read_checkpoint(found[1] / kind / "checkpoint-3")
    check_settings(checkpoint, {**SINGLE.to_dict(), "fsdp": False}, processes=1)
    loop = make_loop(SINGLE, tmp_path, checkpoint=checkpoint)
    loop.run()
    values, _ = values_of(loop.parts.state)
    for name, value in single[1].items():
        if name.startswith(("weights/", "ema/")):
            assert values[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_each_process_writes_its_rows(found):
    shards = found[0][0]["shards"]
    assert [x for x in shards if x.startswith("weights")] == [
        "weights-00000-of-00002.safetensors",
        "weights-00001-of-00002.safetensors",
    ]


def test_another_global_batch_is_refused(found):
    checkpoint = find_latest(found[1] / "ddp")[0]
    with pytest.raises(ValueError, match=r"3 processes: 6 samples .* 4 \(2 processes\)"):
        check_settings(checkpoint, {**FakeConfig().to_dict()}, processes=3)


def test_fault_of_one_process_skips_the_step_in_all(found):
    for rank in found[0]:
        assert rank["skipped"]["counters"]["skipped_steps"] == [2]
        assert all(math.isfinite(x) for x in rank["skipped"]["tensors"]["weights/head.weight"])
    assert found[0][0]["skipped"]["tensors"] == found[0][1]["skipped"]["tensors"]


def test_signal_to_one_process_stops_all_at_the_same_step(found):
    assert found[0][0]["stopped"] == [0, "checkpoint-1", "a signal to another process"]
    assert found[0][1]["stopped"] == [0, "checkpoint-1", "SIGTERM"]


def test_full_disk_of_one_process_fails_in_all(found):
    for rank in found[0]:
        message, count = rank["failed"]
        assert "No space left on device" in message
        assert count == 0


def test_bf16_trains(found):
    losses = found[0][0]["bf16"]["losses"]
    assert losses == pytest.approx(found[0][0]["fsdp"]["losses"], rel=0.05)
    assert losses != found[0][0]["fsdp"]["losses"]
