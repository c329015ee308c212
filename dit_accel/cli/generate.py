"""`dit-accel generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction

from dit_accel.cli.options import AccelerationOptions
from dit_accel.cli.printing import print_json, print_line


@dataclass(kw_only=True)
class Generate(AccelerationOptions):
    """Generate clips or images, accelerated; each gets a sidecar JSON."""

    prompt: Positional[str | None] = None
    """What to show. Leave it out with --prompts-file."""
    prompts_file: Path | None = None
    """.txt with a prompt a line, or .jsonl, .csv, .tsv with prompt and, where wanted, negative_prompt, seed,
    height, width, num_frames."""
    kind: Literal["auto", "mp4", "gif", "png"] = "auto"
    """auto: mp4 for clips, png for images."""
    save_focus: bool = False
    """Also write where the steps on some of the tokens worked: a heat map and their masks. Needs a --ras with a ratio,
    such as partial. Nothing is written for a run of dense steps only."""
    scheduler: str | None = None
    """Scheduler of diffusers by its class name, such as UniPCMultistepScheduler; default: that of the model."""
    lora: Annotated[tuple[str, ...], UseAppendAction] = ()
    """LoRA weights: a .safetensors file, a folder with one, or a hub id, with an optional scale as in
    style.safetensors:0.8; may be given several times."""
    compile: bool = False
    """Compile the repeated blocks of the transformer (torch.compile; Wan)."""

    def run(self) -> None:
        prompts = self._prompts()
        sla, ras = self.sla_config(), self.ras_config()
        if self.save_focus and (ras is None or not ras.has_partial_steps):
            raise ValueError(
                f"save_focus=True: --ras {self.ras} has no steps on some of the tokens; accepted with settings that have "
                "a ratio, such as --ras partial"
            )
        outline, sampling = self.check(prompts)
        from dit_accel.sampling.extras import check_extras, prepare
        from dit_accel.sampling.numbered import generate_numbered

        extras = check_extras(
            outline, scheduler=self.scheduler, loras=self.lora, compile=self.compile
        )
        pipe = self.load(sla, ras)
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
            extras=prepare(pipe, extras),
        )
        if self.format == "json":
            print_json(records)
            return
        for record in records:
            print_line(_line(record))
        print_line(str(pipe.summary()))

    def _prompts(self) -> list[Any]:
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
    """Return one line about a sample: files, what was saved, seconds, prompt."""
    seconds, spared = record["seconds"], record["acceleration"]
    what = [] if spared["density"] is None else [f"density {spared['density']:.2f}"]
    if ras := spared["ras"]:
        what.append(f"cost of {ras['cost']:.1f} of {len(ras['steps'])} steps")
    files = "  ".join(record["files"])
    return f"{files}  {', '.join(what) or 'dense'}  denoise {seconds['denoise']:.1f} s  {record['prompt']}"
