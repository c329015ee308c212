"""`save_sla`: write the sparse attention of a pipeline to an SLA checkpoint. Other functions find SLA checkpoints."""

import contextlib
import os
import warnings
from collections.abc import Collection, Iterator
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
    component_files,
    write_checkpoint,
)
from dit_accel.checkpoint.identity import identity_of, is_hub_id, snapshot_of, weights_of
from dit_accel.files import check_writable
from dit_accel.runtime.components import TRANSFORMERS, parts_of
from dit_accel.runtime.install import method_of
from dit_accel.runtime.target import transformer_of


def save_sla(pipe: Any, save_directory: str | os.PathLike) -> Path:
    """Write `sla.safetensors`: settings and weights of the enabled sparse attention.

    For a pipeline with two transformers, the function writes one file per transformer with sparse attention, in the
    subfolders `transformer` and `transformer_2`.

    Args:
        pipe: a pipeline or transformer with sparse attention.
        save_directory: folder to write. It is created if needed, and an existing SLA checkpoint in it is replaced.

    Returns:
        The path of the file, or of the folder for a pipeline with two transformers.

    Raises:
        ValueError: if sparse attention is disabled or not calibrated; if the transformer holds fine-tuned weights
            loaded from an SLA checkpoint, which this file cannot store; or if the folder cannot be written or holds
            an SLA checkpoint that would be loaded in addition.
    """
    parts = parts_of(pipe)
    on = {name: x for name, x in parts.items() if method_of(x, "sla") is not None}
    checkpoints = {name: checkpoint_of(x, pipe) for name, x in (on or parts).items()}
    if any(method_of(x, "sla").swap is not None for x in on.values()):
        raise ValueError(
            f"pipe: its transformer has fine-tuned weights, which {FILE_NAME} does not store; use save_pretrained of a Sparse "
            "pipeline, which writes them too, or copy the folder from which they were loaded"
        )
    folder = Path(save_directory)
    places = part_folders(pipe, folder)
    written = [places[name] / FILE_NAME for name in checkpoints]
    if TRANSFORMERS[1] in parts:
        _check_no_others(folder, written)
    for path, checkpoint in zip(written, checkpoints.values(), strict=True):
        write_checkpoint(check_writable(path.parent, "save_directory") / FILE_NAME, checkpoint)
    return folder if TRANSFORMERS[1] in parts else written[0]


def _check_no_others(folder: Path, written: list[Path]) -> None:
    """Raise ValueError if the folder holds other SLA checkpoints, which would be loaded with the written ones."""
    for path in (folder / FILE_NAME, *component_files(folder).values()):
        if path.exists() and path not in written:
            raise ValueError(
                f"save_directory={str(folder)!r}: holds {path.relative_to(folder)}, which would be loaded in addition to the "
                "saved files; remove it, or use another folder"
            )


def part_folders(pipe: Any, folder: Path) -> dict[str, Path]:
    """Return the folder for the files of each transformer. With a `transformer_2`, each has its own subfolder."""
    parts = parts_of(pipe)
    if TRANSFORMERS[1] not in parts:
        return dict.fromkeys(parts, folder)
    return {name: folder / name for name in parts}


def find_settings(target: Any, dir_or_id: str | os.PathLike, **hub: Any) -> Any:
    """Return the path of an SLA checkpoint, or a dict of paths for a pipeline with two transformers.

    Args:
        target: pipeline or transformer, as in `dit_accel.enable`.
        dir_or_id: a folder that holds the files, or a hub repository.
        **hub: arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        The path of the file. For two transformers: a local folder, or the downloaded files by transformer.

    Raises:
        ValueError: if no file is found.
    """
    parts = parts_of(target)
    if TRANSFORMERS[1] not in parts:
        return find_checkpoint(dir_or_id, **hub)
    if Path(dir_or_id).exists():
        return dir_or_id
    outer = hub.pop("subfolder", None)
    paths = {}
    for name in parts:
        folder = f"{outer}/{name}" if outer else name
        paths[name] = _download(str(dir_or_id), optional=True, subfolder=folder, **hub)
    found = {name: path for name, path in paths.items() if path is not None}
    if not found:
        raise ValueError(
            f"dir_or_id={str(dir_or_id)!r}: no {FILE_NAME} in a subfolder; a pipeline with two transformers needs one in "
            f"{' or '.join(parts)}"
        )
    return found


def find_checkpoint(dir_or_id: str | os.PathLike, **hub: Any) -> Path:
    """Return the path of an SLA checkpoint.

    Args:
        dir_or_id: the file, its folder, or a hub repository. From the hub, the companion of the same commit is
            downloaded too.
        **hub: arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        ValueError: if the file or its companion is not found.
    """
    path = Path(dir_or_id)
    if path.is_dir():
        return path / FILE_NAME
    if path.exists():
        return path
    found = _download(str(dir_or_id), **hub)
    assert found is not None
    return found


