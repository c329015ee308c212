"""What the processes of a run tell each other. Several real ones: test_distributed.py."""

import pytest
import torch
import torch.distributed as dist

from dit_accel.finetune.processes import Processes


@pytest.fixture
def four(monkeypatch):
    """One of four processes, whose values are made up."""
    processes = Processes()
    processes.rank, processes.count = 1, 4
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.add_(6))
    return processes


def test_one_process_exchanges_nothing(tmp_path):
    def check():
        processes, x = Processes(), torch.ones(2)
        assert (processes.count, processes.rank, processes.is_main) == (1, 0, True)
        assert processes.mean(x) is processes.sum(x) is x
        assert processes.gather("a") == ["a"]

    check()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        check()
    finally:
        dist.destroy_process_group()


def test_sums_and_means_are_over_all_processes(four):
    x = torch.tensor([2.0])
    assert four.sum(x).item() == 8
    assert four.mean(x).item() == 2
    assert x.item() == 2  # the tensor itself stays
