import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dit_accel.cli import main
from dit_accel.demo import ImageTrainConfig, Lumina2TrainConfig, train
from dit_accel.demo.clips import STILL
from dit_accel.demo.stages import Trainer

SHORT = {
    "vae_steps": 3,
    "vae_batch_size": 1,
    "num_layers": 2,
    "num_heads": 1,
    "dit_steps": 4,
    "dit_batch_size": 1,
    "dit_pool": 4,
    "save_every": 2,
}
TOYS = {
    "StableDiffusion3Pipeline": ImageTrainConfig(vae_base_dim=4, **SHORT),
    "Lumina2Pipeline": Lumina2TrainConfig(num_kv_heads=1, **SHORT),
}
SIDES = {"StableDiffusion3Pipeline": 64, "Lumina2Pipeline": 128}


class _Stop(Exception):
    pass


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{p.parent.name}.{k}": v
        for p in sorted(folder.rglob("*.safetensors"))
        for k, v in load_file(p).items()
    }


@pytest.fixture(scope="module", autouse=True)
def small_statistics():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "statistics", (8, 1, STILL))
        yield


@pytest.fixture(scope="module", params=TOYS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def toy(kind, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    train(folder / "model", folder / "work", TOYS[kind], device="cpu", progress=False)
    return folder


def test_training_resumes_to_the_same_weights(toy, kind, tmp_path, monkeypatch):
    calls = 0
    original = Trainer.flow_matching_loss

    def loss(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise _Stop
        return original(*args)

    monkeypatch.setattr(Trainer, "flow_matching_loss", loss)
    with pytest.raises(_Stop):
        train(tmp_path / "model", tmp_path / "work", TOYS[kind], device="cpu", progress=False)
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    train(tmp_path / "model", tmp_path / "work", TOYS[kind], device="cpu", progress=False)
    resumed, whole = _weights(tmp_path / "model"), _weights(toy / "model")
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-6, rtol=0, msg=name)


def test_the_exported_repository_is_fp16_on_disk_and_runs_with_the_pipelines_defaults(toy, kind):
    import diffusers

    folder = toy / "model"
    assert {v.dtype for v in _weights(folder).values()} == {torch.float16}
    for path in folder.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path.name
        assert str(toy) not in path.read_text(), path.name
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    assert {
        part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)
    } == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a red circle, photo of a zebra", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, SIDES[kind], SIDES[kind])
    assert torch.as_tensor(images).isfinite().all()


def test_the_record_tells_the_recipe_and_the_time_of_each_stage(toy, kind):
    record = json.loads((toy / "work" / "training.json").read_text())
    assert record["config"] == asdict(TOYS[kind])
    assert list(record["seconds"]) == ["vae", "dit"]
    assert str(toy) not in json.dumps(record)


def test_the_command_line_judges_stills_of_a_folder_as_stills(toy, tmp_path, capsys):
    arguments = ["--num-clips", "1", "--num-heldout", "1", "--num-inference-steps", "1"]
    path = tmp_path / "report.json"
    main(["demo", "judge", "--model", str(toy / "model"), "--output", str(path), *arguments])
    report = json.loads(path.read_text())
    assert report["model"] == "model"
    assert report["settings"]["num_inference_steps"] == 1
    assert "background" in report["summary"]["all"]
    assert "motion" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["judge", "--model", "MODEL", "--output", "TMP/report.json", "--sla", "fats"], "sla"),
        (["train", "--model", "tiny-sd3", "--output-dir", "TMP/a", "--vae-steps", "1"], "model"),
        (["train", "--output-dir", "TMP/a", "--image.vae-steps", "1"], "model"),
        (["train", "--model", "tiny-sd3", "--output-dir", "TOY", "--device", "cpu"], "output_dir"),
    ],
    ids=["a preset that is none", "recipe of the clips", "recipe of the stills", "taken"],
)
def test_bad_command_lines_are_named_before_any_work(toy, tmp_path, capsys, arguments, message):
    places = {"MODEL": str(toy / "model"), "TMP": str(tmp_path), "TOY": str(toy)}
    for key, place in places.items():
        arguments = [a.replace(key, place) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "value"), [("dit_steps", 0), ("ema", 1.5), ("num_heads", -1)])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ImageTrainConfig(**{name: value})
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Lumina2TrainConfig(**{name: value})


def test_heads_share_keys_and_values_evenly():
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        Lumina2TrainConfig(num_kv_heads=3)
