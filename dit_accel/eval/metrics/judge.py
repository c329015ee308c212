"""Judge accuracy: whether samples of the demo's prompts show what the prompt names."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from dit_accel.eval.metrics.figures import share_figure
from dit_accel.eval.results.types import Figure

PARTS = ("all", "shape", "colour", "motion", "background")
"""What a sample can be right in."""


@cache
def _vocabulary(still: bool) -> dict[str, tuple[int, int, int, int, int]]:
    """Shape, colour, motion, background and template of every caption of the demo data."""
    from dit_accel.demo.vocabulary import BACKGROUNDS, TEMPLATES, caption, combinations

    out: dict[str, tuple[int, int, int, int, int]] = {}
    for combination in combinations():
        for background in range(len(BACKGROUNDS)):
            for template in range(len(TEMPLATES)):
                text = caption(combination, background, template, with_motion=not still)
                # Captions that leave something open fit several; which one does not matter then.
                out.setdefault(text, (*combination, background, template))
    return out


def unknown_prompt(prompts: Mapping[str, str], ids: Sequence[str], *, still: bool) -> str | None:
    """Why these samples cannot be judged; None if they can."""
    for name in ids:
        if name not in prompts:
            return f"sample {name!r} has no prompt"
        if prompts[name] not in _vocabulary(still):
            kind = "stills" if still else "clips"
            return f"prompt {prompts[name]!r} is not a caption of the demo's {kind}"
    return None


def judge(
    clips: Sequence[UInt8[np.ndarray, "t h w 3"]], prompts: Sequence[str], *, still: bool
) -> list[dict[str, bool | None]]:
    """What of each sample is right: shape, colour, motion (of clips), background (None where the
    prompt leaves it open), and all of them.

    Args:
        clips: of one length and size.
        prompts: one each, of the demo's vocabulary.
    """
    from dit_accel.demo.clips import Clips
    from dit_accel.demo.judge import load_shape_judge
    from dit_accel.demo.report import score_clips

    labels = torch.tensor([_vocabulary(still)[x] for x in prompts])
    shape, colour, motion, background, template = labels.unbind(1)
    any_ = torch.zeros(len(prompts), dtype=torch.float32)  # what a caption does not say
    expected = Clips(
        shape, colour, motion, background, template, any_, any_, any_[:, None].expand(-1, 2), any_
    )
    video = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    records: list[dict[str, Any]] = score_clips(video, expected, load_shape_judge(), still)
    return [record["right"] for record in records]


def judge_figures(rights: Sequence[Mapping[str, bool | None]]) -> dict[str, Figure]:
    """`judge` (all that was asked), and `judge_shape` and so on, over the samples that were asked."""
    out: dict[str, Figure] = {}
    for part in PARTS:
        known = [x for right in rights if (x := right.get(part)) is not None]
        if known:
            key = "judge" if part == "all" else f"judge_{part}"
            out[key] = share_figure(sum(known), len(known))
    return out
