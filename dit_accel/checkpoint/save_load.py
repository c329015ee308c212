"""`save_sla`: write the sparse attention of a transformer to an SLA checkpoint; find and read one again."""

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
    """Write `sla.safetensors`: settings and weights of the sparse attention that is on.

    Of a pipeline with two transformers, one file for each that has sparse attention, in the sub-folders `transformer`
    and `transformer_2`.

    Args:
        pipe: a pipeline or transformer with sparse attention.
        save_directory: created if needed; an SLA checkpoint in it is replaced.

    Returns:
        The path of the file; of a pipeline with two transformers the folder.

    Raises:
        ValueError: sparse attention is off or not calibrated yet; or the transformer has weights that an SLA
            checkpoint brought, which this file does not hold; or the folder holds a file for another transformer, or
            cannot be written.
    """
    parts = parts_of(pipe)
    on = {name: x for name, x in parts.items() if method_of(x, "sla") is not None}
    checkpoints = {name: checkpoint_of(x, pipe) for name, x in (on or parts).items()}
    if any(method_of(x, "sla").swap is not None for x in on.values()):
        raise ValueError(
            f"pipe: its transformer has fine-tuned weights, which {FILE_NAME} does not hold; accepted are save_pretrained of "
            "a Sparse pipeline, which writes them too, or a copy of the folder that they were loaded from"
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
    """Refuse a folder with SLA checkpoints beside those that are written, which would be loaded with them."""
    for path in (folder / FILE_NAME, *component_files(folder).values()):
        if path.exists() and path not in written:
            raise ValueError(
                f"save_directory={str(folder)!r}: holds {path.relative_to(folder)}, which would be loaded with what is saved "
                "now; accepted is a folder without it"
            )


def part_folders(pipe: Any, folder: Path) -> dict[str, Path]:
    """Return the folder for the files of each transformer: a sub-folder each, if the pipeline has a `transformer_2`."""
    parts = parts_of(pipe)
    if TRANSFORMERS[1] not in parts:
        return dict.fromkeys(parts, folder)
    return {name: folder / name for name in parts}


def find_settings(target: Any, dir_or_id: str | os.PathLike, **hub: Any) -> Any:
    """Return the path of an SLA checkpoint; for a pipeline with two transformers, those of both by name.

    Args:
        target: as in `dit_accel.enable`.
        dir_or_id: a folder that holds the files, or a hub repository.
        **hub: arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        ValueError: no file can be found.
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
            f"dir_or_id={str(dir_or_id)!r}: no {FILE_NAME} in a sub-folder; accepted for a pipeline with two transformers is "
            f"one in {' or '.join(parts)}"
        )
    return found


def find_checkpoint(dir_or_id: str | os.PathLike, **hub: Any) -> Path:
    """Return the path of an SLA checkpoint: a folder that holds one, the file, or a hub repository.

    From a hub repository its companion is downloaded too, from the same commit.

    Raises:
        ValueError: the file or its companion cannot be found.
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
    """Return the path of a downloaded SLA checkpoint; None: the repository has none, if it is `optional`."""
    if not is_hub_id(repository):
        raise ValueError(
            f"dir_or_id={repository!r}: no such file or folder; accepted is a folder with a {FILE_NAME}, that file, "
            "or a hub repository (owner/name)"
        )
    try:
        path = Path(hf_hub_download(repository, FILE_NAME, **hub))
    except (EntryNotFoundError, OSError, ValueError) as error:
        known = isinstance(error, EntryNotFoundError)
        if optional and known and not isinstance(error, LocalEntryNotFoundError):
            return None
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
        file_name: `sla.safetensors` or `ras.json`, or a path in the repository that ends so.
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
    folder, _, name = file_name.rpartition("/")
    if name == FILE_NAME:
        _download_companion(path, str(source), hub | ({"subfolder": folder} if folder else {}))
    return path


def own_checkpoint(source: str | os.PathLike, **hub: Any) -> Path | None:
    """Return the path of the SLA checkpoint in a diffusers repository; None: it has none. See `own_file`."""
    return own_file(source, FILE_NAME, "sla", **hub)


def own_settings(
    source: str | os.PathLike,
    file_name: str,
    argument: str,
    names: Collection[str],
    read: Any,
    **hub: Any,
) -> Any:
    """Return the settings of a method that a diffusers repository holds; None: it holds none.

    Args:
        source, file_name, argument, **hub: as in `own_file`.
        names: transformers of the repository. Of two, each has its file in its sub-folder, and one without a file has
            the method off, where the other has one.
        read: function that reads the file.

    Returns:
        What `read` returns; for two transformers a dict by name, with None where the method is off.
    """
    if TRANSFORMERS[1] not in names:
        path = own_file(source, file_name, argument, **hub)
        return None if path is None else read(path)
    paths = {x: own_file(source, f"{x}/{file_name}", argument, **hub) for x in names}
    if not any(paths.values()):
        return None
    return {name: None if path is None else read(path) for name, path in paths.items()}


def checkpoint_of(target: Any, pipe: Any = None) -> SLACheckpoint:
    """Return the sparse attention of a transformer as an SLA checkpoint of the weights that it has.

    Args:
        target: a pipeline with one transformer, or a transformer.
        pipe: the pipeline, whose name the checkpoint gets. Default: the target.

    Raises:
        ValueError: sparse attention is off, or a layer has not measured its share of the exact branch yet.
    """
    sla = method_of(target, "sla")
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
    base = identity_of(transformer_of(target), target if pipe is None else pipe)
    return SLACheckpoint(config=sla.config_in_use, base=base, weights=weights)


@contextlib.contextmanager
def weights_left_out(pipe: Any) -> Iterator[None]:
    """Context manager in which the state dicts of the transformers are those of the plain models."""
    methods = [method_of(part, "sla") for part in parts_of(pipe).values()]
    on = [x for x in methods if x is not None]
    for sla in on:
        sla.detach_weights()
    try:
        yield
    finally:
        for sla in on:
            sla.attach_weights()
