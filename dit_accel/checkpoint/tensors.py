"""Read the weights of a model from a file or from a folder with several files."""

import json
from pathlib import Path

from torch import Tensor

from dit_accel.tensor_files import open_safetensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Name of the file that `save_pretrained` of a diffusers model writes if the weights fit into one file."""


def read_weights(path: Path, name: str) -> dict[str, Tensor]:
    """Return a memory-mapped state dict.

    Args:
        path: a safetensors file, or a folder that `save_pretrained` of a model wrote.
        name: name of the folder in messages about its index.

    Raises:
        ValueError: if a file is missing, damaged or not a safetensors file.
    """
    if not path.is_dir():
        return _tensors([path])
    index = path / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return _tensors([path / WEIGHTS])
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: {index.name} is not readable ({error})") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(
                f"{name}: {index.name} names {shard!r}; expected the name of a file in the same folder"
            )

    return _tensors([path / shard for shard in sorted(shards)])


def _tensors(paths: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with open_safetensors(path) as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors
