"""Command `dit-accel generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction

from dit_accel.cli.options import AccelerationOptions
from dit_accel.cli.printing import print_json, print_line


@dataclass(kw_only=True)
class Generate(AccelerationOptions):
    """Generate clips or images with acceleration, each with a sidecar JSON file."""

    prompt: Positional[str | None] = None
    """Text prompt. Omit it with --prompts-file."""
    prompts_file: Path | None = None
    """Text file with one prompt per line, or a .jsonl, .csv or .tsv file with the field prompt and optional fields
    negative_prompt, seed, height, width, num_frames."""
    kind: Literal["auto", "mp4", "gif", "png"] = "auto"
    """File format. auto is mp4 for clips and png for images."""
    save_focus: bool = False
    """Also write images that show which tokens ran in the partial steps. Needs --ras settings with a ratio, such as
    partial. Writes nothing if all steps were dense."""
    scheduler: str | None = None
    """Class name of a diffusers scheduler, such as UniPCMultistepScheduler. Default: scheduler of the model."""
    lora: Annotated[tuple[str, ...], UseAppendAction] = ()
    """LoRA weights: a .safetensors file, a folder with one, or a hub id, with an optional scale such as
    style.safetensors:0.8. Can be given several times."""
    parallel: str = "none"
    """Number of processes that compute each sample together: ulysses:2 with torchrun --nproc-per-node 2 -m dit_accel.cli
    generate, or ulysses_anything:2 for an odd number of heads. The first process writes the files."""

    def run(self) -> None:
        prompts = self._prompts()
        sla, ras = self.sla_config(), self.ras_config()
        if self.save_focus and (ras is None or not ras.has_partial_steps):
            raise ValueError(
                f"save_focus=True: ras={self.ras!r} has no partial steps; needs settings with a ratio, such as --ras partial"
            )
        from dit_accel.sampling.parallel import processes, read_parallel

        parallel = read_parallel(self.parallel)
        outline, sampling = self.check(prompts)
        if parallel is not None:
            parallel.check(outline)
        from dit_accel.sampling.extras import check_extras, prepare
        from dit_accel.sampling.numbered import generate_numbered

        extras = check_extras(
            outline,
            scheduler=self.scheduler,
            loras=self.lora,
            compile=self.compile,
            device=self.device,
        )
        with processes(parallel, self.device):
            pipe = self.load(sla, ras)
            if parallel is not None:
                parallel.enable(pipe)
            records = generate_numbered(
                pipe,
                prompts,
                output_dir=self.output_dir,
                model=self.model,
                sampling=sampling,
                seed=self.seed,
                kind=self.kind,
                fps=self.fps,
                save_focus=self.save_focus,
                extras=prepare(pipe, extras) | ({} if parallel is None else parallel.record),
                writes=parallel is None or parallel.writes,
            )
        if parallel is not None and not parallel.writes:
            return
        if self.format == "json":
            print_json(records)
            return
        for record in records:
            print_line(_line(record))
        print_line(str(pipe.summary()))

    def _prompts(self) -> list[Any]:
        """Return the records of the prompt or of the prompts file."""
        from dit_accel.sampling.prompts import number_prompts, read_prompts

        if self.prompt is not None and self.prompts_file is None:
            return number_prompts([self.prompt])
        if self.prompts_file is not None and self.prompt is None:
            return read_prompts(self.prompts_file)
        raise ValueError(
            f"prompt={self.prompt!r}, prompts_file={None if self.prompts_file is None else str(self.prompts_file)!r}: "
            "pass either a prompt or --prompts-file"
        )


def _line(record: dict[str, Any]) -> str:
    """Return one line about a sample: its files, density, cost, seconds and prompt."""
    seconds, spared = record["seconds"], record["acceleration"]
    what = [] if spared["density"] is None else [f"density {spared['density']:.2f}"]
    if ras := spared["ras"]:
        what.append(f"cost of {ras['cost']:.1f} of {len(ras['steps'])} steps")
    files = "  ".join(record["files"])
    return f"{files}  {', '.join(what) or 'dense'}  denoise {seconds['denoise']:.1f} s  {record['prompt']}"
