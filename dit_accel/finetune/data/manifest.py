"""Read and write the manifest of a precomputed folder, and the journal that replaces it while samples are added."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "manifest.partial.jsonl"
"""File that lists the complete shards while samples are added: a header, then one line per shard."""
LOCK = ".lock"
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
Record = dict[str, Any]


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def is_shard(name: str) -> bool:
    """Return True if a file name is the name of a shard."""
    return _SHARD.fullmatch(name) is not None


def shard_number(name: str) -> int:
    """Return the number in the file name of a shard."""
    return int(name.removeprefix("shard-").removesuffix(".safetensors"))


def key_of(tensor: str, sample: str) -> str:
    """Return the key of a tensor of a sample in its shard."""
    return f"{tensor}/{sample}"


@dataclass(frozen=True)
class Contents:
    """Contents of a manifest or journal."""

    header: Record
    """Entries format_version, model, settings and versions."""
    shards: dict[str, Record] = field(default_factory=dict)
    """Size (bytes) and sha256 of each shard, by file name."""
    samples: dict[str, Record] = field(default_factory=dict)
    """Bucket, shard, shapes and source of each sample, by id."""
    broken: dict[str, str] = field(default_factory=dict)
    """Error message for each file that was skipped, by id."""

    @property
    def settings(self) -> Record:
        """Settings with which the samples were made."""
        return self.header["settings"]

    @property
    def model(self) -> Record:
        """Identity of the model that made the samples."""
        return self.header["model"]


def read_manifest(folder: Path) -> Contents | None:
    """Return the contents of manifest.json, or None if there is no manifest.

    Raises:
        ValueError: if the manifest is damaged or of another format version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    header = _checked_header(path, data)
    try:
        contents = Contents(
            header,
            {str(x): dict(y) for x, y in data["shards"].items()},
            {str(x): dict(y) for x, y in data["samples"].items()},
            {str(x): str(y) for x, y in data["broken"].items()},
        )
        _check(contents)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); make the folder again") from None
    return contents


def read_journal(folder: Path) -> Contents | None:
    """Return the contents of the journal, or None if there is no journal.

    An incomplete line at the end, left by a killed process, is ignored.

    Raises:
        ValueError: if the header is damaged or of another format version.
    """
    path = folder / JOURNAL
    if not path.exists():
        return None
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        header = json.loads(lines[0])
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); make the folder again") from None
    contents = Contents(_checked_header(path, header))
    for line in lines[1:]:
        try:
            entry = json.loads(line)
            shards = {str(entry["shard"]): {k: entry[k] for k in ("bytes", "sha256")}}
            samples = {str(x): dict(y) for x, y in entry["samples"].items()}
            _check(Contents(header, shards, samples))
        except (KeyError, TypeError, ValueError, AttributeError):
            break  # damaged by a power failure; the remaining samples are made again
        contents.shards.update(shards)
        contents.samples.update(samples)
    return contents


def journal_line(shard: str, record: Mapping[str, Any], samples: Mapping[str, Record]) -> str:
    """Return the journal line of a complete shard."""
    return json.dumps({"shard": shard, **record, "samples": samples}, ensure_ascii=False) + "\n"


def _checked_header(path: Path, data: Any) -> Record:
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version={version!r}; expected {FORMAT_VERSION}; make the folder again with this version of "
            "dit-accel"
        )
    names = ("format_version", "model", "settings", "versions")
    missing = [x for x in names if x not in data]
    if missing or not isinstance(data["settings"], dict) or not isinstance(data["model"], dict):
        raise ValueError(
            f"{path}: damaged (missing or invalid: {', '.join(missing) or 'settings, model'}); make the folder again"
        )
    return {x: data[x] for x in names}


def _check(contents: Contents) -> None:
    """Raise ValueError, KeyError or TypeError if a record is incomplete."""
    for name, shard in contents.shards.items():
        if not is_shard(name):
            raise ValueError(f"shard {name!r}")
        int(shard["bytes"]), str(shard["sha256"])
    for name, sample in contents.samples.items():
        if sample["shard"] not in contents.shards:
            raise ValueError(f"sample {name!r} in an unknown shard {sample['shard']!r}")
        str(sample["bucket"]), dict(sample["source"])
        if "latents" not in sample["shapes"]:
            raise ValueError(f"sample {name!r} has no latents")
        for shape in sample["shapes"].values():
            list(map(int, shape))
