"""Command `dit-accel precompute`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.cli.options import EMBEDDED, Format, check_output
from dit_accel.cli.printing import print_json, print_line
from dit_accel.sampling.settings import Dtype, check_count

MOST_WORKERS = 256


@dataclass(kw_only=True)
class Precompute:
    """Encode a folder of captioned videos or pictures once, for fine-tuning.

    Captions come from metadata.jsonl (or .csv, .tsv) in the folder, or from a .txt file next to each file.
    An interrupted run continues when the command is run again with the same options.
    """

    data_dir: Path
    """Folder of videos or pictures with captions."""
    output_dir: Path
    """Folder for latents and text embeddings: a new or empty folder, or a folder of an earlier run with the same options."""
    model: str = EMBEDDED
    """Model to train later: hub id, folder, or an embedded model."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository. Default: the main branch."""
    caption_column: str = "text"
    """Column of the table that holds captions."""
    video_column: str = "file_name"
    """Column of the table that holds paths of videos or pictures, relative to the folder."""
    height: int | None = None
    """Height of every sample in pixels; requires `width`. Default: the height of each file, rounded down to a size that the
    model supports."""
    width: int | None = None
    """Width of every sample in pixels; requires `height`. Default: as for `height`."""
    num_frames: int | None = None
    """Number of frames of every sample. Default: the largest supported number that each file has."""
    buckets: str | None = None
    """Several sizes, "frames,height,width;frames,height,width", instead of height, width and num_frames. Each file uses
    the nearest bucket."""
    fps: float | None = None
    """Frame rate to which videos are resampled. Default: keep the frames of each file."""
    max_sequence_length: int | None = None
    """Number of text tokens. Default: the default of the pipeline."""
    batch_size: int = 1
    """Number of samples that the model encodes at once."""
    workers: int = field(default_factory=lambda: min(os.cpu_count() or 1, 8))
    """Number of files that are decoded in parallel while the model encodes."""
    shard_samples: int = 64
    """Largest number of samples in a file of the output folder."""
    skip_broken: bool = False
    """Skip files that cannot be used, and list them in the manifest. Default: stop with an error."""
    overwrite: bool = False
    """Replace samples that were made with other options, from other files or with another model."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "auto"
    """Dtype of the text encoders. auto is bf16 on a GPU and fp32 on a CPU."""
    vae_dtype: Dtype = "fp32"
    """Dtype of the VAE. fp32 is the most exact."""
    format: Format = "human"
    """Format of the result on stdout."""

    def run(self) -> None:
        from dit_accel.files import model_source
        from dit_accel.finetune.data.captions import read_captions
        from dit_accel.finetune.data.encode import size_rules
        from dit_accel.finetune.data.precompute import data_settings, precompute, source_record
        from dit_accel.finetune.data.progress import kept_contents
        from dit_accel.finetune.data.sources import find_sources, size_choice
        from dit_accel.finetune.families import family_name, trainable_class
        from dit_accel.sampling.devices import pick_device, pick_dtype
        from dit_accel.sampling.outline import read_outline
        from dit_accel.sampling.settings import Sampling

        self._check()
        device = pick_device(self.device)
        dtypes = {
            "vae": pick_dtype(self.vae_dtype, device),
            "default": pick_dtype(self.dtype, device),
        }
        source = model_source(self.model)
        hub: dict[str, Any] = {} if self.revision is None else {"revision": self.revision}
        outline = read_outline(source, **hub)
        family_name(outline, f"model={self.model!r}")
        if self.max_sequence_length is not None:
            sampling = Sampling(max_sequence_length=self.max_sequence_length)
            outline.check(sampling)
        tokens = self.max_sequence_length
        family = trainable_class(outline.transformer)
        planned = family(outline, max_sequence_length=tokens)
        sizes = size_choice(
            size_rules(planned),
            buckets=self.buckets,
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            fps=self.fps,
        )
        items = read_captions(
            self.data_dir,
            caption_column=self.caption_column,
            video_column=self.video_column,
            argument="data_dir",
        )
        check_output(self.output_dir, "output_dir")
        settings = data_settings(planned, sizes)
        kept_contents(self.output_dir, settings=settings, overwrite=self.overwrite)
        sources, broken = find_sources(
            items, sizes, workers=self.workers, skip_broken=self.skip_broken, progress=True
        )
        kept_contents(
            self.output_dir,
            settings=settings,
            sources={x.item.id: source_record(x) for x in sources},
            overwrite=self.overwrite,
        )
        # Load no transformer: encoding does not need it, and it takes most of the memory.
        pipe = outline.pipeline.from_pretrained(
            source, sla=None, ras=None, dtype=dtypes, transformer=None, **hub
        ).to(device)
        result = precompute(
            family(pipe, transformer=outline.transformer, max_sequence_length=tokens),
            sources,
            sizes,
            self.output_dir,
            batch_size=self.batch_size,
            workers=self.workers,
            skip_broken=self.skip_broken,
            broken=broken,
            overwrite=self.overwrite,
            shard_samples=self.shard_samples,
            progress=True,
        )
        self._print(result)

    def _check(self) -> None:
        check_count("batch_size", self.batch_size)
        check_count("workers", self.workers, largest=MOST_WORKERS)
        check_count("shard_samples", self.shard_samples)

    def _print(self, result: Any) -> None:
        if self.format == "json":
            print_json(
                {
                    "output_dir": str(result.folder),
                    "samples": result.samples,
                    "made": result.made,
                    "buckets": result.buckets,
                    "broken": result.broken,
                }
            )
            return
        print_line(
            f"{result.folder}: {result.samples} samples, {result.made} of them new, {len(result.broken)} files skipped"
        )
        for name, count in sorted(result.buckets.items()):
            print_line(f"  {name}: {count}")
        for reason in result.broken.values():
            print_line(f"  skipped: {reason}")
