"""`dit-accel llm learn-mask`."""

from dataclasses import dataclass
from pathlib import Path

from dit_accel.cli.llm_options import LanguageModelOptions
from dit_accel.cli.options import check_output
from dit_accel.cli.printing import print_json, print_line


@dataclass(kw_only=True)
class LearnMask(LanguageModelOptions):
    """Learn which key channels a model needs (LeanK), for the KV cache store "channels"."""

    keep: float = 0.5
    """Share of the channels to keep, over all layers and heads."""
    multiple: int | None = None
    """The number of channels kept in a head is a multiple of this. Default: head_dim / 8."""
    steps: int = 100
    """Number of training steps; 0: no training, choose channels by their energy E[q^2] E[k^2]."""
    rate: float = 0.02
    """Largest learning rate."""
    length: int = 2048
    """Number of tokens per sample."""
    follow: int = 128
    """Number of tokens at the end of a sample whose hidden states are compared."""
    texts: tuple[str, ...] = ("prose", "code")
    """prose (Python documentation), code (source of the Python library), or UTF-8 text files. Samples are taken from the
    second half of each text, which the benchmarks do not use."""
    samples: int = 4
    """Number of samples from each text."""
    sink: int = 64
    """Number of first tokens whose keys keep all channels, as in the cache."""
    recent: int = 128
    """Number of last tokens whose keys keep all channels."""
    output: Path = Path("outputs/channel-mask.safetensors")
    """Mask file, for store_options: {mask: ...}."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from tqdm import tqdm

        from dit_accel.llm.control import attention_layers
        from dit_accel.llm.kvcache.cache import model_sizes
        from dit_accel.llm.kvcache.learn_mask import HARD_STEPS, MaskSettings, learn_mask
        from dit_accel.llm.kvcache.model_file import ModelFile, fingerprint_of
        from dit_accel.llm.kvcache.stores.channels import KIND
        from dit_accel.llm.search.samples import make_samples
        from dit_accel.llm.search.settings import SearchSettings

        settings = MaskSettings(
            keep=self.keep,
            multiple=self.multiple,
            steps=self.steps,
            rate=self.rate,
            sink=self.sink,
            recent=self.recent,
        )
        if self.output.suffix != ".safetensors":
            raise ValueError(
                f"output={str(self.output)!r}: must be the name of a .safetensors file"
            )
        if self.output.exists() and not self.overwrite:
            raise ValueError(
                f"output={str(self.output)!r}: already exists; pass a new file or --overwrite"
            )
        place = self.place()
        source = self.source()
        source.check_length("length", self.length)
        windows = SearchSettings(
            length=self.length, texts=self.texts, samples=self.samples, checks=0
        )
        texts = [x.ids for x in make_samples(source.tokenizer, windows)]
        check_output(self.output.parent, "output")
        model = source.load(**place)
        total = self.steps + max(1, round(self.steps * HARD_STEPS))
        bar = tqdm(total=total, desc="steps", disable=not self.steps)

        def show(step: int, loss: float) -> None:
            bar.update()
            bar.set_postfix_str(f"loss {loss:.4f}")

        mask, alpha = learn_mask(model, texts, settings, follow=self.follow, on_step=show)
        bar.close()
        made = ModelFile(
            KIND,
            {"mask": mask, "alpha": alpha},
            model_sizes(model.config),
            fingerprint_of(attention_layers(model)),
            source.name,
            {
                **vars(settings),
                "length": self.length,
                "texts": list(self.texts),
                "follow": self.follow,
            },
        )
        made.save(self.output)
        kept, empty = float(mask.float().mean()), int((~mask.any(-1)).sum())
        if self.format == "json":
            print_json({"output": str(self.output), "kept": kept, "heads_without_keys": empty})
            return
        print_line(
            f"{self.output}: {kept:.1%} of the channels kept, {empty} of {mask.shape[0] * mask.shape[1]} heads keep none"
        )
