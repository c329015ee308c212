"""`ras.json`: write and read the settings of region-adaptive sampling in a diffusers repository."""

import json
import os
from pathlib import Path

from dit_accel.config import RASConfig
from dit_accel.files import write_json

RAS_FILE_NAME = "ras.json"
FORMAT, FORMAT_VERSION = "dit_accel.ras", 1
_KEYS = ("format", "format_version", "config")


def write_ras(path: str | os.PathLike, config: RASConfig) -> None:
    """Write settings of region-adaptive sampling to a file atomically."""
    write_json(
        path, {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config.to_dict()}
    )


def read_ras(path: str | os.PathLike) -> RASConfig:
    """Read settings of region-adaptive sampling from a file.

    Raises:
        ValueError: if the file is missing, is not JSON, has another format or version, has unknown or missing entries,
            or holds settings that are invalid for `RASConfig`.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a {RAS_FILE_NAME}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds {data!r:.40}; expected a mapping of {', '.join(_KEYS)}")
    for key, accepted in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if data.get(key) != accepted or type(data[key]) is not type(accepted):
            raise ValueError(f"{path}: {key}={data.get(key)!r}; expected {accepted!r}")
    if unknown := sorted(data.keys() - set(_KEYS)):
        raise ValueError(f"{path}: unknown entry {unknown[0]!r}; expected {', '.join(_KEYS)}")
    config = data.get("config")
    if not isinstance(config, dict):
        raise ValueError(
            f"{path}: config={config!r:.40}; expected a mapping of fields of RASConfig"
        )
    try:
        return RASConfig.from_dict(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
