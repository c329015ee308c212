"""`dit-accel llm calibrate`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_accel.cli.llm_options import LanguageModelOptions
from dit_accel.cli.options import check_output
from dit_accel.cli.printing import print_json, print_line


@dataclass(kw_only=True)
class Calibrate(LanguageModelOptions):
    """Make the codebooks of product-quantised keys and values (MILLION) for a model.

    The file is for the store "pq" of a cache:
    enable(model, kv={"store": "pq", "store_options": {"codebooks": "outputs/pq.safetensors"}}).
    """

    bits: Literal[4, 3, 2] = 4
    """Bits of a stored value."""
    rope: Literal["before", "after"] = "before"
    """Keys that are coded: before RoPE, where they are the same at every position, or after it, as in the paper."""
    scope: Literal["model", "layer", "head"] = "head"
    """Keys or values that share codebooks: those of the whole model, of a layer, or of a head."""
    pairing: Literal["neighbours", "planes"] = "planes"
    """Channels of keys that are coded together: neighbours, or the planes that RoPE rotates."""
    centred: bool = True
    """Subtract the mean of each head first."""
    texts: tuple[str, ...] = ("prose", "code")
    """prose (documentation of this Python), code (modules of its library), or text files in UTF-8. Samples come from the
    second half of each, which llm bench does not read."""
    length: int = 2048
    """Tokens of each sample; with --rope after best the length of use."""
    samples: int = 4
    """Samples of each text that the codebooks are made from."""
    checks: int = 1
    """Further samples of each text, on which errors are measured."""
    sink: int = 64
    """First tokens of each sample that are left out, because caches keep them exactly."""
    rounds: int = 10
    """Rounds of k-means at most."""
    seed: int = 0
    """Seed of k-means."""
    output: Path = Path("outputs/pq.safetensors")
    """Result file."""
    overwrite: bool = False
    """Replace a result file."""

    def run(self) -> None:
        from dit_accel.llm.kvcache.calibrate import Calibration, CalibrationSettings
        from dit_accel.llm.kvcache.codebooks import write_codebooks

        names = (
            "bits", "rope", "scope", "pairing", "centred", "texts", "length", "samples", "checks", "sink", "rounds", "seed",
        )  # fmt: skip
        settings = CalibrationSettings(**{name: getattr(self, name) for name in names})
        self._check_file()
        place = self.place()
        source = self.source()
        calibration = Calibration(source, settings)
        check_output(self.output.parent, "output")
        books = calibration.run(lambda: source.load(**place), show=sys.stderr.isatty())
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_codebooks(self.output, books)
        result: dict[str, Any] = {
            "output": str(self.output),
            "model": books.model,
            "bytes": self.output.stat().st_size,
            **books.notes,
        }
        if self.format == "json":
            print_json(result)
            return
        errors = books.notes["errors"]
        print_line(
            f"{self.bits} bits a value, relative error on held-out samples: keys {errors['keys']:.3f}, "
            f"values {errors['values']:.3f}"
        )
        print_line(str(self.output))

    def _check_file(self) -> None:
        """Check that the result may be written.

        Raises:
            ValueError: it is a folder, another file, or there already.
        """
        from dit_accel.llm.kvcache.codebooks import read_codebooks

        place = str(self.output)
        if self.output.suffix != ".safetensors" or self.output.is_dir():
            raise ValueError(f"output={place!r}: accepted is the name of a .safetensors file")
        if not self.output.exists():
            return
        if not self.overwrite:
            raise ValueError(f"output={place!r}: exists; accepted are a new file or --overwrite")
        try:
            read_codebooks(self.output)
        except ValueError:
            raise ValueError(
                f"output={place!r}: holds something else than codebooks; accepted is a new file"
            ) from None
