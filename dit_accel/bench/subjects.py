"""Trained models as subjects of quality benchmarks: their prompts, samples and scores."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel import control, demo
from dit_accel.demo.clips import describe_clips
from dit_accel.demo.report import judged_clips, judged_stills, score_clips
from dit_accel.demo.vocabulary import Combination
from dit_accel.eval.metrics.pairs import ssim
from dit_accel.eval.metrics.values import bootstrap_interval
from dit_accel.files import asset
from dit_accel.runtime.install import installation_of

METRICS = ("psnr_db", "ssim", "latent_error", "right")


class Subject:
    """A trained model and the prompts that it samples.

    Args:
        model: "tiny-wan", "tiny-sd3", "tiny-lumina2", or a folder with a diffusers repository.
        count: number of prompts.
    """

    def __init__(self, model: str, count: int) -> None:
        from dit_accel.sampling.load import load_pipeline

        path = Path(model)
        self.pipe = load_pipeline(
            path if path.is_dir() else asset(model), sla=None, device="auto", dtype="fp32"
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.still = not hasattr(self.pipe, "vae_scale_factor_temporal")
        # The captions have at most 13 tokens; the models were trained with 16 and with their pipeline's
        # default, and longer text would be most of the cost. A system prompt comes before the caption.
        text_tokens = 64 if hasattr(self.pipe, "system_prompt") else 16
        self.sampling = {**demo.default_sampling(self.pipe), "max_sequence_length": text_tokens}
        del self.sampling["num_inference_steps"]
        self.asked = self._asked(path.name, count)
        self.prompts = self.asked.captions(with_motion=not self.still)
        self.shipped = self.pipe.scheduler

    def _asked(self, name: str, count: int) -> Any:
        if self.still:
            return judged_stills("train", count)
        if name != "tiny-wan-start":
            return judged_clips("train", count)
        # That model knows three shapes, six colours, four motions and one form of caption.
        every = [Combination(*c) for c in itertools.product(range(3), range(6), range(4))]
        generator = torch.Generator().manual_seed(0)
        order = [i for _ in range(-(-count // 72)) for i in torch.randperm(72, generator=generator)]
        clips = describe_clips([every[i] for i in order[:count]], generator)
        return replace(clips, template=torch.zeros(count, dtype=torch.long))

    def set_solver(self, name: str) -> None:
        """Use a solver with the shift of the shipped scheduler: "euler", "heun", "dpm++" or "unipc"."""
        from diffusers import (
            DPMSolverMultistepScheduler,
            FlowMatchEulerDiscreteScheduler,
            FlowMatchHeunDiscreteScheduler,
            UniPCMultistepScheduler,
        )

        config = self.shipped.config
        shift = config.get("flow_shift", config.get("shift", 3.0))
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        self.pipe.scheduler = {
            "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=shift),
            "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=shift),
            "dpm++": lambda: DPMSolverMultistepScheduler(**flow),
            "unipc": lambda: UniPCMultistepScheduler(**flow),
        }[name]()

    def latents(
        self,
        rows: range,
        steps: int,
        *,
        sla: Any = None,
        ras: Any = None,
        prepare: Callable[[Any], None] | None = None,
    ) -> tuple[torch.Tensor, control.Summary | None]:
        """Return the latents of these samples, and the summary of an accelerated run.

        Args:
            rows: numbers of the samples; number i has prompt i and seed i.
            steps: number of steps of the solver.
            sla, ras: settings of `dit_accel.enable`. Default: dense.
            prepare: called with the methods that are on, by name, before the run.
        """
        if sla is not None or ras is not None:
            control.enable(self.pipe, sla=sla, ras=ras)
        if prepare is not None:
            installation = installation_of(self.pipe)
            prepare({} if installation is None else installation.methods)
        try:
            out = self.pipe(
                [self.prompts[i] for i in rows],
                generator=[torch.Generator().manual_seed(i) for i in rows],
                num_inference_steps=steps,
                output_type="latent",
                **self.sampling,
            )
            report = control.summary(self.pipe)
        finally:
            control.disable(self.pipe)
        latents = out.images if self.still else out.frames
        return latents.cpu(), report if report.enabled else None

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return frames `[N, 3, T, H, W]` in [-1, 1]."""
        vae = self.pipe.vae
        latents = latents.to(vae.device, vae.dtype)
        if self.still:
            z = latents / vae.config.scaling_factor + vae.config.shift_factor
            return vae.decode(z).sample.clamp(-1, 1).float().cpu()[:, :, None]
        shape = (1, -1, 1, 1, 1)
        mean, std = (
            torch.tensor(vae.config[name]).view(shape).to(latents)
            for name in ("latents_mean", "latents_std")
        )
        return vae.decode(latents * std + mean).sample.clamp(-1, 1).float().cpu()

    def score(
        self, latents: torch.Tensor, reference: torch.Tensor, rows: range
    ) -> list[tuple[float, ...]]:
        """Return `METRICS` of each sample against the reference."""
        return self.compare(self.decoded(latents), self.decoded(reference), rows)

    def decoded(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents and their frames, for `compare`."""
        return latents, torch.cat([self.decode(x) for x in latents.split(8)])

    def compare(
        self,
        made: tuple[torch.Tensor, torch.Tensor],
        reference: tuple[torch.Tensor, torch.Tensor],
        rows: range,
    ) -> list[tuple[float, ...]]:
        """Return `METRICS` of each sample against the reference, both as `decoded` returns them."""
        (latents, video), (true_latents, truth) = made, reference
        right = score_clips(video, self.asked[rows.start : rows.stop], still=self.still)
        scores: list[tuple[float, ...]] = []
        for i in range(len(latents)):
            error = (video[i] - truth[i]).double().square().mean() / 4
            frames = [((x[i].permute(1, 2, 3, 0) + 1) / 2).numpy() for x in (video, truth)]
            latent = (latents[i] - true_latents[i]).norm() / true_latents[i].norm()
            scores.append(
                (
                    float(-10 * error.clamp(min=1e-12).log10()),
                    ssim(*frames),
                    float(latent),
                    float(right[i]["right"]["all"]),
                )
            )
        return scores


def random_router(seed: int) -> Any:
    """Return a router with the signature of `block_scores` that scores blocks at random."""
    generator = torch.Generator().manual_seed(seed)

    def scores(
        q: torch.Tensor, k: torch.Tensor, *, block_q: int, block_k: int, **_: Any
    ) -> torch.Tensor:
        blocks = (-(-q.shape[2] // block_q), -(-k.shape[2] // block_k))
        return torch.rand((*q.shape[:2], *blocks), generator=generator).to(q.device)

    return scores


def mean_interval(values: np.ndarray) -> dict[str, Any]:
    """Return the mean and a 95 % bootstrap interval over samples."""
    interval = bootstrap_interval(values, draws=5000) or [float(values[0])] * 2
    return {"mean": float(values.mean()), "interval_95": interval}
