"""Weights of other people's networks: read without running code, checked by sha256."""

import hashlib
import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 1 << 20


def file_sha256(path: str | os.PathLike, argument: str) -> str:
    """Of a file's bytes.

    Raises:
        ValueError: it cannot be read; the message names `argument`.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise ValueError(
            f"{argument}={str(path)!r}: cannot be read ({error.strerror or error}); accepted is the path "
            "of a local weights file"
        ) from None
    return digest.hexdigest()


def module_sha256(module: nn.Module) -> str:
    """Of a module's class name, tensor names, shapes and values: it tells two networks apart."""
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_known(
    argument: str,
    path: str | os.PathLike,
    sha256: str,
    known: str,
    what: str,
    allow_other_weights: bool,
) -> bool:
    """Whether the hash begins with `known`.

    Raises:
        ValueError: it does not, and others are not allowed.
    """
    if sha256.startswith(known):
        return True
    if not allow_other_weights:
        raise ValueError(
            f"{argument}={str(path)!r}: sha256 {sha256}; accepted are {what} (sha256 {known}), or "
            "allow_other_weights for a file you vouch for"
        )
    return False


def read_weights(path: str | os.PathLike, argument: str) -> dict[str, Tensor]:
    """The tensors of a safetensors or a torch file; a torch file may hold nothing else.

    Raises:
        ValueError: it is neither.
    """
    from safetensors.torch import load_file

    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # What torch's reader raises depends on where a damaged file breaks off.
    except Exception as error:
        # torch's own message advises to run code that is in the file.
        raise ValueError(
            f"{argument}={str(path)!r}: not a weights file ({type(error).__name__}); accepted are a .safetensors file or "
            "a .pth of tensors by name"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(
            f"{argument}={str(path)!r}: holds no tensors by name; accepted is a state dict"
        )
    return dict(state)


def import_library(module: str, package: str) -> Any:
    """An optional library.

    Raises:
        ImportError: it is missing or broken; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    # A torchvision built for another torch fails with RuntimeError.
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(
            f"{package} cannot be imported ({error}); install it with `pip install 'dit-accel[eval]'`, and "
            "torchvision in the build that belongs to your torch (https://pytorch.org/get-started)"
        ) from error
