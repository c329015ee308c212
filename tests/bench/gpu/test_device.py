"""Timing of functions in turns, with failing ones left out."""

import pytest
import torch

from dit_accel.bench.gpu import device as module
from dit_accel.bench.gpu.device import Device, DeviceLostError, DryDevice


class Host(Device):
    place = "cpu"
    lost = False

    def wait(self):
        if self.lost:
            raise DeviceLostError("gone")


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(module, "FLUSH_BYTES", 16)
    return Host()


def fail():
    raise RuntimeError("no such\nkernel")


def test_functions_take_turns(host):
    calls = []
    times = host.times({x: lambda x=x: calls.append(x) for x in "ab"}, 3)
    # once alone, once to warm up, then in turns
    assert "".join(calls) == "ab" + "ab" + "ababab"
    assert set(times) == {"a", "b"}
    assert set(times["a"]) == {"p20", "p50", "p80"}


def test_times_are_milliseconds(host):
    found = host.times({"busy": lambda: torch.randn(300, 300) @ torch.randn(300, 300)}, 5)
    assert 0.05 < found["busy"]["p50"] < 1000


def test_an_optional_function_that_fails_is_told(host):
    times = host.times({"good": int, "flash": fail}, 2, optional=("flash",))
    assert times["refused"] == {"flash": "RuntimeError: no such"}
    assert "flash" not in times


def test_any_other_failure_is_raised(host):
    with pytest.raises(RuntimeError, match="no such"):
        host.times({"good": int, "kernel": fail}, 2, optional=("flash",))


def test_a_lost_device_is_no_refusal(host):
    def lose():
        host.lost = True

    with pytest.raises(DeviceLostError):
        host.times({"flash": lose}, 2, optional=("flash",))


def test_host_time_counts_the_call(host):
    assert host.host_us(lambda: sum(range(100_000)))["p50"] > 100


def test_a_dry_device_calls_every_function_once():
    calls = []
    times = DryDevice().times({x: lambda x=x: calls.append(x) for x in "ab"}, 5)
    assert calls == ["a", "b"]
    assert set(times) == {"a", "b"}


def test_poisoned_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    with Device().poisoned():
        x = torch.ones(3)
        for memory in (torch.empty(4), x.new_empty(5), torch.empty_like(x)):
            assert memory.isnan().all()
        assert torch.empty(4, dtype=torch.int32).min() == torch.iinfo(torch.int32).max
    assert torch.are_deterministic_algorithms_enabled() == before
