"""A made-up evaluation with real media: what the tests of table and page report on."""

import numpy as np

from dit_accel.demo.clips import render
from dit_accel.demo.dataset import ShapesDataset
from dit_accel.eval.results.types import FORMAT_VERSION
from dit_accel.eval.runs.methods import Method
from dit_accel.eval.runs.rows import build_row, speedup
from dit_accel.eval.runs.timing import MeasuredCalls
from dit_accel.sampling import media

EXTRACTOR = {"id": "tiny-shapes-v1", "sha256": "5f" * 32, "resize": "64x64 bilinear"}


def metric(value, spread, unit, n=24, extractor=None, **extras):
    interval = None if spread is None or value is None else [value - spread, value + spread]
    return {
        "value": value,
        "n": n,
        "interval_95": interval,
        "unit": unit,
        "extractor": extractor,
        **extras,
    }


def seconds(total, n=5):
    """Text and decode take the same in each row."""
    parts = {"text": 0.021, "denoise": total - 0.321, "decode": 0.3, "total": total}
    return {
        phase: {"median": x, "iqr": [round(x * 0.985, 6), round(x * 1.02, 6)], "n": n}
        for phase, x in parts.items()
    }


def row(name, method, steps, total, metrics, **more):
    return {
        "name": name,
        "method": method,
        "available": True,
        "why": None,
        "settings": {},
        "num_inference_steps": steps,
        "metrics": metrics,
        "seconds": seconds(total),
        "speedup": speedup(seconds(4.12), seconds(total)),
        "peak_memory_bytes": 812 * 2**20,
        "peak_memory_of": "process",
        "density": None,
        "cost": None,
        "folder": name.lower().replace(" ", "-"),
        **more,
    }


def quality(psnr, ssim, distance, judge):
    out = {
        "fd_tiny": metric(
            distance,
            None,
            "squared feature distance",
            n=792,
            extractor=EXTRACTOR,
            of="frames",
            n_reference=1024,
            flags=["rank-deficient"],
        ),
        "flicker": metric(0.9712 + distance / 1e4, 0.0021, ""),
        "judge": metric(judge, 0.08, "share"),
        "judge_motion": metric(judge + 0.04, 0.05, "share"),
    }
    if psnr is not None:
        values = {f"{i:04d}": psnr + (0.9 if i % 2 else -0.9) for i in range(24)}
        out["psnr"] = metric(psnr, 0.9, "dB", values=values)
        out["ssim"] = metric(ssim, 0.012, "")
    return out


def example_results(samples=()):
    """Nine rows: the reference, three dense ones with fewer steps, five accelerations."""
    cached = row("FirstBlockCache 0.1", "cache", 24, 2.61, quality(26.9, 0.921, 5.9, 0.875))
    cached["settings"] = {"threshold": 0.1}
    sla = row("SLA balanced", "sla", 24, 3.02, quality(31.4, 0.968, 3.4, 0.917), density=0.41)
    sla["settings"] = {"sla": {"topk": 0.25, "block_q": 32, "block_k": 32, "crossover": "never"}}
    ras = row("RAS balanced", "ras", 24, 2.74, quality(29.6, 0.955, 3.9, 0.917), cost=14.6)
    both = row("RAS + SLA", "ras_sla", 24, 2.05, quality(26.3, 0.93, 4.8, 0.875), density=0.44)
    both |= {"cost": 12.9, "peak_memory_bytes": 891 * 2**20}
    exact = row("SLA, every key", "sla", 24, 4.31, quality(0.0, 1.0, 3.1, 0.917), density=1.0)
    exact["metrics"]["ssim"] = metric(1.0, 0.0, "")
    exact["metrics"]["psnr"] = metric(None, None, "dB", infinite=24, why="all pairs are identical")
    return {
        "format_version": FORMAT_VERSION,
        "kind": "eval",
        "title": "tiny-wan: what acceleration costs",
        "model": "tiny-wan",
        "sampling": {
            "height": 64,
            "width": 64,
            "num_frames": 33,
            "num_inference_steps": 24,
            "guidance_scale": 4.0,
        },
        "prompts": 24,
        "reference": "dense",
        "versions": {"python": "3.11.7", "dit-accel": "0.1.0", "torch": "2.13.0"},
        "machine": {
            "processor": "AMD EPYC 9B14",
            "system": "Linux x86_64",
            "cores": 2,
            "torch_threads": 2,
            "gpu": None,
        },
        "repeats": 5,
        "rows": [
            row(
                "Dense", "dense", 24, 4.12, quality(None, None, 3.1, 0.917), density=1.0, cost=24.0
            ),
            row("Dense, 18 steps", "fewer_steps", 18, 3.17, quality(27.8, 0.941, 3.6, 0.917)),
            row("Dense, 15 steps", "fewer_steps", 15, 2.70, quality(26.1, 0.925, 4.2, 0.875)),
            row("Dense, 12 steps", "fewer_steps", 12, 2.21, quality(24.4, 0.903, 5.1, 0.833)),
            cached,
            build_row(
                Method(name="SeaCache", kind="cache", why="not in diffusers 0.42.1"),
                MeasuredCalls(None, [], 24),
            ),
            ras,
            sla,
            both,
            exact,
        ],
        "samples": list(samples),
    }


def write_media(folder, results, count=3, kind="mp4", size=64, frames=33, names=None):
    """Clips or images of the demo data for `count` samples, of all rows or those in `names`; the lower
    a row's PSNR the noisier.

    Returns:
        The samples, as in results.json.
    """
    rng = np.random.default_rng(0)
    data = ShapesDataset("heldout", size=count, height=size, width=size)
    samples = []
    for i in range(count):
        clip = data.describe(i)
        drawn = render(clip, frames if kind == "mp4" else 1, size, size)[0]
        clean = drawn.permute(1, 2, 3, 0).numpy() / 2 + 0.5
        files = {}
        for entry in results["rows"]:
            if not entry["available"] or (names is not None and entry["name"] not in names):
                continue
            psnr = entry["metrics"].get("psnr", {"value": None})["value"]
            noise = 0.0 if psnr is None else 10 ** (-psnr / 20)
            noisy = media.to_uint8(clean + noise * rng.standard_normal(clean.shape))
            place = folder / entry["folder"].replace(",", "")
            place.mkdir(parents=True, exist_ok=True)
            [path] = media.write_clip(place / f"{i:04d}", noisy, kind=kind, fps=16)
            files[entry["name"]] = path.relative_to(folder).as_posix()
        samples.append({"id": f"{i:04d}", "prompt": clip.captions()[0], "media": files})
    return samples
