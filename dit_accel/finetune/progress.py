"""`StepMeter`: time, tokens and memory of steps, and the progress bar."""

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
"""Values of the progress bar, with their formats."""


class StepMeter:
    """Measures steps and shows them.

    Args:
        patch_size: latents a token, as the transformer's config has it: (t, h, w), or one number for h and w.
        device: device whose memory is reported.
        total, start: steps of the run, and those that are finished.
        shown: whether to show a progress bar on stderr.
        counters: of the run; `seconds` is kept there.
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
        """Begin a step."""
        self._began, self.tokens = time.perf_counter(), 0

    def count(self, batch: Batch) -> None:
        """Count the image tokens of a micro-batch."""
        self.tokens += len(batch) * math.prod(batch.latents.shape[2:]) // self.patch

    def end(self, tokens: int) -> dict[str, float]:
        """End a step.

        Args:
            tokens: image tokens of all processes in the step.

        Returns:
            `seconds` and `tokens_per_second` of the step, and `memory_gib`, the most memory of this process so far.
        """
        seconds = time.perf_counter() - self._began
        self.counters["seconds"] += seconds
        values = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        memory = memory_used(self.device)
        return values if memory is None else values | {"memory_gib": memory / 2**30}

    def show(self, values: dict[str, Any]) -> None:
        """Advance the progress bar and show values of a step."""
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
    """Return the most bytes in use so far: of the GPU, or of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    # KiB on Linux, bytes on macOS.
    import sys

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
