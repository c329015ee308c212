"""`noise_levels`: share of noise in the latents at each step of a run."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.runtime.run import Run


def noise_levels(run: Run) -> Float[Tensor, " steps_and_end"] | None:
    """Return the noise level s of each step of a run and of its end.

    Latents are (1 - s) * signal + s * noise, up to a factor. `sigmas` of flow matching are these levels. Other schedulers
    have sigma = noise / signal, as `sigmas` or through `alphas_cumprod`; then s = sigma / (1 + sigma).

    Returns:
        Levels in [0, 1], fp32, on the CPU; None if they are not known.
    """
    steps = run.num_steps
    if steps is None:
        return None
    scheduler, sigmas = run.scheduler, run.sigmas()
    signal = getattr(scheduler, "alphas_cumprod", None)
    if sigmas is None and isinstance(signal, Tensor) and run.timesteps is not None:
        kept = signal.float().cpu()[
            run.timesteps[run.begin :].long().cpu().clamp(max=len(signal) - 1)
        ]
        sigmas = ((1 - kept) / kept.clamp(min=1e-12)).sqrt()
    if sigmas is None or len(sigmas) < steps:
        return None
    # numpy, because reading a number from a torch tensor counts as a device sync.
    levels = sigmas[: steps + 1].detach().float().cpu().numpy()
    if len(levels) == steps:
        levels = np.append(levels, np.float32(0))
    config = getattr(scheduler, "config", None)
    flow = isinstance(config, Mapping) and config.get("use_flow_sigmas")
    if not flow and (isinstance(signal, Tensor) or levels.max() > 1):
        levels = levels / (1 + levels)
    return torch.from_numpy(levels.clip(0, 1))
