"""`dit-accel llm verify`."""

import math
from dataclasses import asdict, dataclass

from dit_accel.cli.llm_options import PrefillOptions
from dit_accel.cli.printing import fail_on, print_json, print_line


@dataclass(kw_only=True)
class Verify(PrefillOptions):
    """Compare sparse with dense prefill on a text: perplexity, and next-token distributions at the last 128 positions.

    The exit code is 3 if a bound is exceeded, or if no attention call was sparse.
    """

    text: str = "prose"
    """prose (Python documentation), code (source of the Python library), or a UTF-8 text file."""
    length: int = 4096
    """Number of tokens of the text to use."""
    max_kl: float = 0.015
    """Largest mean KL(dense || sparse) of the last 128 positions, in nats."""
    max_ppl_percent: float = 2.5
    """Largest increase of the perplexity, in percent."""

    def run(self) -> None:
        from dit_accel.llm.bench.texts import read_text
        from dit_accel.llm.quality import compare

        if self.length < 2:
            raise ValueError(f"length={self.length}: must be an int >= 2")
        for name in ("max_kl", "max_ppl_percent"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: must be a number >= 0")
        config = self.prefill_config()
        if config is None:
            raise ValueError("prefill='none': must be sparse settings")
        text = read_text(self.text)[: 40 * self.length]
        place = self.place()
        source = self.source()
        source.check_prefill(config)
        ids = source.tokenizer(text, return_tensors="pt").input_ids[:, : self.length].long()
        if ids.shape[1] < self.length:
            raise ValueError(
                f"length={self.length}: must be in [2, {ids.shape[1]}], because the text {self.text!r} has "
                f"{ids.shape[1]} tokens"
            )
        source.check_length("length", self.length)
        found = compare(source.load(**place), ids, config)
        reasons = []
        if not found.sparse_calls:
            reasons.append(
                f"no attention call was sparse with {self.length} tokens; pass more tokens or --crossover 0"
            )
        if not found.kl <= self.max_kl:
            reasons.append(f"kl={found.kl:.4f} is above max_kl={self.max_kl:g}")
        if not found.perplexity_percent <= self.max_ppl_percent:
            reasons.append(
                f"perplexity {found.perplexity_percent:+.2f} % is above max_ppl_percent={self.max_ppl_percent:g}"
            )
        if self.format == "json":
            print_json({"model": self.model, "text": self.text, **asdict(found), "failed": reasons})
        else:
            print_line(
                f"{self.text}, {found.tokens} tokens, density {found.density:.3f}: perplexity "
                f"{found.perplexity_dense:.3f} -> {found.perplexity:.3f} ({found.perplexity_percent:+.2f} %), "
                f"KL {found.kl:.4f}, top-1 {found.top1:.3f}"
            )
        fail_on(reasons, "verify")
