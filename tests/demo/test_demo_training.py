import copy
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dit_accel.demo import TrainConfig, train
from dit_accel.demo import trainer as trainer_module
from dit_accel.demo.clips import ANYWHERE
from dit_accel.demo.loop import Stage, muon_and_adamw, run_stage
from dit_accel.demo.stages import Trainer

TOY = TrainConfig(
    vae_steps=3,
    vae_batch_size=1,
    vae_base_dim=8,
    decoder_steps=2,
    num_layers=1,
    num_heads=1,
    ffn_dim=64,
    short_steps=2,
    short_batch_size=1,
    short_pool=8,
    full_steps=4,
    full_batch_size=1,
    full_pool=4,
    save_every=2,
)


class _Stop(Exception):
    pass


def _run_toy_stage(directory: Path, stop_at: int | None = None, rate: float = 0.01) -> nn.Module:
    """A stage with both optimizers, a matrix, a kernel and an average; `stop_at` interrupts it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 6, 8))
    averaged = copy.deepcopy(model).requires_grad_(False)
    calls = len(list(directory.glob("step-000004*"))) * 4

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise _Stop
        x = torch.randn(4, 8, 8, generator=generator)
        return (model(x) - x.mean(2)).square().mean()

    config = {"toy_steps": 8, "toy_learning_rate": rate, "ema": 0.9, "seed": 0, "save_every": 2}
    stage = Stage("toy", "toy", ("toy_",))
    run_stage(stage, config, directory, model, loss_of, averaged, progress=False)
    return nn.ModuleDict({"model": model, "ema": averaged})


def _assert_equal(first: nn.Module, second: nn.Module) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_resumed_stage_equals_an_uninterrupted_one(tmp_path):
    whole = _run_toy_stage(tmp_path / "whole")
    with pytest.raises(_Stop):
        _run_toy_stage(tmp_path / "broken", stop_at=6)
    _assert_equal(_run_toy_stage(tmp_path / "broken"), whole)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbled"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    whole = _run_toy_stage(tmp_path / "whole")
    with pytest.raises(_Stop):
        _run_toy_stage(tmp_path / "broken", stop_at=8)
    newest = tmp_path / "broken" / "step-000006.safetensors"
    content = newest.read_bytes()
    damaged = {"truncated": content[:-100], "empty": b"", "garbled": content[:8] + b"?" * 500}
    newest.write_bytes(damaged[damage])
    _assert_equal(_run_toy_stage(tmp_path / "broken"), whole)


def test_only_the_newest_checkpoints_stay(tmp_path):
    _run_toy_stage(tmp_path)
    names = ["step-000006.safetensors", "step-000008.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_stage_is_not_continued_under_other_settings(tmp_path):
    _run_toy_stage(tmp_path)
    with pytest.raises(ValueError, match=r"work_dir.*toy_learning_rate"):
        _run_toy_stage(tmp_path, rate=0.02)


def test_muon_moves_kernels_as_it_does_matrices():
    weight = torch.randn(16, 8, 3, generator=torch.Generator().manual_seed(0))
    kernel, matrix = nn.Parameter(weight.clone()), nn.Parameter(weight.flatten(1).clone())
    for parameter in (kernel, matrix):
        muon = muon_and_adamw([parameter, nn.Parameter(torch.zeros(1))], 0.1)["muon"]
        for _ in range(2):
            parameter.grad = None
            parameter.square().sum().backward()
            muon.step()
    torch.testing.assert_close(kernel.flatten(1), matrix)
    assert not torch.equal(kernel, weight)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{p.parent.name}.{k}": v
        for p in sorted(folder.rglob("*.safetensors"))
        for k, v in load_file(p).items()
    }


@pytest.fixture(scope="module", autouse=True)
def small_statistics():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.Wan, "statistics", (4, 5, ANYWHERE))
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    train(folder / "model", folder / "work", TOY, device="cpu", progress=False)
    return folder


def test_training_resumes_to_the_same_weights_and_exports_all_or_nothing(
    toy, tmp_path, monkeypatch
):
    # Interrupted in the last stage, then while exporting, then left alone.
    calls = 0
    original = Trainer.flow_matching_loss

    def loss(*args):
        nonlocal calls
        calls += 1
        if calls == 2 + 4:
            raise _Stop
        return original(*args)

    monkeypatch.setattr(Trainer, "flow_matching_loss", loss)
    with pytest.raises(_Stop):
        train(tmp_path / "model", tmp_path / "work", TOY, device="cpu", progress=False)
    assert not (tmp_path / "model").exists()

    def fail(folder):
        raise _Stop

    monkeypatch.setattr(trainer_module, "_tidy_config", fail)
    with pytest.raises(_Stop):
        train(tmp_path / "model", tmp_path / "work", TOY, device="cpu", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["work"]

    monkeypatch.undo()
    train(tmp_path / "model", tmp_path / "work", TOY, device="cpu", progress=False)
    resumed, whole = _weights(tmp_path / "model"), _weights(toy / "model")
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-6, rtol=0, msg=name)


def test_the_exported_repository_is_fp16_on_disk_and_loads_as_fp32(toy):
    from diffusers import WanPipeline

    folder = toy / "model"
    assert {v.dtype for v in _weights(folder).values()} == {torch.float16}
    for path in folder.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path.name
        assert str(toy) not in path.read_text(), path.name
    pipe = WanPipeline.from_pretrained(folder)
    assert {m.dtype for m in (pipe.vae, pipe.transformer, pipe.text_encoder)} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        "a red circle moving right",
        height=16,
        width=16,
        num_frames=5,
        num_inference_steps=2,
        output_type="pt",
    ).frames
    assert frames.shape == (1, 5, 3, 16, 16)
    assert torch.as_tensor(frames).isfinite().all()


def test_the_record_tells_the_recipe_and_the_time_of_each_stage(toy):
    record = json.loads((toy / "work" / "training.json").read_text())
    assert record["config"] == asdict(TOY)
    assert list(record["seconds"]) == ["vae", "decoder", "dit-short", "dit-full"]
    assert str(toy) not in json.dumps(record)


@pytest.mark.parametrize(
    ("name", "value"),
    [("vae_steps", 0), ("ema", 1.5), ("seed", -1), ("shift", 0.0), ("full_pool", 0)],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        TrainConfig(**{name: value})


def test_bad_arguments_are_named_before_any_work(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir"):
        train(tmp_path / "taken", tmp_path / "work", TOY)
    with pytest.raises(ValueError, match="device"):
        train(tmp_path / "model", tmp_path / "work", TOY, device="nonsense")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_importing_the_demo_loads_nothing_heavy():
    code = "import sys, dit_accel.demo; sys.exit(any(m in sys.modules for m in ('diffusers', 'transformers', 'imageio')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
