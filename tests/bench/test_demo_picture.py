"""The picture of `make demo`."""

import numpy as np
from PIL import Image

from dit_accel.bench import demo_picture


def row(name, psnr=None, cost=None):
    metrics = {} if psnr is None else {"psnr": {"value": psnr}}
    return {"name": name, "num_inference_steps": 20, "cost": cost, "metrics": metrics}


def test_rows_have_samples_and_brightened_differences(tmp_path, monkeypatch):
    for name, value in (("dense", 100), ("ras", 110)):
        (tmp_path / name).mkdir()
        for i in range(2):
            pixels = np.full((16, 16, 3), value, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    media = [{"Dense": f"dense/{i}.png", "RAS": f"ras/{i}.png"} for i in range(2)]
    results = {
        "rows": [row("Dense"), row("Not run"), row("RAS", 50.2, 13.0)],
        "samples": [{"id": str(i), "media": x} for i, x in enumerate(media)],
    }
    monkeypatch.setattr(demo_picture, "read_results", lambda folder: results)
    output = tmp_path / "demo.png"
    demo_picture.draw(tmp_path, output, samples=2)
    pixels = np.asarray(Image.open(output).convert("RGB")).reshape(-1, 3).tolist()
    shades = {x for x, y, z in pixels if x == y == z}
    assert {100, 110} <= shades  # the samples
    assert 10 * demo_picture.BRIGHTER in shades  # their difference


def test_labels_name_cost_and_quality():
    assert demo_picture.label(row("Dense")) == "Dense\n20 steps"
    assert demo_picture.label(row("RAS", 50.2, 13.0)) == "RAS\ncost of 13 steps\nPSNR 50.2 dB"
