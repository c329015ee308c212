"""`ModelSource`: config and tokenizer of a language model, used to check arguments before the weights are loaded."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel.config import PrefillConfig
from dit_accel.llm.embedded import NAME, converted, weights_file
from dit_accel.llm.head_counts import head_counts
from dit_accel.llm.policy import Policy
from dit_accel.quiet import quiet


@dataclass(frozen=True)
class ModelSource:
    """Config and tokenizer of a language model, and a method that loads its weights."""

    name: str
    """Name, folder or hub id that the user passed."""
    path: str | os.PathLike
    """Folder or hub id from which the files are loaded."""
    revision: str | None
    config: Any
    """Config of transformers."""
    tokenizer: Any

    @property
    def num_layers(self) -> int:
        return int(self.config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def max_length(self) -> int | None:
        """Maximum number of positions in the config; None if the config does not contain it."""
        length = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None

    def check_length(self, argument: str, tokens: int, new_tokens: int = 0) -> None:
        """Check that a prompt plus the generated tokens fit into the positions of the model.

        Args:
            argument: argument that the error names.
            tokens: number of tokens in the prompt.
            new_tokens: number of tokens to generate.

        Raises:
            ValueError: the prompt is empty, or prompt and new tokens are too long.
        """
        if tokens < 1:
            raise ValueError(f"{argument}: no tokens; must be a text of at least one token")
        if self.max_length is not None and tokens + new_tokens > self.max_length:
            more = f" + {new_tokens} new tokens" if new_tokens else ""
            raise ValueError(
                f"{argument}: {tokens} tokens{more}; must be at most {self.max_length} for {self.name}"
            )

    def check_prefill(self, prefill: PrefillConfig | None) -> None:
        """Check that the model has all layers and heads that the prefill settings name.

        Raises:
            ValueError: a layer does not exist, or the number of heads differs.
        """
        if prefill is not None:
            Policy(prefill, self.num_layers, head_counts(self.config))

    def load(self, *, dtype: torch.dtype, device: torch.device | str) -> Any:
        """Load the model in evaluation mode. Only safetensors files are read."""
        kind = _auto_class(self.config, self.name)
        with quiet():
            model = kind.from_pretrained(
                self.path,
                revision=self.revision,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
            )
        return model.to(device).eval()


def read_source(model: str, revision: str | None = None) -> ModelSource:
    """Read the config and the tokenizer of a model.

    Args:
        model: "smollm2-135m" (the embedded model), or the folder or hub id of a language model of transformers.
        revision: branch, tag or commit of a hub repository.

    Raises:
        ValueError: the model cannot be read, or is not a language model of transformers.
    """
    from transformers import AutoConfig, AutoTokenizer

    path: str | os.PathLike = model
    if model == NAME and not (Path(model) / "config.json").is_file():
        path = converted()
    elif Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"model={model!r}: the folder has no config.json; must be a folder written by save_pretrained, "
            f"a hub id, or {NAME}"
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
            _auto_class(config, model)
            tokenizer = AutoTokenizer.from_pretrained(
                path, revision=revision, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        if str(error).startswith("model="):
            raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"model={model!r}: cannot be read ({first}); must be {NAME}, a folder written by save_pretrained, "
            "or a hub id"
        ) from None
    return ModelSource(model, path, revision, config, tokenizer)


def check_model(model: str) -> None:
    """Check that the packages of the embedded model are installed, if `model` names it.

    Raises:
        ValueError: a package is missing.
    """
    if model == NAME and not (Path(model) / "config.json").is_file():
        weights_file()


def _auto_class(config: Any, name: str) -> Any:
    """Return the Auto class of transformers that loads a config."""
    import transformers

    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            return kind
    raise ValueError(
        f"model={name!r}: has type {config.model_type}; must be a causal language model of transformers"
    )
