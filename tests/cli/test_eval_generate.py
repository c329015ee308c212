"""Command `dit-accel eval generate`."""

import json

import numpy as np
import pytest

from dit_accel.sampling.sets import SampleSet

from .command import SMALL, run


def printed(capsys):
    return json.loads(capsys.readouterr().out)


def generate(repository, prompts, out, *more):
    return run(
        "eval", "generate", "--model", repository, "--prompts", prompts, *SMALL,
        "--output-dir", out, "--fps", 8, *more,
    )  # fmt: skip


def test_generate_makes_a_set_and_goes_on(wan_repository, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate(wan_repository, prompts, out, "--limit", 1) == 0
    assert capsys.readouterr().out == f"{out}: 1 clips\n"
    assert generate(wan_repository, prompts, out) == 2  # other prompts are other settings
    assert "output_dir=" in capsys.readouterr().err
    cache = ["--cache", "first_block_cache:0.2", "--overwrite", "--format", "json"]
    assert generate(wan_repository, prompts, out, *cache) == 0
    done = printed(capsys)
    assert done == {"output_dir": str(out), "complete": True, "kind": "clips", "samples": 2}
    manifest = SampleSet.open(out).manifest
    assert manifest["acceleration"]["cache"] == {"name": "FirstBlockCache", "threshold": 0.2}
    assert manifest["acceleration"]["sla"] is None
    assert [x["seed"] for x in manifest["samples"].values()] == [0, 9]


def test_two_ranks_make_the_same_set(wan_repository, prompts, tmp_path, capsys, monkeypatch):
    assert generate(wan_repository, prompts, tmp_path / "one", "--format", "json") == 0
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)  # as torchrun does
        assert generate(wan_repository, prompts, tmp_path / "two") == 0
    out = tmp_path / "two"
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{out}: ")
    assert not first.endswith("2 clips")
    assert second == f"{out}: 2 clips"
    one, two = (SampleSet.open(tmp_path / x) for x in ("one", "two"))
    assert one.manifest["shards"] == 1
    assert two.manifest["shards"] == 2
    assert one.ids == two.ids == ("a", "b")
    for name in one.ids:
        np.testing.assert_array_equal(one.frames(name), two.frames(name))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompts", "none.txt"], "prompts='none.txt'"),
        (["--limit", "0"], "limit=0"),
        (["--limit", "-1"], "limit=-1"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--cache", "teacache"], "cache='teacache'"),
        (["--cache", "sea_cache:x"], "'sea_cache:x'"),
        (["--cache", "sea_cache", "--batch-size", "2"], "batch_size=2"),
        (["--cache", "pab"], "cache='pab'"),
        (
            ["--cache", "mag_cache"],
            "cache='mag_cache': it needs a calibration, which `eval run` makes",
        ),
        (["--samples-per-prompt", "0"], "samples_per_prompt=0"),
        (["--layout", "vbench", "--samples-per-prompt", "0"], "samples_per_prompt=0"),
        (["--sla", "fats"], "sla='fats'"),
        (["--ras", "papr"], "ras='papr'"),
        (["--height", "33"], "height=33"),
        (["--num-inference-steps", "0"], "num_inference_steps=0"),
        (["--guidance-scale", "inf"], "guidance_scale=inf"),
        (["--seed", "-1"], "seed=-1"),
        (["--seed", str(2**63 - 1)], f"seed={2**63 - 1}"),
        (["--fps", "0"], "fps=0.0"),
        (["--device", "cuda:99"], "device='cuda:99'"),
        (["--output-dir", "/proc/none/out"], "output_dir='/proc/none/out'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_bad_value_is_refused_before_the_model_is_loaded(
    refused, wan_repository, prompts, arguments, named
):
    call = ["eval", "generate", "--model", wan_repository, "--prompts", prompts, *SMALL]
    assert named in refused(*call, "--output-dir", "out", *arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--layout", "vbench"], "layout='vbench'"),
        (
            ["--cache", "faster_cache", "--guidance-scale", "1"],
            "cache='faster_cache'",
        ),
        (["--num-frames", "5"], "num_frames=5"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_only_video_models_can_is_refused_of_an_image_model(refused, arguments, named):
    call = ["eval", "generate", "--model", "tiny-sd3", "--output-dir", "out"]
    assert named in refused(*call, *arguments)
