"""Training and single calls: sparse in every scheduled layer, gradients flow, no step schedule applies."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dit_accel
from dit_accel.runtime.install import method_of

from ..random_pipelines import FAMILIES, make, randomise, relative
from .own_loops import batch_of
from .training_worker import DENSE, bare_wan, batch, train

SPARSE = {"block_q": 16, "block_k": 16, "crossover": "never", "topk": 0.25}


def test_ten_steps_of_training_run_sparse_and_learn():
    transformer = bare_wan()
    dit_accel.enable(transformer, sla={**SPARSE, "combine": "proj", "dense_layers": 1})
    losses = train(transformer, 10)
    assert losses[-1] < 0.9 * losses[0]
    report = dit_accel.summary(transformer)
    assert [x.scheduled for x in report.layers] == [False, True, True]
    for layer in report.layers:
        assert layer.sparse_calls == (10 if layer.scheduled else 0)
        assert layer.dense_calls == ({} if layer.scheduled else {"dense layer": 10})
    learned = [x.proj_l.weight for x in method_of(transformer, "sla").attention.values()]
    assert not learned[0].any()  # a dense layer learns nothing
    assert all(x.any() for x in learned[1:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("combine", ["shared_softmax", "proj", "alpha"])
def test_gradients_reach_inputs_and_weights_in_every_family(family, combine):
    pipe = make(family)
    transformer = pipe.transformer
    dit_accel.enable(transformer, sla={**SPARSE, "combine": combine, "dense_layers": 0})
    if combine != "shared_softmax":
        randomise(transformer)
    arguments = batch_of(family)
    latents = arguments["hidden_states"].requires_grad_()
    for _ in range(2):  # nothing of the first call may stand in the way of the second
        output = transformer(**arguments, return_dict=False)[0]
        output.square().mean().backward()
    assert latents.grad.isfinite().all()
    assert latents.grad.any()
    for module in method_of(transformer, "sla").attention.values():
        for parameter in module.parameters():
            assert parameter.grad.any()
    assert not dit_accel.summary(transformer).dense_calls


def test_reading_everything_gives_the_gradients_of_the_plain_model():
    plain, sparse = bare_wan(), bare_wan()
    dit_accel.enable(sparse, sla={**SPARSE, "topk": 1.0, "dense_layers": 0})
    for transformer in (plain, sparse):
        transformer(**batch(), return_dict=False)[0].square().mean().backward()
    for a, b in zip(sparse.parameters(), plain.parameters(), strict=True):
        assert relative(a.grad, b.grad) < 1e-4


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointed in (False, True):
        transformer = bare_wan()
        dit_accel.enable(transformer, sla={**SPARSE, "combine": "proj", "dense_layers": 0})
        randomise(transformer)
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        transformer(**batch(), return_dict=False)[0].square().mean().backward()
        grads.append([x.grad for x in transformer.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_region_adaptive_sampling_refuses_gradients_and_runs_dense_outside_of_loops():
    transformer = bare_wan().requires_grad_(False)
    plain = transformer(**batch(), return_dict=False)[0]
    dit_accel.enable(transformer, ras="fast")
    with pytest.raises(RuntimeError, match="gradients"):
        transformer(**batch())
    with torch.no_grad():
        for _ in range(5):
            result = transformer(**batch(), return_dict=False)[0]
    torch.testing.assert_close(result, plain, rtol=0, atol=0)
    report = dit_accel.summary(transformer).ras
    assert report.dense_calls == {"no sampling loop drives this call": 5}
    with pytest.raises(RuntimeError, match=r"ras: .*sampling loop"):
        dit_accel.summary(transformer, strict=True)


def test_a_pipeline_beside_does_not_disturb_training():
    """The scheduler of the enabled pipeline was used before, and is at some step."""
    pipe = make("wan")
    dit_accel.enable(pipe, sla={**SPARSE, "dense_steps": 1.0, "dense_layers": 0})
    pipe.scheduler.set_timesteps(4)
    pipe.transformer(**batch(), return_dict=False)[0].mean().backward()
    assert not dit_accel.summary(pipe).dense_calls


def test_two_processes_learn_what_one_learns(tmp_path):
    """DistributedDataParallel on gloo: each process has half of the batch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    worker = Path(__file__).with_name("training_worker.py")
    root = Path(dit_accel.__file__).parents[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    environment["PYTHONPATH"] = str(root)
    workers = [
        subprocess.Popen(
            [sys.executable, str(worker), str(tmp_path / "weights.pt")],
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [x.wait(240) for x in workers] == [0, 0]
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    transformer = bare_wan()
    dit_accel.enable(transformer, sla={**SPARSE, "combine": "proj", "dense_layers": DENSE})
    train(transformer, 10)
    expected = transformer.state_dict()
    assert found["sparse_calls"] == [0, 10, 10]
    assert expected.keys() == found["weights"].keys()
    for name, x in expected.items():
        torch.testing.assert_close(found["weights"][name], x, rtol=1e-3, atol=1e-4)
