"""`save_sla`: write the sparse attention of a transformer to an SLA checkpoint; find and read one again."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import (
    _CACHED_NO_EXIST,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from dit_accel.checkpoint.file import (
    FILE_NAME,
    SLACheckpoint,
    companion_name,
    write_checkpoint,
)
from dit_accel.checkpoint.identity import identity_of, is_hub_id, snapshot_of, weights_of
from dit_accel.files import check_writable
from dit_accel.runtime.install import method_of, transformer_of


def save_sla(pipe: Any, save_directory: str | os.PathLike) -> Path:
    """Write `sla.safetensors`: settings and weights of the sparse attention that is on.

    Args:
        pipe: a pipeline or transformer with sparse attention.
        save_directory: created if needed; an SLA checkpoint in it is replaced.

    Returns:
        The path of the file.

    Raises:
        ValueError: sparse attention is off or not calibrated yet; or the transformer has weights that an SLA
            checkpoint brought, which this file does not hold; or the folder cannot be written.
    """
    checkpoint = checkpoint_of(pipe)
    if method_of(pipe, "sla").swap is not None:
        raise ValueError(
            f"pipe: its transformer has fine-tuned weights, which {FILE_NAME} does not hold; accepted are save_pretrained of "
            "a Sparse pipeline, which writes them too, or a copy of the folder that they were loaded from"
        )
    path = check_writable(save_directory, "save_directory") / FILE_NAME
    write_checkpoint(path, checkpoint)
    return path


def find_checkpoint(dir_or_id: str | os.PathLike, **hub: Any) -> Path:
    """Return the path of an SLA checkpoint: a folder that holds one, the file, or a hub repository.

    From a hub repository its companion is downloaded too, from the same commit.

    Raises:
        ValueError: the file or its companion cannot be found.
    """
    path = Path(dir_or_id)
    if path.is_dir():
        return path / FILE_NAME
    return path if path.exists() else _download(str(dir_or_id), **hub)


def _download(repository: str, **hub: Any) -> Path:
    if not is_hub_id(repository):
        raise ValueError(
            f"dir_or_id={repository!r}: no such file or folder; accepted is a folder with a {FILE_NAME}, that file, "
            "or a hub repository (owner/name)"
        )
    try:
        path = Path(hf_hub_download(repository, FILE_NAME, **hub))
    except (EntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"dir_or_id={repository!r}: neither a file, a folder nor a hub repository with a {FILE_NAME} that "
            f"could be reached ({_reason(error)})"
        ) from None
    _download_companion(path, repository, hub)
    return path


def _download_companion(path: Path, repository: str, hub: dict[str, Any]) -> None:
    """Download the companion of an SLA checkpoint, if it has one, from the commit that the checkpoint is of."""
    name = companion_name(path)
    if name is None:
        return
    hub = hub.copy()
    if commit := snapshot_of(path):
        hub["revision"] = commit
    if folder := hub.pop("subfolder", None):
        name = f"{folder}/{name}"
    try:
        snapshot_download(repository, allow_patterns=[name, f"{name}/*"], **hub)
    except (EntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"{repository}: {name}, which belongs to its {FILE_NAME}, could not be downloaded ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def own_file(source: str | os.PathLike, file_name: str, argument: str, **hub: Any) -> Path | None:
    """Return the path of a settings file in a diffusers repository; None: it has none.

    From the hub, the companion of an SLA checkpoint comes with it. Warns if the hub cannot be asked.

    Args:
        source: folder, or hub id.
        file_name: `sla.safetensors` or `ras.json`.
        argument: the argument that chooses the settings instead of the file ("sla" or "ras").
        **hub: arguments of `huggingface_hub.hf_hub_download`.
    """
    if Path(source).exists():
        path = Path(source) / file_name
        return path if path.is_file() else None
    try:
        path = Path(hf_hub_download(str(source), file_name, **hub))
    except LocalEntryNotFoundError:
        where = {key: hub[key] for key in ("cache_dir", "revision") if key in hub}
        if try_to_load_from_cache(str(source), file_name, **where) is not _CACHED_NO_EXIST:
            warnings.warn(
                f"{source}: the hub cannot be asked whether this repository has a {file_name}; loading without one. "
                f"Pass {argument}= to choose the settings.",
                stacklevel=3,
            )
        return None
    except EntryNotFoundError:
        return None
    if file_name == FILE_NAME:
        _download_companion(path, str(source), hub)
    return path


def own_checkpoint(source: str | os.PathLike, **hub: Any) -> Path | None:
    """Return the path of the SLA checkpoint in a diffusers repository; None: it has none. See `own_file`."""
    return own_file(source, FILE_NAME, "sla", **hub)


def checkpoint_of(pipe: Any) -> SLACheckpoint:
    """Return the sparse attention of a pipeline as an SLA checkpoint of the weights that its transformer has.

    Raises:
        ValueError: sparse attention is off, or a layer has not measured its share of the exact branch yet.
    """
    sla = method_of(pipe, "sla")
    if sla is None:
        raise ValueError("pipe: sparse attention is off; accepted after enable(pipe, sla=...)")
    weights = {}
    for name, layer in sla.layers.items():
        if layer.scheduled and not layer.module.calibrated:
            raise ValueError(
                f"pipe: {name} has not measured its share of the exact branch (combine='alpha') yet; run the "
                "pipeline once, at a size at which it runs sparse"
            )
        for parameter, x in weights_of(layer.module).items():
            weights[f"{name}.{parameter}"] = x.float()
    base = identity_of(transformer_of(pipe), pipe)
    return SLACheckpoint(config=sla.config_in_use, base=base, weights=weights)


@contextlib.contextmanager
def weights_left_out(pipe: Any) -> Iterator[None]:
    """Context manager in which the transformer's state dict is that of the plain model."""
    sla = method_of(pipe, "sla")
    if sla is None:
        yield
        return
    sla.detach_weights()
    try:
        yield
    finally:
        sla.attach_weights()
