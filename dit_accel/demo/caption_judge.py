"""Judging samples by their prompts: whether they show what a caption of the demo data names."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from .clips import Clips
from .judge import load_shape_judge
from .report import score_clips
from .vocabulary import BACKGROUNDS, TEMPLATES, caption, combinations


@cache
def _vocabulary(still: bool) -> dict[str, tuple[int, int, int, int, int]]:
    """Return shape, colour, motion, background and template of every caption of the demo data."""
    out: dict[str, tuple[int, int, int, int, int]] = {}
    for combination in combinations():
        for background in range(len(BACKGROUNDS)):
            for template in range(len(TEMPLATES)):
                text = caption(combination, background, template, with_motion=not still)
                # A caption without a background fits several; the first one serves.
                out.setdefault(text, (*combination, background, template))
    return out


def unknown_prompt(prompts: Mapping[str, str], ids: Sequence[str], *, still: bool) -> str | None:
    """Return why these samples cannot be judged; None if they can."""
    for name in ids:
        if name not in prompts:
            return f"sample {name!r} has no prompt"
        if prompts[name] not in _vocabulary(still):
            kind = "stills" if still else "clips"
            return f"prompt {prompts[name]!r} is not a caption of the demo's {kind}"
    return None


def judge_captions(
    clips: Sequence[UInt8[np.ndarray, "t h w 3"]], prompts: Sequence[str], *, still: bool
) -> list[dict[str, bool | None]]:
    """Return for each sample which properties are right; None for a background that the prompt leaves open.

    Args:
        clips: samples of one length and size.
        prompts: captions of the demo data, one per sample.
        still: samples are images, which have no motion.
    """
    labels = torch.tensor([_vocabulary(still)[x] for x in prompts])
    open_ = torch.zeros(len(prompts), dtype=torch.float32)  # not named by a caption
    names = ("shape", "colour", "motion", "background", "template")
    named = dict(zip(names, labels.unbind(1), strict=True))
    place = open_[:, None].expand(-1, 2)
    expected = Clips(**named, size=open_, speed=open_, place=place, phase=open_)
    video = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    records: list[dict[str, Any]] = score_clips(video, expected, load_shape_judge(), still)
    return [record["right"] for record in records]
