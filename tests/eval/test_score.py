"""Whole sets: what is measured, in one process or several, and bad input."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from dit_accel.eval.metrics.features import Extractor
from dit_accel.eval.metrics.measurement import Measurement
from dit_accel.eval.metrics.pairs import psnr, ssim
from dit_accel.eval.metrics.score import measure, score
from dit_accel.sampling.sets import SampleSet

QUIET = {"progress": False, "workers": 1}


@pytest.fixture
def sets(tmp_path, stills, write_images):
    """Folders of 20 stills and of the same with a little noise, and their prompts by id."""
    images, captions = stills(20)
    noise = np.random.default_rng(3).normal(0, 6, images.shape)
    noisy = (images + noise).round().clip(0, 255).astype(np.uint8)
    noisy[4] = images[4]
    prompts = {f"{i:05d}": x for i, x in enumerate(captions)}
    return write_images(tmp_path / "a", noisy), write_images(tmp_path / "b", images), prompts


@pytest.fixture
def clips(tmp_path, write_images):
    """Two folders of three clips."""
    rng = np.random.default_rng(0)
    for name, high in (("c", 256), ("d", 200)):
        for i in range(3):
            frames = rng.integers(0, high, (4 + i, 32, 24, 3), dtype=np.uint8)
            write_images(tmp_path / name / f"clip-{i}", frames)
    return tmp_path / "c", tmp_path / "d"


def test_pairs_are_scored_by_id(sets):
    a, b, _ = sets
    found = score(a, reference=b, metrics=("psnr", "ssim"), **QUIET)
    values = [
        (psnr(SampleSet.open(a).frames(x), y := SampleSet.open(b).frames(x)), ssim(x_, y))
        for x in SampleSet.open(a).ids
        for x_ in [SampleSet.open(a).frames(x)]
    ]
    finite = [p for p, _ in values if math.isfinite(p)]
    assert found["psnr"]["value"] == pytest.approx(np.mean(finite), rel=1e-12)
    assert (found["psnr"]["n"], found["psnr"]["infinite"]) == (20, 1)
    assert found["ssim"]["value"] == pytest.approx(np.mean([s for _, s in values]), rel=1e-12)
    low, high = found["psnr"]["interval_95"]
    assert low < found["psnr"]["value"] < high
    single = dict(zip(SampleSet.open(a).ids, (p for p, _ in values), strict=True))
    assert found["psnr"]["values"] == {
        key: x if math.isfinite(x) else None for key, x in single.items()
    }


def test_by_default_everything_that_fits_is_measured(sets):
    a, b, prompts = sets
    found = score(a, reference=b, prompts=prompts, **QUIET)
    judged = ["judge", "judge_shape", "judge_colour", "judge_background"]
    tiny = ["fd_tiny", "kd_tiny", "precision_tiny", "recall_tiny"]
    assert sorted(found) == sorted(["psnr", "ssim", *judged, *tiny])
    assert all(x["value"] is not None for x in found.values())
    json.dumps(found, allow_nan=False)
    assert found["fd_tiny"]["flags"] == ["rank-deficient"]
    assert found["fd_tiny"]["extractor"]["id"] == "dit-accel-tiny:64"
    assert "values" not in found["fd_tiny"]
    for name in judged:
        single = found[name]["values"].values()
        assert sum(single) / len(single) == pytest.approx(found[name]["value"])


def test_a_set_against_itself(sets):
    a, _, _ = sets
    found = score(a, reference=a, **QUIET)
    assert found["psnr"]["value"] is None
    assert found["psnr"]["infinite"] == 20
    assert found["ssim"]["value"] == pytest.approx(1)
    assert found["fd_tiny"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["precision_tiny"]["value"] == found["recall_tiny"]["value"] == 1


def test_any_module_makes_features(sets):
    class Means(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    a, b, _ = sets
    extractor = Extractor(Means(), name="means")
    found = score(a, reference=b, extractor=extractor, metrics=("fd_means",), **QUIET)
    means = [
        np.array([SampleSet.open(s).frames(x).mean((0, 1, 2)) / 255 for x in SampleSet.open(s).ids])
        for s in (a, b)
    ]
    from scipy.linalg import sqrtm

    covariances = [np.cov(x, rowvar=False) for x in means]
    expected = np.square(means[0].mean(0) - means[1].mean(0)).sum() + np.trace(
        covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real
    )
    assert found["fd_means"]["value"] == pytest.approx(expected, rel=1e-3)
    assert "flags" not in found["fd_means"]


def test_other_peoples_networks(sets, inception_weights, alexnet, clip_folder):
    """Each metric names its network, with the sha256 of the file it came from."""
    import hashlib

    from dit_accel.eval.metrics.clip_score import ClipScore
    from dit_accel.eval.metrics.pairs import Lpips

    a, b, _ = sets
    prompts = {f"{i:05d}": "a red circle on the blue" if i < 2 else "a red" for i in range(20)}
    found = score(
        a,
        reference=b,
        prompts=prompts,
        metrics=("lpips", "clip_score", "kid"),
        inception=inception_weights,
        lpips=alexnet,
        clip=clip_folder,
        allow_other_weights=True,
        batch_size=7,
        **QUIET,
    )
    files = {
        "lpips": alexnet,
        "clip_score": clip_folder / "model.safetensors",
        "kid": inception_weights,
    }
    for metric, path in files.items():
        assert found[metric]["n"] == 20
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert found[metric]["extractor"]["sha256"] == digest
    assert found["kid"]["extractor"]["resize"] == "clean"
    assert found["kid"]["flags"] == ["other-weights", "subsets of 20"]
    assert found["clip_score"]["truncated"] == 2
    ours, theirs = SampleSet.open(a), SampleSet.open(b)
    lpips, clip = Lpips(alexnet, allow_other_weights=True), ClipScore(clip_folder)
    distances = [lpips(ours.frames(x), theirs.frames(x)) for x in ours.ids]
    scores = [clip([clip.prepare(ours.frames(x)[0])], [prompts[x]])[0] for x in ours.ids]
    assert found["lpips"]["value"] == pytest.approx(np.mean(distances), rel=1e-6)
    assert found["clip_score"]["value"] == pytest.approx(np.mean(scores), rel=1e-4)


def test_one_network_gives_features_for_all_of_its_metrics(
    write_images, tmp_path, stills, inception_weights
):
    found = measure(
        write_images(tmp_path / "few", stills(4)[0]),
        metrics=("fid", "kid", "precision", "fd_tiny"),
        inception=inception_weights,
        allow_other_weights=True,
        **QUIET,
    )
    sets = found.features["samples"]
    assert {k: x.dims for k, x in sets.items()} == {"inception": 2048, "tiny": 64}
    kept = {k: len(x.rows()) for k, x in sets.items()}
    assert kept == {"inception": 4, "tiny": 0}  # the Fréchet distance alone needs no rows
    assert found.comparisons == {
        "fid": ("frechet", "inception"),
        "kid": ("kernel", "inception"),
        "precision": ("precision", "inception"),
        "fd_tiny": ("frechet", "tiny"),
    }


def test_clips(clips):
    a, b = clips
    found = score(a, reference=b, **QUIET)
    assert found["flicker"]["n"] == found["psnr"]["n"] == 3
    assert 0.6 < found["flicker"]["value"] < 0.7  # random bytes differ by a third on average
    assert (found["fd_tiny"]["n"], found["fd_tiny"]["of"]) == (15, "frames")


def test_what_does_not_apply_says_why(sets):
    a, _, prompts = sets
    others = {**prompts, "00007": "a cat"}
    for metric, given, why in (
        ("judge", others, "'judge'.*'a cat'"),
        ("judge", None, "'judge'.*'00000'"),
        ("flicker", None, "'flicker'.*images"),
    ):
        with pytest.raises(ValueError, match=why):
            score(a, prompts=given, metrics=(metric,), **QUIET)


def test_a_reference_of_other_pictures_makes_no_pairs(
    sets, clips, tmp_path, write_images, rng, capsys
):
    """Real pictures are other pictures: by default only distributions are compared."""
    a, _, _ = sets
    smaller = write_images(tmp_path / "smaller", rng.integers(0, 256, (20, 48, 48, 3), np.uint8))
    other = tmp_path / "other"
    shutil.copytree(a, other)
    for path in list(other.iterdir()):
        path.rename(path.with_name(f"x{path.name}"))
    for reference, why in (
        (smaller, "sample '00000' is 64x64, and 48x48 in the reference"),
        (other, "no id is in both sets"),
        (clips[0], "images against clips"),
    ):
        found = score(a, reference=reference, **QUIET)
        assert set(found) == {"fd_tiny", "kd_tiny", "precision_tiny", "recall_tiny"}
        note = capsys.readouterr().err
        assert "psnr, ssim" in note
        assert why in note


def same(a, b):
    """Metrics, with features to rounding and all else to the last bit."""
    assert list(a) == list(b)
    for name, metric in a.items():
        rough = name.startswith(("fd_", "kd_"))
        value = pytest.approx(metric["value"], rel=1e-5, abs=1e-7) if rough else metric["value"]
        assert b[name]["value"] == value
        assert b[name]["n"] == metric["n"]
        assert b[name]["interval_95"] == metric["interval_95"]


PART = """
import json, sys
from dit_accel.eval.metrics.score import measure
a, b, prompts, path = json.loads(sys.argv[1])
measure(a, reference=b, prompts=prompts, shard=(0, 2), progress=False).save(path)
"""


def test_two_processes_measure_what_one_does(sets, tmp_path):
    """A part is measured in another process, where the hashes of names differ."""
    a, b, prompts = sets
    whole = score(a, reference=b, prompts=prompts, **QUIET)
    path = tmp_path / "0.safetensors"
    call = [sys.executable, "-c", PART, json.dumps([str(a), str(b), prompts, str(path)])]
    other = subprocess.Popen(call)
    part = measure(a, reference=b, prompts=prompts, shard=(1, 2), **QUIET)
    assert other.wait(300) == 0
    part.merge(Measurement.load(path))
    same(whole, part.metric_values())


@pytest.mark.parametrize("count", [3, 25])  # of 25 parts some have nothing to do
def test_any_parts_are_the_whole(sets, clips, count):
    for (a, b), options in ((sets[:2], {"prompts": sets[2]}), (clips, {})):
        whole = score(a, reference=b, **options, **QUIET)
        parts = [
            measure(a, reference=b, shard=(i, count), **options, **QUIET) for i in range(count)
        ]
        for part in parts[1:]:
            parts[0].merge(part)
        same(whole, parts[0].metric_values())


def test_a_part_cannot_be_added_twice_nor_one_of_another_run(sets):
    a, b, _ = sets
    part = measure(a, reference=b, metrics=("fd_tiny",), shard=(0, 2), **QUIET)
    with pytest.raises(ValueError, match=r"samples.*'00000'"):
        part.merge(measure(a, reference=b, metrics=("fd_tiny",), shard=(0, 2), **QUIET))
    with pytest.raises(ValueError, match=r"metrics.*fd_tiny.*kd_tiny"):
        part.merge(measure(a, reference=b, metrics=("kd_tiny",), shard=(1, 2), **QUIET))
    for images, reference, side in ((b, b, "samples"), (a, a, "reference")):
        other = measure(images, reference=reference, metrics=("fd_tiny",), shard=(1, 2), **QUIET)
        with pytest.raises(ValueError, match=f"sets.*{side}"):
            part.merge(other)


def test_a_part_does_not_pass_for_the_set(sets, tmp_path):
    a, b, _ = sets
    part = measure(a, reference=b, metrics=("fd_tiny",), shard=(0, 3), **QUIET)
    with pytest.raises(ValueError, match=r"parts.* 1/3, 2/3"):
        part.metric_values()
    part.merge(measure(a, reference=b, metrics=("fd_tiny",), shard=(2, 3), **QUIET))
    part.save(tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"parts.* 1/3"):
        Measurement.load(tmp_path / "part.safetensors").metric_values()
    with pytest.raises(ValueError, match=r"parts.* 1/3"):
        score(b, reference=tmp_path / "part.safetensors", metrics=("fd_tiny",), **QUIET)
    with pytest.raises(ValueError, match=r"parts.* 3.* 4"):
        part.merge(measure(a, reference=b, metrics=("fd_tiny",), shard=(1, 4), **QUIET))


def test_a_saved_measurement_serves_as_reference(sets, tmp_path):
    a, b, _ = sets
    names = ("fd_tiny", "kd_tiny", "recall_tiny")
    measure(b, metrics=names, **QUIET).save(tmp_path / "b.safetensors")
    saved = score(a, reference=tmp_path / "b.safetensors", metrics=names, **QUIET)
    same(score(a, reference=b, metrics=names, **QUIET), saved)
    parts = [
        measure(a, reference=tmp_path / "b.safetensors", metrics=names, shard=(i, 2), **QUIET)
        for i in range(2)
    ]
    parts[0].merge(parts[1])
    same(saved, parts[0].metric_values())


def test_unfit_saved_measurements_are_refused(sets, tmp_path):
    a, b, _ = sets
    path = tmp_path / "b.safetensors"
    measure(b, metrics=("fd_tiny",), **QUIET).save(path)
    with pytest.raises(ValueError, match=r"'kd_tiny'.* 2 rows.* 0"):
        score(a, reference=path, metrics=("kd_tiny",), **QUIET)
    with pytest.raises(ValueError, match=r"'psnr'.*reference.*saved"):
        score(a, reference=path, metrics=("psnr",), **QUIET)
    torch.manual_seed(0)
    one, other = (
        Extractor(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), name="x", size=8)
        for _ in range(2)
    )
    measure(b, metrics=("fd_x",), extractor=one, **QUIET).save(path)
    with pytest.raises(ValueError, match=r"reference.*linear|reference.*'x'"):
        score(a, reference=path, metrics=("fd_x",), extractor=other, **QUIET)
    with pytest.raises(ValueError, match=r"'fd_tiny'.*'tiny'.* x"):
        score(a, reference=path, metrics=("fd_tiny",), **QUIET)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"b\.safetensors"):
        score(a, reference=path, metrics=("fd_x",), extractor=one, **QUIET)


def test_ids_that_differ_are_refused_unless_allowed(sets, capsys):
    a, b, _ = sets
    (a / "00003.png").unlink()
    (b / "00008.png").unlink()
    for metrics in (("psnr",), None):
        with pytest.raises(ValueError, match=r"00008.*00003"):
            score(a, reference=b, metrics=metrics, **QUIET)
    found = score(a, reference=b, metrics=("psnr", "fd_tiny"), allow_partial=True, **QUIET)
    assert found["psnr"]["n"] == 18
    assert found["fd_tiny"]["n"] == found["fd_tiny"]["n_reference"] == 19
    assert "00008" in capsys.readouterr().err


def test_a_reference_of_other_pictures_is_compared_by_features_alone(sets, tmp_path):
    a, b, _ = sets
    for path in b.iterdir():
        path.rename(b / f"coco-{path.name}")
    found = score(a, reference=b, **QUIET)
    assert sorted(found) == ["fd_tiny", "kd_tiny", "precision_tiny", "recall_tiny"]


def test_a_truncated_picture_is_named(sets):
    a, b, _ = sets
    path = a / "00005.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"00005\.png"):
        score(a, reference=b, **QUIET)


def test_pairs_that_differ_in_size_are_named_before_any_work(sets, clips, monkeypatch):
    from PIL import Image

    a, b, _ = sets
    Image.new("RGB", (32, 64)).save(a / "00002.png")
    found = score(a, reference=b, metrics=("fd_tiny",), **QUIET)  # features are resized
    assert found["fd_tiny"]["n"] == 20
    monkeypatch.setattr(SampleSet, "frames", lambda *_: pytest.fail("read a picture"))
    with pytest.raises(ValueError, match=r"'00002'.*1 of 32x64.*1 of 64x64"):
        score(a, reference=b, metrics=("psnr",), **QUIET)
    (clips[1] / "clip-1" / "00004.png").unlink()
    with pytest.raises(ValueError, match=r"'clip-1'.*5 of 24x32.*4 of 24x32"):
        score(clips[0], reference=clips[1], **QUIET)


def test_too_few_samples_are_refused_before_any_work(sets, write_images, tmp_path, monkeypatch):
    a, b, _ = sets
    one = write_images(tmp_path / "one", np.zeros((1, 64, 64, 3), np.uint8))
    monkeypatch.setattr(SampleSet, "frames", lambda *_: pytest.fail("read a picture"))
    with pytest.raises(ValueError, match=r"'fd_tiny'.* 2 pictures; images=.* has 1"):
        score(one, reference=b, metrics=("fd_tiny",), **QUIET)
    with pytest.raises(ValueError, match=r"'recall_tiny'.* 4 pictures; reference=.* has 1"):
        score(a, reference=one, metrics=("recall_tiny",), **QUIET)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("pnsr",)}, "metric.*'pnsr'.*psnr"),
        ({"metrics": ()}, r"metrics=\(\)"),
        ({"metrics": ("fid",)}, "'fid'.*inception="),
        ({"metrics": ("sfid",)}, "'sfid'.*fid"),
        ({"metrics": ("lpips",)}, "'lpips'.*lpips="),
        ({"metrics": ("clip_score",)}, "'clip_score'.*clip="),
        ({"metrics": ("clip_score",), "clip": "x"}, "'clip_score'.*prompts.*'00000'"),
        ({"metrics": ("fd_other",)}, "'fd_other'"),
        ({"metrics": ("psnr",), "reference": None}, "'psnr'.*reference"),
        ({"metrics": ("fd_tiny",), "reference": None}, "'fd_tiny'.*reference"),
        ({"resize": "nearest"}, "resize='nearest'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
        ({"reference": "nowhere"}, "nowhere"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_wrong_arguments_are_refused_before_any_work(sets, options, message, monkeypatch):
    monkeypatch.setattr(SampleSet, "frames", lambda *_: pytest.fail("read a picture"))
    with pytest.raises(ValueError, match=message):
        score(sets[0], **{"reference": sets[1], **QUIET, **options})


def test_a_bar_on_stderr_and_nothing_on_stdout(sets, capsys):
    score(sets[0], reference=sets[1], metrics=("psnr",), workers=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "20/20" in err


def test_measurements_do_not_depend_on_batches_and_threads(sets):
    a, b, prompts = sets
    options = {"reference": b, "prompts": prompts, "progress": False}
    same(
        score(a, batch_size=32, workers=1, **options), score(a, batch_size=3, workers=3, **options)
    )


def test_unknown_arguments_are_refused(sets):
    with pytest.raises(TypeError, match="refrence"):
        score(sets[0], metrics=("judge",), prompts=sets[2], refrence=sets[1], **QUIET)
