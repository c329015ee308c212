"""Name, direction, digits and definition of each metric and measurement in a report."""

from dataclasses import dataclass, replace
from typing import Literal

Better = Literal["higher", "lower"]
TO_DENSE = "_to_dense"
"""Ends the names of distances to the dense samples. Without it the distance is to real pictures."""
FINE = "_fine"
"""Ends the names of paired metrics that compare with the fine run: dense sampling with many more steps."""
_ENDS = {
    TO_DENSE: "The reference images are the samples of the reference row, made from the same prompts and noise. The value "
    "measures drift from dense sampling, not quality.",
    FINE: "Here the reference is dense sampling with many more steps from the same noise, so that the dense row has a value "
    "too.",
}


@dataclass(frozen=True)
class Definition:
    """Presentation and meaning of a metric."""

    label: str
    better: Better | None
    digits: int | None  # digits after the point. None: four significant digits
    text: str  # one or two sentences for readers of the report
    of_reference: bool = False  # compares with the reference row, which has no value itself


_PAIRED = "between a sample and the sample of the reference row with the same prompt and seed"
_TEXTS = {
    "psnr": f"Peak signal-to-noise ratio {_PAIRED}: 10 log10(1 / mean squared difference) over all pixels and frames in "
    "[0, 1], averaged over prompts. Identical pairs have no finite value and are counted separately.",
    "ssim": f"Structural similarity {_PAIRED}, in an 11 x 11 Gaussian window, averaged over frames and prompts.",
    "lpips": f"Learned perceptual distance {_PAIRED}, averaged over frames and prompts.",
    "fid": "Fréchet distance between Gaussian fits of Inception features of the samples and of the reference images. It "
    "falls with the number of samples, so compare only values with equal n.",
    "kid": "Unbiased squared maximum mean discrepancy of Inception features with the kernel (x·y / d + 1)³, averaged over "
    "random subsets. It can be slightly negative.",
    "fd": "Fréchet distance as in FID, on features of another network. Its scale differs: never compare it with an FID.",
    "kd": "Kernel distance as in KID, on features of another network. Its scale differs.",
    "precision": "Fidelity: share of samples whose features lie within the nearest-neighbour balls of the reference images.",
    "recall": "Variety: share of reference images whose features lie within the nearest-neighbour balls of the samples.",
    "clip_score": "100 times the cosine of the CLIP embeddings of a sample and its prompt, at least 0, averaged over prompts.",
    "flicker": "Temporal flickering as in VBench: 1 minus the mean absolute difference of neighbouring frames. A still clip "
    "has 1, so read this metric together with the others.",
    "judge": "Share of samples in which a trained classifier sees what the demo prompt names: everything, or one property.",
}
_SHOWN: dict[str, tuple[str, Better, int]] = {
    "psnr": ("PSNR", "higher", 2),
    "ssim": ("SSIM", "higher", 4),
    "lpips": ("LPIPS", "lower", 4),
    "fid": ("FID", "lower", 2),
    "kid": ("KID", "lower", 4),
    "fd": ("FD", "lower", 3),
    "kd": ("KD", "lower", 4),
    "precision": ("Precision", "higher", 3),
    "recall": ("Recall", "higher", 3),
    "clip_score": ("CLIP score", "higher", 2),
    "flicker": ("Flicker", "higher", 4),
    "judge": ("Judge", "higher", 3),
}
METRICS = {
    name: Definition(*shown, _TEXTS[name], of_reference=name in ("psnr", "ssim", "lpips"))
    for name, shown in _SHOWN.items()
}
"""Metrics in the order of the table."""
SECONDS = Definition(
    "Seconds", "lower", None,
    "Wall-clock seconds of one call after unmeasured warm-up calls, with the device synchronised: median and quartiles of "
    "the measured calls. Text, denoise and decode are parts of the total.",
)  # fmt: skip
SPEEDUP = Definition(
    "Speed-up", "higher", 2,
    "Median seconds of the reference over median seconds of the row. The range divides the slow quartile of one by the "
    "fast quartile of the other.",
)  # fmt: skip
MEMORY = Definition("Peak memory", "lower", 1, "Highest memory in use during the measured calls.")
DENSITY = Definition(
    "Density", None, 3,
    "Attended share of all (query, key) pairs over every self-attention call, dense steps and layers included.",
)  # fmt: skip
COST = Definition("Cost", None, 2, "Number of dense steps of equal cost, by counted FLOPs.")


def definition(metric: str) -> Definition:
    """Return the definition of a metric; variants such as `fd_tiny` or `judge_shape` inherit it.

    An unknown metric is shown under its own name and has no direction.
    """
    if metric in METRICS:
        return METRICS[metric]
    for end, text in _ENDS.items():
        if metric.endswith(end):
            about, dense = definition(metric.removesuffix(end)), end == TO_DENSE
            label = f"{about.label} to {'dense' if dense else 'fine run'}"
            return replace(about, label=label, text=f"{about.text} {text}", of_reference=dense)
    family, _, variant = metric.partition("_")
    if family in METRICS:
        return replace(METRICS[family], label=f"{METRICS[family].label} ({variant})")
    return Definition(metric, None, None, "A metric that this version does not describe.")


def usual_order(metric: str) -> tuple[int, str]:
    """Return the sort key of a metric: the order of `METRICS`, unknown metrics last."""
    known = list(METRICS)
    family = metric if metric in METRICS else metric.partition("_")[0]
    return (known.index(family) if family in METRICS else len(known)), metric
