"""Tiers: the memory in which stored tokens lie."""

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dit_accel.llm.kvcache.part import Part


@dataclass(frozen=True)
class Tier:
    """Memory of the device."""

    def place(self, part: Part) -> Part:
        """Return tokens of which there are few, or that came last, in their place."""
        return part

    def place_base(self, part: Part) -> Part:
        """Return the tokens that make up most of a store in their place.

        Raises:
            OSError: they cannot be written.
        """
        return self.place(part)


@dataclass(frozen=True)
class CPUTier(Tier):
    """Memory of the CPU, from which only the tokens that a query reads move to the device."""

    def place(self, part: Part) -> Part:
        return replace(part, tensors={k: _on_cpu(x) for k, x in part.tensors.items()})


@dataclass(frozen=True)
class DiskTier(CPUTier):
    """Files that are mapped into memory. The last tokens of a text, at most a third, stay in memory of the CPU.

    A file has no name once it is mapped: its space is free as soon as no cache needs it, also after a crash. What was
    stored stays readable when the folder is removed.
    """

    folder: Path
    """Folder of the files."""

    def place_base(self, part: Part) -> Part:
        tensors = {name: self._mapped(x) for name, x in part.tensors.items()}
        return replace(part, tensors=tensors)

    def _mapped(self, x: Tensor) -> Tensor:
        """Return a tensor with the same values that lies in a file."""
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
            f"folder={str(self.folder)!r}: {x.nbytes:,} bytes of a KV cache could not be written ({error}); accepted is a "
            "folder with room for them. What the cache held before is still there"
        )


def tier_of(tier: str, folder: str | None) -> Tier:
    """Return the memory in which tokens lie.

    Args:
        tier: "device", "cpu" or "disk".
        folder: folder of the files of "disk". Default: that of temporary files.

    Raises:
        ValueError: no such folder.
    """
    if tier == "device":
        return Tier()
    if tier == "cpu":
        return CPUTier()
    path = Path(folder or tempfile.gettempdir())
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise ValueError(f"folder={str(path)!r}: accepted is a folder that can be written to")
    return DiskTier(path)


def _on_cpu(x: Tensor) -> Tensor:
    """Return a tensor in CPU memory, pinned where there is a GPU, so that copies to it are fast."""
    found = x.cpu()
    if torch.cuda.is_available() and not found.is_pinned():
        found = found.pin_memory()
    return found
