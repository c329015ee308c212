"""`dit-accel precompute`: bad input is refused before a model is loaded; a run with the embedded model."""

import json

import pytest
import torch

from dit_accel.demo import make_data

from .command import run

pytest.importorskip("dit_accel.finetune.families")
OPTIONS = ("--data-dir", "data", "--output-dir", "out")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Return the folder that `dit-accel demo make-data` writes."""
    return make_data(tmp_path_factory.mktemp("clips") / "data", 5, num_frames=9, progress=False)


@pytest.fixture
def data(tmp_path, clips):
    """The clips as the folder `data` of the current folder."""
    (tmp_path / "data").symlink_to(clips)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data-dir", "none"], "data_dir='none'"),
        (["--data-dir", "empty"], "data_dir='empty'"),
        (["--caption-column", "caption"], "'caption'"),
        (["--model", "none"], "model='none'"),
        (["--device", "cuda:99"], "device='cuda:99'"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--workers", "0"], "workers=0"),
        (["--shard-samples", "0"], "shard_samples=0"),
        (["--fps", "0"], "fps=0"),
        (["--max-sequence-length", "0"], "max_sequence_length=0"),
        (["--height", "64"], "height=64, width=None"),
        (["--height", "60", "--width", "64"], "height 60"),
        (["--num-frames", "8"], "frames 8 "),
        (["--num-frames", "17"], "00000.mp4: 9 frames of 64 x 64; "),
        (["--num-frames", "17", "--skip-broken"], "none of the 5 files"),
        (["--buckets", "9,64"], "buckets='9,64'"),
        (["--buckets", "9,64,64", "--num-frames", "9"], "buckets='9,64,64', num_frames=9"),
        (["--buckets", "9,64,64;5,16,160"], "5x16x160"),
        (["--output-dir", "/proc/none"], "output_dir='/proc/none'"),
        (["--output-dir", "full"], "output_dir='full': holds other files (photo.txt)"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_refused(refused, data, tmp_path, arguments, named):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.txt").touch()
    assert named in refused("precompute", *OPTIONS, *arguments)


def test_undecodable_files_are_refused_by_name(refused, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.mp4").write_text("hello")
    (tmp_path / "data" / "a.txt").write_text("caption")
    line = refused("precompute", *OPTIONS)
    assert "1 of 1 files " in line
    assert "data/a.mp4: " in line


def test_clips_become_a_folder_that_training_opens(data, tmp_path, monkeypatch, capsys):
    """The transformer is not loaded, and what is written equals what the model encodes."""
    from diffusers import WanTransformer3DModel

    from dit_accel.finetune.data.store import open_store
    from dit_accel.finetune.data.video import video_frames
    from dit_accel.finetune.families import trainable_of
    from dit_accel.sampling.load import load_pipeline

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(WanTransformer3DModel, "from_pretrained", None)
        assert (
            run("precompute", *OPTIONS, "--batch-size", "2", "--fps", "16", "--format", "json") == 0
        )
    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "output_dir": "out",
        "samples": 5,
        "made": 5,
        "buckets": {"9x64x64": 5},
        "broken": {},
    }
    assert run("precompute", *OPTIONS, "--fps", "16") == 0
    assert "5 samples, 0 of them new" in capsys.readouterr().out
    assert run("precompute", *OPTIONS, "--fps", "8") == 2
    assert "fps was 16.0 and is 8.0" in capsys.readouterr().err

    trainable = trainable_of(load_pipeline("tiny-wan", sla=None))
    store = open_store("out")
    latents, conditions = store.sample(2)
    frames = torch.stack(
        [torch.from_numpy(x) for x in video_frames(data / "videos/00002.mp4", fps=16)]
    )
    pixels = frames.permute(3, 0, 1, 2)[None] / 127.5 - 1
    assert torch.allclose(latents, trainable.encode_pixels(pixels)[0], atol=1e-4)
    caption = json.loads((data / "captions.jsonl").read_text().splitlines()[2])["text"]
    for name, expected in trainable.encode_prompts([caption]).items():
        assert torch.allclose(conditions[name].float(), expected[0].float(), atol=1e-4)
