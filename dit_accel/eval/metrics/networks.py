"""Networks of other projects: where their weights are, and how weights are checked and read."""

import hashlib
import importlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

NAMES = ("inception", "lpips", "clip")


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Weights for FID, LPIPS and the CLIP score; without them these metrics are left out."""

    inception: Path | None = None
    """Inception weights of FID, a local file."""
    clip: str | None = None
    """CLIP model: a folder or hub id."""
    clip_revision: str | None = None
    """Branch, tag or commit of the CLIP model."""
    lpips: Path | None = None
    """torchvision's weights of the LPIPS backbone, a local file."""
    lpips_net: Literal["alex", "vgg", "squeeze"] = "alex"
    """Backbone of LPIPS."""
    resize: Literal["clean", "tf-legacy", "torch-antialias"] = "clean"
    """Way to resize pictures for Inception."""
    allow_other_weights: bool = False
    """Take Inception or LPIPS weights whose sha256 is not the known one."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `score`."""
        return asdict(self)

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the networks that have weights."""
        return tuple(x for x in NAMES if getattr(self, x) is not None)


def file_sha256(path: str | os.PathLike, argument: str) -> str:
    """Return the sha256 of a file; the message of a ValueError names `argument`."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(
            f"{argument}={str(path)!r}: cannot be read ({error.strerror or error}): must be a local file"
        ) from None


def module_sha256(module: Any) -> str:
    """Return a hash of a module's class name and of its tensors' names, shapes and values."""
    import torch

    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(
    argument: str, path: str | os.PathLike, known: str = "", what: str = "", allow: bool = False
) -> tuple[dict[str, Any], str, list[str]]:
    """Read the tensors of a safetensors or torch file without running code in it.

    Args:
        argument, what: names of the argument and of the published file, for messages.
        known: start of the published file's sha256. Default: every file is accepted.
        allow: accept other files too.

    Returns:
        The tensors by name, the file's sha256, and the flags of values that rest on it.
    """
    import torch
    from safetensors.torch import load_file

    sha256 = file_sha256(path, argument)
    named = f"{argument}={str(path)!r}"
    other = not sha256.startswith(known)
    if other and not allow:
        raise ValueError(
            f"{named}: sha256 {sha256}: must be {what} (sha256 {known}), or other weights that you trust, with "
            "allow_other_weights"
        )
    safe = Path(path).suffix == ".safetensors"
    try:
        state = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
    # The type of torch's error depends on where a damaged file breaks off, and its message recommends to
    # load the file with weights_only=False, which would run code in it.
    except Exception as error:
        raise ValueError(
            f"{named}: not a weights file ({type(error).__name__}): must be a .safetensors file or a .pth of "
            "tensors by name"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(f"{named}: holds no tensors by name: must be a state dict")
    return dict(state), sha256, ["other-weights"] if other else []


def import_library(module: str, package: str) -> Any:
    """Import a module of an optional library, or raise ImportError with how to install it."""
    try:
        return importlib.import_module(module)
    # A torchvision built for another torch fails with RuntimeError.
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(
            f"{package} cannot be imported ({error}); install it with `pip install 'dit-accel[eval]'`, and "
            "torchvision in the build for your torch (https://pytorch.org/get-started)"
        ) from error
