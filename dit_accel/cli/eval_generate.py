"""`dit-accel eval generate`."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from dit_accel.cli.options import AccelerationOptions
from dit_accel.cli.printing import print_json, print_line


@dataclass(kw_only=True)
class Generate(AccelerationOptions):
    """Prompts to a sample set; started again after a kill, it goes on. Under torchrun each process makes its
    share: torchrun --nproc-per-node 2 -m dit_accel.cli eval generate ... With --engine ray the workers of Ray do.

    Exit codes: 0 done, 1 failed while running (what is finished stays), 2 bad input, 130 interrupted.
    """

    prompts: str = "smoke"
    """A file (.txt, .jsonl, .csv, .tsv), or a shipped set: smoke, demo, demo-images."""
    limit: int | None = None
    """Only so many prompts."""
    sla: str = "none"
    """Sparse attention: none, auto, quality, balanced, fast, few-step, a YAML file, or a folder with
    sla.safetensors."""
    cache: str = "none"
    """A step cache of diffusers: none, first_block_cache, sea_cache, taylorseer, pab, faster_cache; with a value of its
    setting after a colon. Default of the setting: that of diffusers."""
    batch_size: int = 1
    """Samples a pipeline call."""
    samples_per_prompt: int | None = None
    """Default: 1; for VBench 5."""
    layout: Literal["ids", "vbench"] = "ids"
    """vbench also puts the clips where VBench looks for them."""
    overwrite: bool = False
    """Replace samples that were made with other settings."""
    engine: Literal["local", "ray"] = "local"
    """ray: the samples are made by workers of Ray Data (pip install 'dit-accel[ray]'), on this machine or on a cluster."""
    workers: int | None = None
    """Workers of Ray, each with a GPU or a CPU. Default: the GPUs that Ray has, or 1 without GPUs."""
    ray_address: str | None = None
    """Address of a Ray cluster, such as auto on one of its nodes. The nodes need this package, the model, and the same
    folder at --output-dir. Default: RAY_ADDRESS, else this machine alone."""

    def run(self) -> None:
        from dit_accel.sampling.prompt_sets import load_prompts
        from dit_accel.sampling.settings import check_count

        prompts = load_prompts(self.prompts, self.limit)
        check_count("batch_size", self.batch_size)
        if self.samples_per_prompt is not None:
            check_count("samples_per_prompt", self.samples_per_prompt)
        self._check_engine()
        sla, ras = self.sla_config(), self.ras_config()
        from dit_accel.sampling.plan import VBENCH_SAMPLES

        count = self.samples_per_prompt or (VBENCH_SAMPLES if self.layout == "vbench" else 1)
        outline, sampling = self.check(prompts, samples=len(prompts) * count)
        named = self._cache(outline, sampling)
        if self.layout == "vbench" and not outline.makes_clips:
            raise ValueError("layout='vbench': VBench judges clips, and this model makes images")
        options: dict[str, Any] = {
            "output_dir": self.output_dir,
            "model": self.model,
            "sampling": sampling,
            "revision": self.revision,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "samples_per_prompt": self.samples_per_prompt,
            "fps": self.fps,
            "layout": self.layout,
            "sla": sla,
            "ras": ras,
            "overwrite": self.overwrite,
        }
        steps = outline.steps(sampling)

        make_cache = None if named is None else lambda pipe: named[0].config(pipe, steps, named[1])

        made: Any
        if self.engine == "ray":
            from dit_accel.sampling.ray_engine import generate_on_ray

            made = generate_on_ray(
                lambda device: replace(self, device=device).load_compiled(),
                prompts,
                samples=len(prompts) * count,
                device=self.device,
                workers=self.workers,
                address=self.ray_address,
                make_cache=make_cache,
                **options,
            )
        else:
            from dit_accel.sampling.generate import generate

            pipe = self.load_compiled()
            cache = None if make_cache is None else make_cache(pipe)
            made = generate(pipe, prompts, cache=cache, warm_up=True, **options)
        if self.format == "json":
            done = {} if made is None else {"kind": made.kind, "samples": len(made)}
            print_json({"output_dir": str(self.output_dir), "complete": made is not None, **done})
        elif made is None:
            print_line(f"{self.output_dir}: this process has finished; others have not")
        else:
            print_line(f"{self.output_dir}: {len(made)} {made.kind}")

    def _check_engine(self) -> None:
        """Refuse what the engine does not accept."""
        if self.engine == "ray":
            from dit_accel.sampling.ray_engine import check_ray

            check_ray(self.device, self.workers, self.ray_address)
            return
        for name in ("workers", "ray_address"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}={value!r}: accepted with engine='ray'")

    def _cache(self, outline: Any, sampling: Any) -> Any:
        """Return the step cache that --cache names and the value of its setting; None for none."""
        from dit_accel.eval.runs.caches import read_cache

        if self.cache == "none":
            return None
        cache, value = read_cache(self.cache)
        why = cache.why_not(outline, sampling.guidance_scale)
        if cache.calibrated:
            why = "it needs a calibration, which `eval run` makes"
        if why is not None:
            raise ValueError(f"cache={self.cache!r}: {why}")
        if self.batch_size > 1:
            raise ValueError(
                f"batch_size={self.batch_size}: a step cache decides for all samples of a call at once, so they "
                "would depend on each other; accepted with cache is 1"
            )
        return cache, value
