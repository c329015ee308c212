"""Evaluation on a CUDA device: the same metrics as on a CPU, and GPU memory."""

import pytest
import torch

from dit_accel.eval import generate, load_prompts, run_evaluation, score
from dit_accel.files import asset
from dit_accel.sampling.load import load_pipeline
from dit_accel.sampling.settings import Sampling

pytestmark = pytest.mark.gpu
SAMPLING = Sampling(num_inference_steps=6, height=64, width=64, guidance_scale=2.0)


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline(asset("tiny-sd3"), sla=None, device="cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_method_is_timed_and_scored(pipe, tmp_path):
    torch.cuda.empty_cache()
    results = run_evaluation(
        pipe,
        load_prompts("demo-images", 4),
        output_dir=tmp_path,
        model="tiny-sd3",
        sampling=SAMPLING,
        methods=("fewer_steps:3", "ras", "sla", "ras_sla"),
        crossover="never",
        repeats=2,
        progress=False,
    )
    weights = sum(x.numel() * x.element_size() for x in pipe.transformer.parameters())
    for row in results["rows"]:
        assert row["available"]
        assert row["peak_memory_of"] == "gpu"
        assert weights < row["peak_memory_bytes"] < 4 << 30
        assert row["seconds"]["total"]["median"] > 0
        assert row["metrics"]["judge"]["n"] == 4
    assert (tmp_path / "report.html").stat().st_size > 10_000
    # The samples are on disk now: both devices see the same pictures.
    folders = [tmp_path / results["rows"][i]["folder"] for i in (1, 0)]
    options = {"metrics": ("psnr", "ssim", "fd_tiny", "kd_tiny", "judge"), "progress": False}
    here, there = (
        score(folders[0], reference=folders[1], device=device, **options)
        for device in ("cuda", "cpu")
    )
    for name, metric in there.items():
        assert here[name]["value"] == pytest.approx(metric["value"], rel=1e-3, abs=1e-5)


def test_noise_is_that_of_a_cpu(pipe, tmp_path):
    """Generators are on the CPU, so samples of both devices can be compared."""
    made = {}
    for device in ("cuda", "cpu"):
        made[device] = generate(
            pipe.to(device),
            load_prompts("demo-images", 2),
            output_dir=tmp_path / device,
            model="tiny-sd3",
            sampling=SAMPLING,
            progress=False,
        )
    pipe.to("cuda")
    found = score(made["cuda"], reference=made["cpu"], metrics=("psnr",), progress=False)
    assert found["psnr"]["value"] is None or found["psnr"]["value"] > 30  # bf16
