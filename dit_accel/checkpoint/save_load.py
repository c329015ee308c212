"""`save_sla`, `load_sla`: sparse attention's settings and weights in a file of their own."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from dit_accel import control
from dit_accel.checkpoint.file import (
    FILE_NAME,
    SLACheckpoint,
    checkpoint_path,
    read_checkpoint,
    write_checkpoint,
)
from dit_accel.checkpoint.identity import identity_of, is_hub_id, weights_of
from dit_accel.config import SLAConfig
from dit_accel.files import check_writable
from dit_accel.runtime.install import transformer_of


def save_sla(pipe: Any, save_directory: str | os.PathLike) -> Path:
    """Write `sla.safetensors`: settings and weights of the sparse attention that is on.

    Args:
        pipe: a pipeline with sparse attention.
        save_directory: created if needed; an adapter in it is replaced.

    Returns:
        The file.

    Raises:
        ValueError: sparse attention is off or not calibrated yet, or the folder cannot be written.
    """
    adapter = checkpoint_of(pipe)
    path = check_writable(save_directory, "save_directory") / FILE_NAME
    write_checkpoint(path, adapter)
    return path


def load_sla(
    pipe: Any, dir_or_id: str | os.PathLike, *, revision: str | None = None, **hub: Any
) -> None:
    """Switch sparse attention on with the settings and weights that `save_sla` wrote.

    Region-adaptive sampling stays on if it is.

    Args:
        pipe: a pipeline with the base model that the adapter was made for, in any dtype.
        dir_or_id: a folder that holds `sla.safetensors`, the file, or a hub repository.
        revision: branch, tag or commit of a hub repository.
        **hub: further arguments of `huggingface_hub.hf_hub_download` (`token`, `cache_dir`, ...).

    Raises:
        ValueError: the file cannot be found or read, was made for another model, or sparse attention is on
            already. The pipeline is then as before.
    """
    path = Path(dir_or_id)
    if path.is_dir():
        path = path / FILE_NAME
    elif not path.exists():
        path = _download(str(dir_or_id), revision=revision, **hub)
    control.enable(pipe, sla=read_checkpoint(path))


def _download(repository: str, **hub: Any) -> Path:
    if not is_hub_id(repository):
        raise ValueError(
            f"dir_or_id={repository!r}: no such file or folder; accepted is a folder with a {FILE_NAME}, that file, "
            "or a hub repository (owner/name)"
        )
    try:
        return Path(hf_hub_download(repository, FILE_NAME, **hub))
    except (EntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"dir_or_id={repository!r}: neither a file, a folder nor a hub repository with a {FILE_NAME} that "
            f"could be reached ({reason})"
        ) from None


def own_checkpoint(source: str | os.PathLike, **hub: Any) -> Path | None:
    """The adapter file that a diffusers repository brings along, a folder or on the hub; None: none.

    Warns where the hub cannot be asked whether there is one.
    """
    if Path(source).exists():
        return checkpoint_path(source)
    try:
        return Path(hf_hub_download(str(source), FILE_NAME, **hub))
    except LocalEntryNotFoundError:
        where = {key: hub[key] for key in ("cache_dir", "revision") if key in hub}
        if try_to_load_from_cache(str(source), FILE_NAME, **where) is not _CACHED_NO_EXIST:
            warnings.warn(
                f"{source}: the hub cannot be asked whether this repository has a {FILE_NAME}; going on as without "
                "one. Pass sla= to choose.",
                stacklevel=3,
            )
        return None
    except EntryNotFoundError:
        return None


def checkpoint_of(pipe: Any) -> SLACheckpoint:
    """What `save_sla` writes.

    Raises:
        ValueError: sparse attention is off, or a layer's share of the exact branch was not measured yet.
    """
    session = control.session_of(pipe)
    if session is None or session.sla is None:
        raise ValueError("pipe: sparse attention is off; accepted after enable(pipe, sla=...)")
    weights = {}
    for name, layer in session.sla.layers.items():
        if layer.scheduled and not layer.module.calibrated:
            raise ValueError(
                f"pipe: {name} has not measured its share of the exact branch (combine='alpha') yet; run the "
                "pipeline once, at a size at which it runs sparse"
            )
        for parameter, x in weights_of(layer.module).items():
            weights[f"{name}.{parameter}"] = x.float()
    base = identity_of(transformer_of(pipe), pipe)
    return SLACheckpoint(config=session.sla.config, base=base, weights=weights)


def runs_with(pipe: Any, settings: SLAConfig | SLACheckpoint | None) -> bool:
    """Whether the sparse attention of a pipeline is just this; None: off."""
    session = control.session_of(pipe)
    sla = None if session is None else session.sla
    if sla is None or settings is None:
        return sla is None and settings is None
    if not isinstance(settings, SLACheckpoint):
        return sla.config == settings
    weights = checkpoint_of(pipe).weights if settings.weights else {}
    return sla.config == settings.config and all(
        torch.equal(x, weights[name]) for name, x in settings.weights.items()
    )


@contextlib.contextmanager
def weights_left_out(pipe: Any) -> Iterator[None]:
    """The transformer's state dict is that of the plain model inside."""
    session = control.session_of(pipe)
    if session is None or session.sla is None:
        yield
        return
    session.sla.detach_weights()
    try:
        yield
    finally:
        session.sla.attach_weights()
