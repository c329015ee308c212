"""The clips as a torch Dataset, and as a folder of mp4 files with captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from dit_accel.files import atomic_directory

from .checks import check_count, check_empty_dir, check_frame, check_split
from .clips import Clips, draw_clips, render
from .vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

_LABELS = {"shape": SHAPES, "colour": COLOURS, "motion": MOTIONS, "background": BACKGROUNDS}


class ShapesDataset(Dataset[dict[str, Any]]):
    """Captioned clips of one shape moving over a plain background.

    Clip i depends on (split, seed, i) alone, not on `size`, and shows the same thing at any frame
    size and number of frames (one frame: a still from the middle of the motion).

    Args:
        split: "train", "heldout" (the 10 % of combinations that "train" never shows) or "all".
        seed: >= 0.
        size: how many clips the dataset has.
        num_frames, height, width: of each clip; sides of at least 16 pixels.

    An item is a dict of `video` (float32 [3, num_frames, height, width] in [-1, 1]), `caption`, and
    the labels `shape`, `colour`, `motion`, `background` (indices into the vocabulary).
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 1024,
        num_frames: int = 33,
        height: int = 64,
        width: int = 64,
    ) -> None:
        check_split(split)
        check_count("seed", seed, 0)
        check_count("size", size)
        check_frame(num_frames, height, width)
        self.split, self.seed, self.size = split, seed, size
        self.num_frames, self.height, self.width = num_frames, height, width

    def __len__(self) -> int:
        return self.size

    def describe(self, index: int) -> Clips:
        """The description of one clip, as a batch of one."""
        if not -self.size <= index < self.size:
            raise IndexError(f"index must lie in [{-self.size}, {self.size}), got {index}")
        mixed = (self.seed * 0x9E3779B97F4A7C15 + index % self.size + 1) % 2**63
        return draw_clips(1, torch.Generator().manual_seed(mixed), self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = self.describe(index)
        video = render(clip, self.num_frames, self.height, self.width)[0]
        labels = {name: int(getattr(clip, name)) for name in _LABELS}
        return {"video": video, "caption": clip.captions()[0], **labels}


def make_data(
    output_dir: str | Path,
    num_clips: int = 256,
    split: str = "train",
    seed: int = 0,
    num_frames: int = 33,
    height: int = 64,
    width: int = 64,
    fps: int = 16,
    progress: bool = True,
) -> Path:
    """Writes a `ShapesDataset` as `videos/00000.mp4, ...` and `captions.jsonl`; returns the folder.

    Each line of captions.jsonl has `file_name` (relative to the folder), `text` (the caption) and
    the labels as words, the layout of a Hugging Face video folder. The folder appears only when it
    is complete.

    Args:
        output_dir: must not exist yet, or be empty.
        num_clips: how many.
        split, seed, num_frames, height, width: as in `ShapesDataset`; height and width must be even
            (H.264).
        fps: frames a second of the mp4 files.
        progress: whether to show a progress bar on stderr.
    """
    import imageio.v3 as iio
    from tqdm import trange

    output = check_empty_dir("output_dir", output_dir)
    check_count("num_clips", num_clips)
    check_count("fps", fps)
    for name, value in (("height", height), ("width", width)):
        if value % 2:
            raise ValueError(f"{name} must be even to be written as mp4, got {value}")
    dataset = ShapesDataset(split, seed, num_clips, num_frames, height, width)

    with atomic_directory(output) as temporary:
        (temporary / "videos").mkdir()
        with (temporary / "captions.jsonl").open("w") as captions:
            for i in trange(num_clips, desc="clips", disable=not progress):
                item = dataset[i]
                frames = ((item["video"] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
                name = f"videos/{i:05d}.mp4"
                # yuv444 and a low crf keep the small shapes' colours and edges.
                options = ["-crf", "8", "-preset", "veryfast", "-bitexact"]
                iio.imwrite(
                    temporary / name,
                    frames,
                    plugin="FFMPEG",
                    fps=fps,
                    codec="libx264",
                    pixelformat="yuv444p",
                    macro_block_size=1,
                    output_params=options,
                )
                labels = {key: words[item[key]] for key, words in _LABELS.items()}
                captions.write(
                    json.dumps({"file_name": name, "text": item["caption"], **labels}) + "\n"
                )
    return output
