"""`dit-accel demo`: what is refused; the commands themselves are tested with the demo."""

import pytest


def test_demo_commands_name_themselves(capsys):
    from .command import run

    assert run("demo") == 2
    assert "judge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--num-clips", "0"], "num_clips=0"),
        (["--num-clips", "-1"], "num_clips=-1"),
        (["--seed", "-1"], "seed=-1"),
        (["--seed", str(2**64)], f"seed={2**64}"),
        (["--fps", "0"], "fps=0"),
        (["--num-frames", "0"], "num_frames=0"),
        (["--height", "0"], "height=0"),
        (["--width", "33"], "width=33"),
        (["--output-dir", "full"], "output_dir"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_make_data_refuses_bad_input(refused, tmp_path, arguments, named):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert named in refused("demo", "make-data", "--output-dir", "out", *arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--vae-steps", "0"], "vae_steps=0"),
        (["--vae-learning-rate", "nan"], "vae_learning_rate=nan"),
        (["--vae-learning-rate", "inf"], "vae_learning_rate=inf"),
        (["--shift", "-1"], "shift=-1"),
        (["--ema", "nan"], "ema=nan"),
        (["--ema", "1.5"], "ema=1.5"),
        (["--seed", "-1"], "seed=-1"),
        (["--seed", str(2**63)], f"seed={2**63}"),
        (["--image.dit-steps", "0"], "dit_steps=0"),
        (["--image.dit-steps", "5"], "model='tiny-wan'"),
        (["--model", "tiny-sd3", "--vae-steps", "5"], "model='tiny-sd3'"),
        (["--lumina2.dit-steps", "5"], "model='tiny-wan'"),
        (["--lumina2.num-kv-heads", "3"], "num_kv_heads=3"),
        (["--model", "tiny-lumina2", "--image.dit-steps", "5"], "model='tiny-lumina2'"),
        (["--device", "cuda:99"], "device='cuda:99'"),
        (["--output-dir", "full"], "output_dir"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_train_refuses_bad_input(refused, tmp_path, arguments, named):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert named in refused("demo", "train", "--output-dir", "out", *arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--num-clips", "-1"], "num_clips=-1"),
        (["--num-clips", "0", "--num-heldout", "0"], "num_heldout=0"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--seed", "-1"], "seed=-1"),
        (["--seed", str(2**63)], f"seed={2**63}"),
        (["--num-inference-steps", "0"], "num_inference_steps=0"),
        (["--guidance-scale", "nan"], "guidance_scale=nan"),
        (["--device", "cuda:99"], "device='cuda:99'"),
        (["--model", "none"], "model='none'"),
        (["--sla", "fats"], "sla='fats'"),
        (["--output", "/proc/none/report.json"], "output"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_judge_refuses_bad_input(refused, arguments, named):
    assert named in refused("demo", "judge", "--output", "new/report.json", *arguments)