def _download(repository: str, *, optional: bool = False, **hub: Any) -> Path | None:
    """Download an SLA checkpoint, and return its path. With `optional`, return None if the repository has none."""
    if not is_hub_id(repository):
        raise ValueError(
            f"dir_or_id={repository!r}: no such file or folder; expected a {FILE_NAME}, its folder, or a hub repository "
            "(owner/name)"
        )
    try:
        path = Path(hf_hub_download(repository, FILE_NAME, **hub))
    except (EntryNotFoundError, OSError, ValueError) as error:
        known = isinstance(error, EntryNotFoundError)
        if optional and known and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ValueError(
            f"dir_or_id={repository!r}: neither a file, a folder, nor a hub repository with a {FILE_NAME} that can be "
            f"reached ({_reason(error)})"
        ) from None
    _download_companion(path, repository, hub)
    return path


def _download_companion(path: Path, repository: str, hub: dict[str, Any]) -> None:
    """Download the companion of an SLA checkpoint, if any, from the same commit."""
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
            f"{repository}: {name}, which belongs to {FILE_NAME}, could not be downloaded ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def own_file(source: str | os.PathLike, file_name: str, argument: str, **hub: Any) -> Path | None:
    """Return the path of a settings file in a diffusers repository, or None if the repository has none.

    From the hub, the companion of an SLA checkpoint is downloaded too. The function warns if the hub cannot be
    reached.

    Args:
        source: folder or hub id.
        file_name: `sla.safetensors` or `ras.json`, or the path of such a file in the repository.
        argument: name of the argument that overrides the file ("sla" or "ras"), for the warning.
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
                f"{source}: the hub cannot be reached to look for {file_name}, so it is ignored. Pass {argument}= to "
                "choose the settings.",
                stacklevel=3,
            )
        return None
    except EntryNotFoundError:
        return None
    folder, _, name = file_name.rpartition("/")
    if name == FILE_NAME:
        _download_companion(path, str(source), hub | ({"subfolder": folder} if folder else {}))
    return path


def own_settings(
    source: str | os.PathLike,
    file_name: str,
    argument: str,
    names: Collection[str],
    read: Any,
    **hub: Any,
) -> Any:
    """Return the settings of a method that are stored in a diffusers repository, or None without settings.

    Args:
        source: folder or hub id.
        file_name: name of the settings file, see `own_file`.
        argument: name of the argument that overrides the file, see `own_file`.
        names: names of the transformers of the repository. With two transformers, each has its file in its subfolder.
        read: function that reads the file.
        **hub: arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        The result of `read`. For two transformers a dict by name, with None for a transformer without a file.
    """
    if TRANSFORMERS[1] not in names:
        path = own_file(source, file_name, argument, **hub)
        return None if path is None else read(path)
    paths = {x: own_file(source, f"{x}/{file_name}", argument, **hub) for x in names}
    if not any(paths.values()):
        return None
    return {name: None if path is None else read(path) for name, path in paths.items()}


def checkpoint_of(target: Any, pipe: Any = None) -> SLACheckpoint:
    """Return the sparse attention of a transformer as an SLA checkpoint with the current weights.

    Args:
        target: a pipeline with one transformer, or a transformer.
        pipe: the pipeline that provides the name of the model. Default: the target.

    Raises:
        ValueError: if sparse attention is disabled, or if a layer with combine="alpha" is not calibrated yet.
    """
    sla = method_of(target, "sla")
    if sla is None:
        raise ValueError("pipe: sparse attention is disabled; call enable(pipe, sla=...) first")
    weights = {}
    for name, layer in sla.layers.items():
        if layer.scheduled and not layer.module.calibrated:
            raise ValueError(
                f"pipe: {name} is not calibrated yet (combine='alpha' measures the share of the exact branch in its first "
                "call); run the pipeline once at a size at which it runs sparse"
            )
        for parameter, x in weights_of(layer.module).items():
            weights[f"{name}.{parameter}"] = x.float()
    base = identity_of(transformer_of(target), target if pipe is None else pipe)
    return SLACheckpoint(config=sla.config_in_use, base=base, weights=weights)


@contextlib.contextmanager
def weights_left_out(pipe: Any) -> Iterator[None]:
    """Context manager in which the state dicts of the transformers do not contain weights of sparse attention."""
    methods = [method_of(part, "sla") for part in parts_of(pipe).values()]
    on = [x for x in methods if x is not None]
    for sla in on:
        sla.detach_weights()
    try:
        yield
    finally:
        for sla in on:
            sla.attach_weights()
