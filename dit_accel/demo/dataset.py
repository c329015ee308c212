"""The procedural clips as a torch `Dataset`, and as a folder of mp4 files with captions."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from dit_accel.files import atomic_directory
from dit_accel.sampling.settings import check_count, check_seed

from .clips import Clips, draw_clips, render
from .vocabulary import LABELS, combinations


def check_frame(num_frames: int, height: int, width: int) -> None:
    """Raise ValueError unless there is a frame, and its sides are large enough to show a shape."""
    check_count("num_frames", num_frames)
    check_count("height", height, least=16)
    check_count("width", width, least=16)


def check_output_dir(path: str | Path) -> Path:
    """Return `path`; raise ValueError unless it is a new or an empty folder."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output_dir={str(path)!r}: must be a new or an empty folder")
    return folder


class ShapesDataset(Dataset[dict[str, Any]]):
    """Captioned clips of one shape moving over a plain background.

    Clip i depends on (split, seed, i) only, not on `size`. It shows the same motion at any frame size and
    number of frames. A clip of one frame is a still from the middle of the motion.

    Args:
        split: "train", "heldout" (the 10 % of combinations that "train" never shows) or "all".
        seed: integer >= 0.
        size: number of clips in the data set.
        num_frames: frames per clip.
        height, width: pixels, at least 16.

    An item is a dict with `video` (float32 `[3, num_frames, height, width]` in [-1, 1]), `caption`, and the
    labels `shape`, `colour`, `motion` and `background` (indices into the vocabulary).
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
        combinations(split)  # checks it
        check_seed(seed)
        check_count("size", size)
        check_frame(num_frames, height, width)
        self.split, self.seed, self.size = split, seed, size
        self.frame = num_frames, height, width

    def __len__(self) -> int:
        return self.size

    def describe(self, index: int) -> Clips:
        """Return the description of one clip, as a batch of one."""
        if not -self.size <= index < self.size:
            raise IndexError(f"index={index}: must be in [{-self.size}, {self.size})")
        mixed = (self.seed * 0x9E3779B97F4A7C15 + index % self.size + 1) % 2**63
        return draw_clips(1, torch.Generator().manual_seed(mixed), self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = self.describe(index)
        labels = {name: int(getattr(clip, name)) for name in LABELS}
        return {"video": render(clip, *self.frame)[0], "caption": clip.captions()[0], **labels}


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
    """Write a `ShapesDataset` as `videos/00000.mp4, ...` and `captions.jsonl`, and return the folder.

    The layout is that of a Hugging Face video folder: each line of captions.jsonl has `file_name` (relative to
    the folder), `text` (the caption) and the labels as words. The folder appears only when it is complete.

    Args:
        output_dir: new or empty folder.
        num_clips: number of clips.
        split, seed, num_frames, height, width: arguments of `ShapesDataset`. H.264 needs an even height and width.
        fps: frames per second of the mp4 files.
        progress: show a progress bar on stderr.
    """
    import imageio.v3 as iio
    from tqdm import trange

    output = check_output_dir(output_dir)
    check_count("num_clips", num_clips)
    check_count("fps", fps, largest=1000)
    for name, value in (("height", height), ("width", width)):
        if value % 2:
            raise ValueError(f"{name}={value}: must be even, because H.264 needs it")
    dataset = ShapesDataset(split, seed, num_clips, num_frames, height, width)
    # yuv444 and a low crf keep the colours and edges of small shapes.
    encoding: dict[str, Any] = {"codec": "libx264", "pixelformat": "yuv444p", "macro_block_size": 1}
    encoding["output_params"] = ["-crf", "8", "-preset", "veryfast", "-bitexact"]
    with atomic_directory(output) as temporary:
        (temporary / "videos").mkdir()
        with (temporary / "captions.jsonl").open("w") as captions:
            for i in trange(num_clips, desc="clips", disable=not progress):
                item = dataset[i]
                frames = ((item["video"] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
                line = {"file_name": f"videos/{i:05d}.mp4", "text": item["caption"]}
                path = temporary / line["file_name"]
                iio.imwrite(path, frames, plugin="FFMPEG", fps=fps, **encoding)
                line |= {name: words[item[name]] for name, words in LABELS.items()}
                captions.write(json.dumps(line) + "\n")
    return output
