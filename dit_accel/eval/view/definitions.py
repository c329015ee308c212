"""What each figure of a report is: its name, unit, direction, digits and how it is defined."""

from dataclasses import dataclass, replace
from typing import Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Definition:
    """How a figure is shown, and what it says."""

    label: str
    text: str
    """One or two sentences for readers of the report."""
    better: Better | None = None
    digits: int | None = None
    """After the point; None: four significant digits."""
    limits: tuple[float | None, float | None] = (None, None)
    """No value lies outside; an axis need not go further."""
    of_reference: bool = False
    """Compares with the reference row, which therefore has no value of its own."""


_UNIT = (0.0, 1.0)
_PAIRED = "the same prompt and seed of the reference row"

METRICS: dict[str, Definition] = {
    "psnr": Definition(
        "PSNR",
        f"Peak signal-to-noise ratio to {_PAIRED}: 10 log10(1 / mean squared difference) over all "
        "pixels and frames in [0, 1], averaged over prompts. Identical pairs have no finite value "
        "and are counted beside it.",
        "higher",
        2,
        (0.0, None),
        of_reference=True,
    ),
    "ssim": Definition(
        "SSIM",
        f"Structural similarity to {_PAIRED} in an 11 x 11 Gaussian window, averaged over frames "
        "and prompts.",
        "higher",
        4,
        (-1.0, 1.0),
        of_reference=True,
    ),
    "lpips": Definition(
        "LPIPS",
        f"Learned perceptual distance to {_PAIRED}, averaged over frames and prompts.",
        "lower",
        4,
        (0.0, None),
        of_reference=True,
    ),
    "fid": Definition(
        "FID",
        "Fréchet distance between Gaussian fits of Inception's features of these samples and of the "
        "reference images. It falls with the number of samples: compare equal n only.",
        "lower",
        2,
        (0.0, None),
    ),
    "sfid": Definition(
        "sFID (ours)",
        "The Fréchet distance on spatial features (the first 7 channels of mixed_6/conv), which see layout "
        "rather than content. The layer and channels are ADM's; no published figure confirms ours.",
        "lower",
        2,
        (0.0, None),
    ),
    "kid": Definition(
        "KID",
        "Unbiased squared maximum mean discrepancy of Inception's features under the kernel "
        "(x·y / d + 1)³, averaged over random subsets. It may fall a little below 0.",
        "lower",
        4,
    ),
    "fd": Definition(
        "FD",
        "The Fréchet distance as in FID on the features of another network, with a scale of its own: "
        "never compare it with an FID.",
        "lower",
        3,
        (0.0, None),
    ),
    "kd": Definition(
        "KD",
        "The kernel distance as in KID on the features of another network, with a scale of its own.",
        "lower",
        4,
    ),
    "precision": Definition(
        "Precision",
        "Share of samples whose features lie within the nearest-neighbour balls of the reference "
        "images: fidelity.",
        "higher",
        3,
        _UNIT,
    ),
    "recall": Definition(
        "Recall",
        "Share of reference images whose features lie within the nearest-neighbour balls of the "
        "samples: variety.",
        "higher",
        3,
        _UNIT,
    ),
    "clip_score": Definition(
        "CLIP score",
        "100 times the cosine of CLIP's embeddings of a sample and of its prompt, not below 0, "
        "averaged over prompts.",
        "higher",
        2,
        (0.0, 100.0),
    ),
    "flicker": Definition(
        "Flicker",
        "Temporal flickering as in VBench: 1 minus the mean absolute difference of neighbouring "
        "frames; 1 is a still clip. It rewards stillness, so read it beside the others.",
        "higher",
        4,
        _UNIT,
    ),
    "judge": Definition(
        "Judge",
        "Share of samples in which a trained judge sees what the prompt of the demo data names: all "
        "of it, or one thing.",
        "higher",
        3,
        _UNIT,
    ),
}

TO_DENSE = "_to_dense"
"""Ends the keys of distances to the dense rows' own samples, not to real pictures."""
FINE = "_fine"
"""Ends the keys of paired metrics that compare with a fine run: dense sampling with many more steps."""

SECONDS = Definition(
    "Seconds",
    "Wall-clock seconds of one call after unmeasured warm-up calls, the device synchronised: median "
    "and quartiles over the measured calls. Text, denoise and decode are the parts of total.",
    "lower",
)
SPEEDUP = Definition(
    "Speed-up",
    "Median seconds of the reference over median seconds of this row. The range sets the slow "
    "quartile of one against the fast quartile of the other.",
    "higher",
    2,
)
MEMORY = Definition("Peak memory", "Highest memory in use during the measured calls.", "lower", 1)
DENSITY = Definition(
    "Density",
    "Attended share of all (query, key) pairs over every self-attention call, dense steps and "
    "layers included.",
    digits=3,
)
COST = Definition(
    "Cost", "Steps of a dense run that would cost as much, by counted FLOPs.", digits=2
)


def definition(metric: str) -> Definition:
    """That of a metric; `fid_768`, `fd_tiny` or `judge_shape` are variants of `fid`, `fd`, `judge`.

    A metric that is not known keeps its key as its name and has no direction.
    """
    if metric in METRICS:
        return METRICS[metric]
    if metric.endswith(TO_DENSE):
        about = definition(metric.removesuffix(TO_DENSE))
        return replace(
            about,
            label=f"{about.label} to dense",
            text=f"{about.text} Here the reference images are the samples of the reference row, drawn from the "
            "same prompts and noise: it says how far a set drifts from dense sampling, not how good it is.",
            of_reference=True,
        )
    if metric.endswith(FINE):
        about = definition(metric.removesuffix(FINE))
        return replace(
            about,
            label=f"{about.label} to fine run",
            text=f"{about.text} Here the reference is dense sampling with many more steps from the same noise, which the "
            "solver tends to: the dense row has a distance to it too.",
            of_reference=False,
        )
    family, _, variant = metric.partition("_")
    if family in METRICS:
        return replace(METRICS[family], label=f"{METRICS[family].label} ({variant})")
    return Definition(metric, "A figure that this version does not describe.")


def usual_order(metric: str) -> tuple[int, str]:
    """To sort metrics by: families in the order above, the unknown last."""
    known = list(METRICS)
    family = metric if metric in METRICS else metric.partition("_")[0]
    return (known.index(family) if family in METRICS else len(known)), metric
