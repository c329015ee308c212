"""`score`: every metric of a set of samples in one pass over its files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_accel.eval.metrics.choices import TINY, Choice, Given
from dit_accel.eval.metrics.clip_score import ClipScore
from dit_accel.eval.metrics.distances import NEIGHBOURS, SUBSET_SIZE, SUBSETS
from dit_accel.eval.metrics.feature_set import KEEP
from dit_accel.eval.metrics.features import Extractor, Resize, check_resize, tiny_extractor
from dit_accel.eval.metrics.inception import load_inception
from dit_accel.eval.metrics.measurement import Measurement, fingerprint
from dit_accel.eval.metrics.meters import ClipMeter, FeatureMeter, FrameMeter, JudgeMeter
from dit_accel.eval.metrics.pairs import Lpips
from dit_accel.eval.metrics.reading import Meters, check_reference, read_all
from dit_accel.eval.results.types import Figure
from dit_accel.sampling.sets import SampleSet

Source = SampleSet | str | os.PathLike


def score(
    images: Source, *, reference: Source | Measurement | None = None, **options: Any
) -> dict[str, Figure]:
    """Figures of a set of samples by metric.

    Args:
        images: the set, or its folder.
        reference: the set it is compared with, or its folder; or, for metrics that compare features,
            the file of a saved measurement of that set.
        options: as in `measure`.

    Raises:
        ValueError: bad input, before any work where it can be known by then.
    """
    return measure(images, reference=reference, need_reference=True, **options).figures()


def measure(
    images: Source,
    *,
    reference: Source | Measurement | None = None,
    prompts: Mapping[str, str] | str | os.PathLike | None = None,
    metrics: Sequence[str] | None = None,
    inception: str | os.PathLike | Extractor | None = None,
    extractor: Extractor | None = None,
    clip: str | os.PathLike | ClipScore | None = None,
    clip_revision: str | None = None,
    lpips: str | os.PathLike | Lpips | None = None,
    lpips_net: str = "alex",
    resize: Resize = "clean",
    allow_other_weights: bool = False,
    allow_partial: bool = False,
    batch_size: int = 32,
    workers: int = 2,
    device: str = "auto",
    progress: bool = True,
    keep: int = KEEP,
    kid_subsets: int = SUBSETS,
    kid_subset_size: int = SUBSET_SIZE,
    neighbours: int = NEIGHBOURS,
    shard: tuple[int, int] = (0, 1),
    need_reference: bool = False,
) -> Measurement:
    """What `score` makes figures of: to save, or to measure a set in parts and merge them.

    Args:
        images, reference: as in `score`. Without a reference the features of `images` alone are taken,
            to be saved as somebody else's reference.
        prompts: by id, or a prompts file or shipped set whose ids are the samples'; default: the set's
            own.
        metrics: names; default: all that the arguments allow. "psnr", "ssim", "lpips" (need the
            reference's samples of the same ids), "flicker" (clips), "clip_score", "judge" (prompts of
            the demo), "fid", "fid_768", "fid_192", "fid_64", "sfid", "kid", "precision", "recall"
            (need `inception`), and "fd_", "kd_", "precision_", "recall_" with the name of `extractor`,
            or "tiny".
        inception: local weights of FID's Inception. This, `clip` and `lpips` can also be what
            `Networks.loaded` gives, to read them once for several sets.
        extractor: any other network.
        clip, clip_revision: a CLIP model's folder or id on the Hub.
        lpips, lpips_net: torchvision's weights of LPIPS' backbone, and which.
        resize: how pictures are brought to Inception's size: "clean", "tf-legacy" or "torch-antialias".
        allow_other_weights: take Inception or LPIPS weights whose sha256 is not the known one.
        allow_partial: compare the ids that both sets have.
        batch_size: pictures a network sees at once.
        workers: threads that read and resize ahead.
        device: "auto", "cpu", "cuda", ...
        progress: whether to show a bar on stderr.
        keep: rows of features kept for kernel distances, precision and recall, evenly by id.
        kid_subsets, kid_subset_size: of the kernel distance.
        neighbours: whose distance is the radius in precision and recall.
        shard: (i, n) measures every n-th sample from the i-th on. Merged, the n measurements are those
            of one process.
        need_reference: refuse metrics that compare features with nothing yet.

    Raises:
        ValueError: bad input, before any work where it can be known by then.
    """
    from dit_accel.sampling.devices import pick_device
    from dit_accel.sampling.settings import check_count

    check_resize(resize)
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 1),
        ("keep", keep, 2),
        ("kid_subsets", kid_subsets, 1),
        ("kid_subset_size", kid_subset_size, 2),
        ("neighbours", neighbours, 1),
    ):
        check_count(name, value, least=least)
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard={shard}: accepted is (i, n) with 0 <= i < n")
    if extractor is not None and extractor.name in (TINY, "inception"):
        raise ValueError(f"extractor: name={extractor.name!r} is taken; accepted is another")
    place = pick_device(device)
    samples = _opened(images)
    given = Given(
        samples,
        open_reference(reference),
        _prompts(samples, prompts),
        tuple(
            name
            for name, at_hand in (("inception", inception), ("lpips", lpips), ("clip", clip))
            if at_hand is not None
        ),
        None if extractor is None else extractor.name,
        allow_partial,
        need_reference,
        neighbours,
    )
    choices = given.choose(metrics)
    measurement = Measurement(
        samples.kind,
        tuple(x.metric for x in choices),
        {x.metric: x.comparison for x in choices if x.comparison},
        sets=_sets(samples, given.reference),
        shards=[shard],
        kid_subsets=kid_subsets,
        kid_subset_size=kid_subset_size,
        neighbours=neighbours,
    )
    wanted = {x.metric for x in choices}

    def network(name: str, kinds: list[str]) -> Extractor:
        if name == "inception":
            assert inception is not None
            if isinstance(inception, Extractor):
                return inception
            return load_inception(
                inception,
                kinds=kinds,
                resize=resize,
                allow_other_weights=allow_other_weights,
                device=place,
            )
        return extractor if extractor and name == extractor.name else tiny_extractor(device=place)

    if lpips is not None and "lpips" in wanted and not isinstance(lpips, Lpips):
        lpips = Lpips(lpips, net=lpips_net, allow_other_weights=allow_other_weights, device=place)
    if clip is not None and "clip_score" in wanted and not isinstance(clip, ClipScore):
        clip = ClipScore(clip, revision=clip_revision, device=place)
    meters = Meters(
        measurement,
        FrameMeter(wanted, lpips if isinstance(lpips, Lpips) else None, measurement),
        [
            FeatureMeter(network(name, list(keeps)), keeps, measurement, batch_size)
            for name, keeps in _kept(choices, keep).items()
        ],
        ClipMeter(clip, given.prompts, measurement, batch_size)
        if isinstance(clip, ClipScore) and "clip_score" in wanted
        else None,
        JudgeMeter(given.prompts, samples.kind == "images", measurement, batch_size)
        if "judge" in wanted
        else None,
    )
    check_reference(given.reference, meters.features)
    read_all(given, meters, shard, workers, progress)
    return measurement


def _kept(choices: Sequence[Choice], keep: int) -> dict[str, dict[str, int]]:
    """Rows to keep, by extractor and kind: the Fréchet distance needs none."""
    out: dict[str, dict[str, int]] = {}
    for choice in choices:
        if choice.extractor is not None:
            rows = out.setdefault(choice.extractor, {})
            needed = 0 if choice.what == "frechet" else keep
            rows[choice.kind] = max(rows.get(choice.kind, 0), needed)
    return out


def _sets(samples: SampleSet, reference: SampleSet | Measurement | None) -> dict[str, str]:
    out = {"samples": fingerprint(samples)}
    if isinstance(reference, SampleSet):
        out["reference"] = fingerprint(reference)
    elif reference is not None:
        out["reference"] = reference.sets["samples"]
    return out


def _opened(source: Source) -> SampleSet:
    return source if isinstance(source, SampleSet) else SampleSet.open(source)


def open_reference(source: Source | Measurement | None) -> SampleSet | Measurement | None:
    """A set, or the measurement that a .safetensors file holds.

    Raises:
        ValueError: it is neither, or only a part of one.
    """
    if source is None or isinstance(source, SampleSet):
        return source
    if isinstance(source, Measurement) or Path(source).suffix == ".safetensors":
        saved = source if isinstance(source, Measurement) else Measurement.load(source)
        saved.check_whole()
        return saved
    return SampleSet.open(source)


def _prompts(
    samples: SampleSet, prompts: Mapping[str, str] | str | os.PathLike | None
) -> dict[str, str]:
    if prompts is None:
        return samples.prompts
    if isinstance(prompts, Mapping):
        return dict(prompts)
    from dit_accel.sampling.prompt_sets import load_prompts

    return {record.id: record.prompt for record in load_prompts(prompts)}
