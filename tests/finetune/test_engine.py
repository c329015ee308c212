"""Device, precision and processes of a run."""

import dataclasses

import pytest

from dit_accel.finetune.engine import Engine
from dit_accel.finetune.processes import Processes

from .fakes import FakeConfig


def test_one_process_after_the_other(tmp_path):
    for precision in ("no", "bf16", "no"):
        engine = Engine(dataclasses.replace(FakeConfig(), mixed_precision=precision), tmp_path)
        assert engine.accelerator.mixed_precision == precision
        assert engine.device.type == "cpu"
        assert (engine.processes.rank, engine.processes.count) == (0, 1)
        assert engine.loss_scale is None
        engine.close()


def test_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"device='cuda:7'"):
        Engine(dataclasses.replace(FakeConfig(), device="cuda:7"), tmp_path)


def test_half_without_gpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mixed_precision='fp16': .*CPU.*'bf16'"):
        Engine(dataclasses.replace(FakeConfig(), mixed_precision="fp16"), tmp_path)


def test_tracker_starts_late(tmp_path):
    engine = Engine(dataclasses.replace(FakeConfig(), report_to="tensorboard"), tmp_path)
    assert list(tmp_path.iterdir()) == []  # a run that is refused leaves nothing
    log = engine.start_trackers()
    log({"loss": 1.0}, step=1)
    engine.close()
    assert list(tmp_path.glob("logs/fake/events*"))


def test_action_of_all_processes_fails_with_its_own_error():
    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Processes().together(fail)
    assert Processes().main_only(lambda: 5) == 5
