"""`dit-accel eval score`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes, Positional

from dit_accel.cli.options import FailIf, Format, check_output
from dit_accel.cli.printing import fail_on, print_json, print_line
from dit_accel.eval.metrics.networks import Networks


@dataclass(kw_only=True)
class Score:
    """Metrics of a folder of images or clips, with intervals, counts and the networks behind them.

    Exit codes: 0 done, 1 failed while running, 2 bad input or a --fail-if that cannot be decided, 3 a
    --fail-if condition holds, 130 interrupted.
    """

    images: Positional[Path | None] = None
    """A sample set, or any folder of pictures; clips are folders of frames. Not with --parts."""
    reference: Path | None = None
    """What it is compared with: a folder, or a measurement that --save wrote."""
    metrics: tuple[str, ...] = ()
    """Such as psnr ssim fid clip_score; default: all that the other options allow."""
    prompts: str | None = None
    """A prompts file or shipped set whose ids are the samples'; default: what the set says."""
    networks: OmitArgPrefixes[Networks] = field(default_factory=Networks)
    allow_partial: bool = False
    """Compare the ids that both sets have."""
    batch_size: int = 32
    """Pictures a network sees at once."""
    workers: int = 2
    """Threads that read pictures."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    shard: str = "0/1"
    """i/n: measure every n-th sample from the i-th on, for --save; --parts puts the n together."""
    save: Path | None = None
    """Keep the measurement as .safetensors: a reference for later, or a part."""
    parts: tuple[Path, ...] = ()
    """Measurements of all shards, instead of images."""
    output: Path | None = None
    """JSON file for the metrics."""
    fail_if: FailIf = ()
    """Exit with 3 if this condition holds, as in "fid>30". Can be repeated."""
    format: Format = "human"
    """How the result is printed on stdout."""

    def run(self) -> None:
        from dit_accel.environment import machine, versions
        from dit_accel.eval.metrics.measurement import Measurement
        from dit_accel.eval.metrics.values import PARTS
        from dit_accel.eval.view.conditions import check_early, check_metrics
        from dit_accel.files import write_json
        from dit_accel.sampling.devices import pick_device
        from dit_accel.sampling.settings import check_count

        check_count("batch_size", self.batch_size)
        check_count("workers", self.workers)
        if (self.images is None) == (not self.parts):
            raise ValueError("images, parts: pass either a set or --parts")
        if self.parts:
            usual = Networks().arguments()
            chosen = {k: x for k, x in self.networks.arguments().items() if x != usual[k]}
            chosen |= {
                "reference": self.reference,
                "metrics": self.metrics,
                "prompts": self.prompts,
            }
            for name, value in chosen.items():
                if value:
                    raise ValueError(
                        f"{name}={str(value)!r}: must be given when the parts are measured, not with parts"
                    )
        shard = self._shard()
        if shard[1] > 1 and (self.save is None or self.fail_if or self.output is not None):
            raise ValueError(
                f"shard={self.shard!r}: a part has no metrics; pass save, not output or fail_if"
            )
        if self.save is not None and self.save.suffix != ".safetensors":
            raise ValueError(f"save={str(self.save)!r}: must be a .safetensors file")
        pick_device(self.device)
        judged = [f"judge_{x}" for x in PARTS[1:]] if "judge" in self.metrics else []
        check_early(self.fail_if, metrics=[*self.metrics, *judged] if self.metrics else None)
        for name, path in (("save", self.save), ("output", self.output)):
            if path is not None:
                check_output(path.parent, name)
        if self.parts:
            measurement, *others = [Measurement.load(x) for x in self.parts]
            for part in others:
                measurement.merge(part)
        else:
            measurement = self._measure(shard)
        if self.save is not None:
            self.save.parent.mkdir(parents=True, exist_ok=True)
            measurement.save(self.save)
        if shard[1] > 1:
            print_line(str(self.save))
            return
        if measurement.comparisons and "reference" not in measurement.features:
            if self.save is None or self.fail_if or self.output is not None:
                names = ", ".join(measurement.comparisons)
                raise ValueError(f"reference: none, so {names} have no value; pass save alone")
            print_line(str(self.save))
            return
        metrics = measurement.metric_values()
        record = {"format_version": 2, "versions": versions(), "machine": machine()}
        record |= {"images": str(self.images), "reference": str(self.reference), "metrics": metrics}
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.output, record)
        if self.format == "json":
            print_json(record)
        else:
            from dit_accel.eval.view.table import metrics_lines

            print_line("\n".join(metrics_lines(metrics)))
        fail_on(check_metrics(metrics, self.fail_if))

    def _shard(self) -> tuple[int, int]:
        index, _, count = self.shard.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(f"shard={self.shard!r}: must be i/n with 0 <= i < n")
        return int(index), int(count)

    def _measure(self, shard: tuple[int, int]) -> Any:
        from dit_accel.eval.metrics.score import measure

        assert self.images is not None
        return measure(
            self.images,
            reference=self.reference,
            prompts=self.prompts,
            metrics=self.metrics or None,
            allow_partial=self.allow_partial,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            shard=shard,
            need_reference=self.save is None,
            **self.networks.arguments(),
        )
