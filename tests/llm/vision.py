"""Tiny vision-language models with random weights, and their inputs without a processor."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from .models import BASE, SLIDING, SMALL_HEADS

IMAGE, VIDEO, VISION_START, VISION_END = 93, 94, 95, 96
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
}
PATCH = 3 * 2 * 4 * 4
"""Numbers of a patch: channels, pictures of a temporal patch, height and width."""
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen2_5_VL": (
        {"rope_parameters": MROPE},
        {"window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "Qwen3VL": (
        {**SMALL_HEADS, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    ),
}
"""Families, with what differs in their text and vision configs."""

Part = int | tuple[str, int, int, int]
"""So many tokens of text, or ("image" | "video", t, h, w): patches in time, height and width; 2 x 2 make a token."""


def make(name: str) -> Any:
    """Return a model of this family."""
    text, vision = PARTS[name]
    config = getattr(transformers, f"{name}Config")(
        text_config={**BASE, **text}, vision_config={**VISION, **vision}, **TOKENS
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


def make_gemma3() -> Any:
    """Return a multimodal Gemma 3 of one sliding and two full layers, whose images have four tokens."""
    layers = ["sliding_attention", "full_attention", "full_attention"]
    config = transformers.Gemma3Config(
        text_config={**BASE, **SLIDING, "layer_types": layers},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def inputs(name: str, *rows: Sequence[Part], side: str = "left") -> dict[str, torch.Tensor]:
    """Return what a processor returns for these prompts, padded on one side; equal rows have equal contents."""
    ids: list[list[int]] = []
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    pixels: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
    for row in rows:
        g = torch.Generator().manual_seed(zlib.crc32(repr(row).encode()))
        ids.append([])
        for part in row:
            if isinstance(part, int):
                ids[-1] += _text(part, g)
                continue
            kind, t, h, w = part
            ids[-1] += _placeholders(name, kind, t, h * w // 4, g)
            grids[kind].append([t, h, w])
            pixels[kind].append(torch.randn(t * h * w, PATCH, generator=g))
    longest = max(map(len, ids))
    padding = [[0] * (longest - len(x)) for x in ids]
    left = side == "left"
    table = torch.tensor([p + x if left else x + p for p, x in zip(padding, ids, strict=True)])
    made = {"input_ids": table, "mm_token_type_ids": (table == IMAGE) + 2 * (table == VIDEO)}
    if any(padding):
        made["attention_mask"] = (table != 0).long()
    for kind, values in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            made |= {values: torch.cat(pixels[kind]), f"{kind}_grid_thw": torch.tensor(grids[kind])}
    return made


def _text(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, IMAGE, (count,), generator=generator).tolist()


def _placeholders(
    name: str, kind: str, frames: int, size: int, generator: torch.Generator
) -> list[int]:
    """Return the tokens of an image or a video: Qwen3-VL puts a timestamp before each frame of a video."""
    token = IMAGE if kind == "image" else VIDEO
    if name == "Qwen3VL" and kind == "video":
        found = []
        for _ in range(frames):
            found += [*_text(2, generator), VISION_START, *[token] * size, VISION_END]
        return found
    return [VISION_START, *[token] * (frames * size), VISION_END]
