"""Order of the work on a second stream: this machine has none, so that the calls are written down instead."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from dit_accel.llm.kvcache import side_stream
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.side_stream import SideStream


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        return f"end of {self.name}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for the {event}")


class OnGPU(torch.Tensor):
    device = SimpleNamespace(type="cuda")

    def record_stream(self, stream):
        stream.log.append(f"kept for {stream.name}")


def test_the_streams_wait_for_each_other(monkeypatch):
    log = []
    main, side = Stream("main", log), Stream("side", log)

    @contextmanager
    def on(stream):
        log.append(f"on {stream.name}")
        yield
        log.append("back")

    monkeypatch.setattr(side_stream, "_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    x, work = torch.zeros(1, 1, 1, 1).as_subclass(OnGPU), SideStream(True)
    with work.work(Part.of(x, x)):
        log.append("work")
    work.wait()
    work.wait()
    assert log == [
        "side waits for main",
        "on side",
        "work",
        "back",
        "kept for side",
        "kept for side",
        "main waits for the end of side",
    ]


def test_a_cpu_works_at_once():
    done, work = [], SideStream(True)
    x = torch.zeros(1, 1, 1, 1)
    with work.work(Part.of(x, x)):
        done.append(1)
    work.wait()
    assert done == [1]
    assert work.done is None
