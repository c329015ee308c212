"""Memory tiers of stored tokens: device, CPU memory or disk."""

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dit_accel.llm.kvcache.part import Part


@dataclass(frozen=True)
class Tier:
    """Tier of the device memory, and base class of tiers."""

    def place(self, part: Part) -> Part:
        """Move a small or recent part of a store to the tier, and return it."""
        return part

    def place_base(self, part: Part) -> Part:
        """Move the first, large part of a store to the tier, and return it.

        Raises:
            OSError: the tokens cannot be written.
        """
        return self.place(part)


@dataclass(frozen=True)
class CPUTier(Tier):
    """Tier of the CPU memory. Only the tokens that a query reads are copied to the device."""

    def place(self, part: Part) -> Part:
        return replace(part, tensors={k: _on_cpu(x) for k, x in part.tensors.items()})


@dataclass(frozen=True)
class DiskTier(CPUTier):
    """Tier of memory-mapped files. The last tokens, at most a third, stay in CPU memory.

    Each file is unlinked right after it is mapped, so that its disk space is freed when no cache uses it, also after a
    crash. The tokens stay readable if the folder is removed.
    """

    folder: Path
    """Folder of the files."""

    def place_base(self, part: Part) -> Part:
        tensors = {name: self._mapped(x) for name, x in part.tensors.items()}
        return replace(part, tensors=tensors)

    def _mapped(self, x: Tensor) -> Tensor:
        """Return a copy of a tensor in a memory-mapped file."""
        if not x.numel():
            return x.cpu()
        try:
            handle, name = tempfile.mkstemp(prefix="dit-accel-kv-", dir=self.folder)
        except OSError as error:
            raise self._error(x, error) from error
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            flat = torch.from_file(name, shared=True, size=x.numel(), dtype=x.dtype)
        except (OSError, RuntimeError) as error:
            raise self._error(x, error) from error
        finally:
            Path(name).unlink(missing_ok=True)
        return flat.view(x.shape)

    def _error(self, x: Tensor, error: Exception) -> OSError:
        return OSError(
            f"folder={str(self.folder)!r}: {x.nbytes:,} bytes of a KV cache could not be written ({error}); must be a folder "
            "with enough free space. The cache is unchanged"
        )


def tier_of(tier: str, folder: str | None) -> Tier:
    """Return a memory tier.

    Args:
        tier: "device", "cpu" or "disk".
        folder: folder for the files of "disk". Default: the folder for temporary files.

    Raises:
        ValueError: the folder does not exist or is not writable.
    """
    if tier == "device":
        return Tier()
    if tier == "cpu":
        return CPUTier()
    path = Path(folder or tempfile.gettempdir())
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise ValueError(f"folder={str(path)!r}: must be a writable folder")
    return DiskTier(path)


def _on_cpu(x: Tensor) -> Tensor:
    """Return a tensor in CPU memory, pinned if there is a GPU to make copies to it fast."""
    found = x.cpu()
    if torch.cuda.is_available() and not found.is_pinned():
        found = found.pin_memory()
    return found
