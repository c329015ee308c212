"""Find the samples of earlier runs in a precomputed folder, and check that they match the current run."""

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
"""Descriptions of the source of each sample as plain values, by id."""


def kept_contents(
    folder: Path,
    *,
    settings: Mapping[str, Any],
    sources: Sources | None = None,
    model: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    argument: str = "output_dir",
) -> Contents | None:
    """Return the samples of earlier runs that can be kept, or None if there are none.

    Samples of a shard that is missing or has another size are removed from the result.

    Args:
        folder: a new or empty folder, or a precomputed folder, complete or not.
        settings: settings with which samples are made.
        sources: source of each sample. Default: do not compare.
        model: identity of the model. Default: do not compare.
        overwrite: return None instead of raising an error if the folder holds other samples.
        argument: name of the option for `folder`, for messages.

    Raises:
        ValueError: if the folder holds unrelated files; or, without `overwrite`, if it holds samples of other
            settings, models or sources, or of another format version.
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
            f"{where}: holds other files ({some(others)}); expected a new folder, or a folder of the same command"
        )
    try:
        # The journal includes all entries of the manifest while it exists.
        contents = read_journal(folder) or read_manifest(folder)
    except ValueError as error:
        if overwrite:
            return None
        raise ValueError(f"{error}; use overwrite, or another folder") from None
    if contents is None:
        return None
    different = _differences(contents, settings, sources, model)
    if different and not overwrite:
        raise ValueError(
            f"{where}: holds samples of other {'; '.join(different[:6])}; use overwrite, or another folder"
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
        found.append(f"data: {some(gone)} not among the current samples")
    changed = [
        f"{id_} ({', '.join(differences(record['source'], sources[id_]))})"
        for id_, record in contents.samples.items()
        if id_ in sources and record["source"] != dict(sources[id_])
    ]
    if changed:
        found.append(f"data: changed {some(changed, 3)}")
    return found


def _intact(folder: Path, contents: Contents) -> Contents:
    """Return the contents without the samples of missing or resized shards."""

    shards = {k: x for k, x in contents.shards.items() if shard_problem(folder / k, x) is None}
    samples = {k: x for k, x in contents.samples.items() if x["shard"] in shards}
    return Contents(contents.header, shards, samples, contents.broken)
