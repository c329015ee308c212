"""`StepMeter`: measure time, tokens and memory of steps, and show a progress bar."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from dit_accel.finetune.batch import Batch

SHOWN = {
    "loss": "{:.4f}",
    "gradient_norm": "{:.3f}",
    "density": "{:.3f}",
    "tokens_per_second": "{:.0f}",
}
"""Values in the progress bar, with their formats."""


class StepMeter:
    """Measure the steps of a run, and show them in a progress bar.

    Args:
        patch_size: patch size in the config of the transformer: (t, h, w), or one number for h and w.
        device: device whose memory is reported.
        counters: counters of the run. The meter stores `seconds` there.
        total: number of steps of the run.
        start: number of finished steps.
        shown: show a progress bar on stderr.
    """

    def __init__(
        self,
        *,
        patch_size: int | Sequence[int],
        device: torch.device,
        counters: dict[str, Any],
        total: int = 0,
        start: int = 0,
        shown: bool = False,
    ) -> None:
        from tqdm import tqdm

        self.patch = patch_size**2 if isinstance(patch_size, int) else math.prod(patch_size)
        self.device, self.counters = device, counters
        counters.setdefault("seconds", 0.0)
        self.tokens = 0
        """Image tokens of this process in the current step."""
        self._began = 0.0
        self.bar = tqdm(total=total, initial=start, desc="training", unit="step", disable=not shown)

    def begin(self) -> None:
        """Start measuring a step."""
        self._began, self.tokens = time.perf_counter(), 0

    def count(self, batch: Batch) -> None:
        """Count the image tokens of a micro-batch."""
        self.tokens += len(batch) * math.prod(batch.latents.shape[2:]) // self.patch

    def end(self, tokens: int) -> dict[str, float]:
        """Finish measuring a step.

        Args:
            tokens: number of image tokens of all processes in the step.

        Returns:
            `seconds` and `tokens_per_second` of the step, and `memory_gib`, the peak memory of this process so far.
        """
        seconds = time.perf_counter() - self._began
        self.counters["seconds"] += seconds
        values = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        memory = memory_used(self.device)
        return values if memory is None else values | {"memory_gib": memory / 2**30}

    def show(self, values: dict[str, Any]) -> None:
        """Advance the progress bar by one step, and show the values of the step."""
        shown = {
            name: form.format(values[name])
            for name, form in SHOWN.items()
            if isinstance(values.get(name), int | float)
        }
        if "memory_gib" in values:
            shown["memory"] = f"{values['memory_gib']:.2f} GiB"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Close the progress bar."""
        self.bar.close()


def memory_used(device: torch.device) -> int | None:
    """Return the peak memory in bytes of the GPU, or of this process on a CPU. None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    import sys

    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
