"""Messages between the processes of a run. Several real ones: test_distributed.py."""

import pytest
import torch
import torch.distributed as dist

from dit_accel.finetune.processes import Processes


@pytest.fixture
def four(monkeypatch):
    """Process of four, with made-up values."""
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


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (("OSError", "disk full"), OSError, "process 2: disk full"),
        (("KeyError", "'psnr'"), RuntimeError, "process 2: KeyError: 'psnr'"),
    ],
)
def test_failure_of_another_process_is_one_here(four, monkeypatch, failure, kind, message):
    monkeypatch.setattr(
        four, "gather", lambda own: [("a", None), own, (None, failure), ("d", None)]
    )
    with pytest.raises(kind) as error:
        four.together(lambda: "b")
    assert str(error.value) == message


def test_failure_here_is_told_before_it_is_raised(four, monkeypatch):
    told = []

    def gather(own):
        told.append(own)
        return [("a", None), own, ("c", None), ("d", None)]

    monkeypatch.setattr(four, "gather", gather)
    for error in (OSError("disk full"), KeyError("psnr"), AttributeError("x")):

        def fails(error=error):
            raise error

        with pytest.raises(type(error)) as found:
            four.together(fails)
        assert found.value is error
    assert [answer for answer, _ in told] == [None] * 3
    assert [failure[0] for _, failure in told] == ["OSError", "KeyError", "AttributeError"]


def test_sums_and_means_are_over_all_processes(four):
    x = torch.tensor([2.0])
    assert four.sum(x).item() == 8
    assert four.mean(x).item() == 2
    assert x.item() == 2  # the tensor itself stays
