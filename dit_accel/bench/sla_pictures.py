"""Picture of sparse attention in docs/sla.md (pipelines/sla_pictures.py)."""

import os
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from dit_accel import SparseWanPipeline
from dit_accel.bench.ras_pictures import Row, evenly
from dit_accel.demo import SAMPLING
from dit_accel.files import asset
from dit_accel.runtime.install import method_of
from dit_accel.sampling.focus import heat
from dit_accel.sampling.media import contact_sheet, to_uint8, write_png
from dit_accel.sla import SparseLinearAttention

COLUMNS, BLOCK, GAIN = 8, 32, 4
CLIP = "a red circle moving right on a teal background"
DENSITIES = (0.5, 0.25, 0.125, 0.05)


def sla_settings(topk: float) -> dict[str, Any]:
    """Return settings of sparse attention with small blocks, for the few tokens of the clip."""
    return {"topk": topk, "block_q": BLOCK, "block_k": BLOCK, "crossover": "never"}


def sampled_clip(pipe: Any) -> Float[np.ndarray, "t h w 3"]:
    """Return evenly spaced frames of the clip."""
    generator = torch.Generator().manual_seed(0)
    sampling = {**SAMPLING, "max_sequence_length": 16}
    frames = pipe(CLIP, generator=generator, output_type="np", **sampling).frames[0]
    return evenly(frames, COLUMNS)


def blocks_read(pipe: Any) -> UInt8[np.ndarray, "t h w 3"]:
    """Return a picture of the blocks that the query block in the middle of the clip reads.

    Mean over the heads of a middle layer in the last step, at density 0.25. The query block itself is white.
    """
    pipe.enable(sla=sla_settings(0.25))
    sla = method_of(pipe, "sla")
    layers = list(sla.layers.values())
    module: SparseLinearAttention = layers[len(layers) // 2].module
    plan_of, plans = module._plan, []

    def noted(*args: Any) -> Any:
        plans.append(plan_of(*args))
        return plans[-1]

    module._plan = noted  # type: ignore[method-assign, assignment]
    sampled_clip(pipe)
    grid = (SAMPLING["num_frames"] // 2 + 1, SAMPLING["height"] // 8, SAMPLING["width"] // 8)
    order = sla.order(grid, torch.device("cpu"))
    pipe.disable()
    # The last call computes the prompt or its negative prompt.
    read = plans[-1].to_block_mask()[-1].float().mean(0)
    middle = read[len(read) // 2].repeat_interleave(BLOCK)[: order.gather.numel()]
    tokens = order.undo(middle[None, :, None])[0, :, 0].view(grid).numpy()
    own = torch.zeros(order.gather.numel())
    own[len(read) // 2 * BLOCK : (len(read) // 2 + 1) * BLOCK] = 1
    own = order.undo(own[None, :, None])[0, :, 0].view(grid).numpy()
    pictures = heat(tokens)
    pictures[own > 0] = (255, 255, 255)
    return evenly(pictures, COLUMNS)


def draw_sla(output: str | os.PathLike) -> None:
    """Sample a clip dense and at each density, and write the sheet as PNG."""
    pipe = SparseWanPipeline.from_pretrained(asset("tiny-wan"), sla=None)
    dense = sampled_clip(pipe)
    rows: list[Row] = [("tiny-wan, frames of one clip, dense", to_uint8(dense))]
    for topk in DENSITIES:
        pipe.enable(sla=sla_settings(topk))
        sparse = sampled_clip(pipe)
        density = pipe.summary(strict=True).density
        pipe.disable()
        rows += [
            (f"topk {topk}, density {density:.2f}, blocks of {BLOCK}", to_uint8(sparse)),
            (f"difference to dense, {GAIN} times", to_uint8(GAIN * np.abs(sparse - dense))),
        ]
    read = blocks_read(pipe)
    by = dense.shape[1] // read.shape[1]
    title = "what one block of queries (white) reads, blue never, yellow in every head"
    rows.append((title, read.repeat(by, 1).repeat(by, 2)))
    write_png(output, contact_sheet(rows, columns=COLUMNS, tile=128))
