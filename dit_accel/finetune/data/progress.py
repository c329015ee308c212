"""What earlier runs left in a precomputed folder: what of it is kept, and what it contradicts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.finetune.data.captions import some
from dit_accel.finetune.data.manifest import (
    JOURNAL,
    LOCK,
    MANIFEST,
    Contents,
    is_shard,
    read_journal,
    read_manifest,
)
from dit_accel.finetune.data.model_identity import model_differences, model_label
from dit_accel.finetune.data.store import shard_problem
from dit_accel.sampling.manifest import differences

Sources = Mapping[str, Mapping[str, Any]]
"""What each sample is made from, by id; plain values."""


def kept_contents(
    folder: Path,
    *,
    settings: Mapping[str, Any],
    sources: Sources | None = None,
    model: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    argument: str = "output_dir",
) -> Contents | None:
    """Return the samples of earlier runs that are kept; None: there are none.

    Samples of a shard that is missing or has another size are left out.

    Args:
        folder: new, empty, or a precomputed folder, finished or not.
        settings: what decides how samples are made.
        sources: what each sample is made from. Default: not compared.
        model: identity of the model. Default: not compared.
        overwrite: return None where the folder holds samples of something else.
        argument: name of the option that gave `folder`, for messages.

    Raises:
        ValueError: the folder holds other files; or, without `overwrite`, samples of other settings, models or
            sources, or files of another format version.
    """
    where = f"{argument}={str(folder)!r}"
    found = sorted(x.name for x in folder.iterdir()) if folder.is_dir() else []
    others = [
        x
        for x in found
        if not (x in (MANIFEST, JOURNAL, LOCK) or x.startswith(".tmp-") or is_shard(x))
    ]
    if others:
        raise ValueError(
            f"{where}: holds other files ({some(others)}); accepted is a new folder or one of the same command"
        )
    try:
        # While it is there, the journal has all that the manifest has.
        contents = read_journal(folder) or read_manifest(folder)
    except ValueError as error:
        if overwrite:
            return None
        raise ValueError(f"{error}; overwrite, or choose another folder") from None
    if contents is None:
        return None
    different = _differences(contents, settings, sources, model)
    if different and not overwrite:
        raise ValueError(
            f"{where}: holds samples of other {'; '.join(different[:6])}; overwrite, or choose another folder"
        )
    return None if different else _intact(folder, contents)


def _differences(
    contents: Contents,
    settings: Mapping[str, Any],
    sources: Sources | None,
    model: Mapping[str, Any] | None,
) -> list[str]:
    found = []
    if different := differences(contents.settings, settings):
        found.append(f"settings: {', '.join(different)}")
    if model is not None and (different := model_differences(contents.model, model)):
        found.append(f"models ({model_label(contents.model)}): {', '.join(different)}")
    if sources is None:
        return found
    if gone := [x for x in contents.samples if x not in sources]:
        found.append(f"data: {some(gone)} not among the samples now")
    changed = [
        f"{id_} ({', '.join(differences(record['source'], sources[id_]))})"
        for id_, record in contents.samples.items()
        if id_ in sources and record["source"] != dict(sources[id_])
    ]
    if changed:
        found.append(f"data: changed is {some(changed, 3)}")
    return found


def _intact(folder: Path, contents: Contents) -> Contents:
    """Return the contents without shards that are missing or have another size."""
    shards = {k: x for k, x in contents.shards.items() if shard_problem(folder / k, x) is None}
    samples = {k: x for k, x in contents.samples.items() if x["shard"] in shards}
    return Contents(contents.header, shards, samples, contents.broken)
