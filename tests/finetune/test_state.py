"""The state of a training, its optimisers, and what does not belong to it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dit_accel.finetune.checkpoints import read_checkpoint, save_checkpoint
from dit_accel.finetune.optimizers import make_optimizer
from dit_accel.finetune.state import TrainingState

from .fakes import FakeConfig


def state_of(shapes, optimizer=torch.optim.AdamW, steps=2):
    torch.manual_seed(0)
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    made = optimizer([{"params": list(named.values()), "name": "weights"}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
    for _ in range(steps):
        sum(x.square().sum() for x in named.values()).backward()
        made.step()
        scheduler.step()
    return TrainingState(named, made, scheduler, counters={"seconds": 1.5})


def saved(state, folder):
    path = save_checkpoint(folder, 1, state.groups(), {"numbers": state.numbers()})
    return read_checkpoint(path)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_round_trip(tmp_path, optimizer):
    shapes = {"a.b": (3, 2), "c": ()}
    before, after = state_of(shapes, optimizer), state_of(shapes, optimizer, steps=0)
    after.load(saved(before, tmp_path))
    assert after.numbers() == before.numbers()
    for group, tensors in before.groups().items():
        for name, x in tensors.items():
            assert torch.equal(after.groups()[group][name], x), (group, name)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"a": (2, 2)},
            r"weights: b is not expected",
        ),
        ({"a": (2, 2), "b": (3,), "c": (1,)}, "weights: c is missing"),
        ({"a": (2, 2), "b": (4,)}, r"weights: b .*\(3,\).*\(4,\)"),
    ],
)
def test_weights_of_another_run_are_refused(tmp_path, shapes, message):
    checkpoint = saved(state_of({"a": (2, 2), "b": (3,)}), tmp_path)
    with pytest.raises(ValueError, match=message):
        state_of(shapes).load(checkpoint)


GROUPS = [
    {"name": "weights", "params": [nn.Parameter(torch.zeros(2))], "lr": 0.1, "weight_decay": 0.01}
]


def test_adamw():
    config = FakeConfig(adam_beta1=0.8, adam_beta2=0.99, adam_epsilon=1e-6)
    [group] = make_optimizer(config, GROUPS).param_groups
    assert (group["betas"], group["eps"]) == ((0.8, 0.99), 1e-6)
    assert (group["lr"], group["weight_decay"], group["name"]) == (0.1, 0.01, "weights")


@pytest.mark.parametrize(
    ("changed", "package", "name"),
    [
        ({"use_8bit_adam": True}, "bitsandbytes.optim", "AdamW8bit"),
        ({"optimizer": "prodigy"}, "prodigyopt", "Prodigy"),
    ],
)
def test_optional_optimizers(monkeypatch, changed, package, name):
    root = package.partition(".")[0]
    monkeypatch.setitem(sys.modules, root, None)
    with pytest.raises(ValueError, match=rf"^\w+=.*: .*pip install {root}\b"):
        make_optimizer(FakeConfig(**changed), GROUPS)
    made = SimpleNamespace(**{name: torch.optim.AdamW})
    monkeypatch.setitem(sys.modules, root, SimpleNamespace(optim=made))
    monkeypatch.setitem(sys.modules, package, made)
    assert make_optimizer(FakeConfig(**changed), GROUPS).param_groups[0]["lr"] == 0.1
