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
    """Train codebooks for product-quantised keys and values (MILLION) of a model.

    The file is used by the KV cache store "pq":
    enable(model, kv={"store": "pq", "store_options": {"codebooks": "outputs/pq.safetensors"}}).
    """

    bits: Literal[4, 3, 2] = 4
    """Number of bits per stored value."""
    rope: Literal["before", "after"] = "before"
    """Code keys before RoPE, where they do not depend on the position, or after it, as in the paper."""
    scope: Literal["model", "layer", "head"] = "head"
    """Use one set of codebooks for the whole model, for each layer, or for each head."""
    pairing: Literal["neighbours", "planes"] = "planes"
    """Key channels in one sub-vector: neighbours, or the pairs that RoPE rotates (planes)."""
    centred: bool = True
    """Subtract the mean of each head before coding."""
    texts: tuple[str, ...] = ("prose", "code")
    """prose (Python documentation), code (source of the Python library), or UTF-8 text files. Samples are taken from the
    second half of each text, which llm bench does not use."""
    length: int = 2048
    """Number of tokens per sample. With --rope after, use the prompt length of the application."""
    samples: int = 4
    """Number of samples from each text for training the codebooks."""
    checks: int = 1
    """Number of further samples from each text for measuring the errors."""
    sink: int = 64
    """Number of first tokens of each sample to skip, because caches keep these tokens exact."""
    rounds: int = 10
    """Maximum number of k-means rounds."""
    seed: int = 0
    """Random seed of k-means."""
    output: Path = Path("outputs/pq.safetensors")
    """Codebook file (.safetensors)."""
    overwrite: bool = False
    """Replace an existing codebook file."""

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
            f"{self.bits} bits per value, relative error on held-out samples: keys {errors['keys']:.3f}, "
            f"values {errors['values']:.3f}"
        )
        print_line(str(self.output))

    def _check_file(self) -> None:
        """Check that the codebook file can be written.

        Raises:
            ValueError: the path does not end with .safetensors, is a folder, exists, or is another kind of file.
        """
        from dit_accel.llm.kvcache.codebooks import read_codebooks

        place = str(self.output)
        if self.output.suffix != ".safetensors" or self.output.is_dir():
            raise ValueError(f"output={place!r}: must be the name of a .safetensors file")
        if not self.output.exists():
            return
        if not self.overwrite:
            raise ValueError(f"output={place!r}: already exists; pass a new file or --overwrite")
        try:
            read_codebooks(self.output)
        except ValueError:
            raise ValueError(
                f"output={place!r}: is not a codebook file; must be a new file"
            ) from None
