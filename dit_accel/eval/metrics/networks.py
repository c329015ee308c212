"""Other people's networks that metrics need: where they lie, and whether they are what they should be."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Weights for FID, LPIPS and the CLIP score; without them these metrics are left out."""

    inception: Path | None = None
    """FID's Inception weights, a local file."""
    clip: str | None = None
    """A CLIP model: folder or hub id."""
    clip_revision: str | None = None
    """Branch, tag or commit of the CLIP model."""
    lpips: Path | None = None
    """torchvision's weights of LPIPS' backbone, a local file."""
    lpips_net: Literal["alex", "vgg", "squeeze"] = "alex"
    """Which backbone that is."""
    resize: Literal["clean", "tf-legacy", "torch-antialias"] = "clean"
    """How pictures are brought to Inception's size."""
    allow_other_weights: bool = False
    """Take Inception or LPIPS weights whose sha256 is not the known one."""

    def arguments(self) -> dict[str, Any]:
        """As `score` takes them."""
        return asdict(self)

    @property
    def given(self) -> tuple[str, ...]:
        """Those that are there."""
        names = ("inception", "lpips", "clip")
        return tuple(name for name in names if getattr(self, name) is not None)

    def loaded(self, metrics: Sequence[str] = (), device: str = "cpu") -> dict[str, Any]:
        """As `score` takes them, each read once, for several sets; or to know that they can be read before
        hours of sampling.

        Args:
            metrics: what Inception is needed for.

        Raises:
            ValueError: a file or folder that does not hold its network.
            ImportError: a library is missing.
        """
        from dit_accel.eval.metrics.choices import INCEPTION
        from dit_accel.eval.metrics.clip_score import ClipScore
        from dit_accel.eval.metrics.inception import load_inception
        from dit_accel.eval.metrics.pairs import Lpips

        out, other = asdict(self), self.allow_other_weights
        if self.inception is not None:
            kinds = sorted({INCEPTION[x][1] for x in metrics if x in INCEPTION}) or ["2048"]
            out["inception"] = load_inception(
                self.inception,
                kinds=kinds,
                resize=self.resize,
                allow_other_weights=other,
                device=device,
            )
        if self.lpips is not None:
            out["lpips"] = Lpips(
                self.lpips, net=self.lpips_net, allow_other_weights=other, device=device
            )
        if self.clip is not None:
            out["clip"] = ClipScore(self.clip, revision=self.clip_revision, device=device)
        return out
