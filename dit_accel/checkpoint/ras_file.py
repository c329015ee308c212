"""`ras.json`: the settings of region-adaptive sampling in a diffusers repository."""

import json
import os
from pathlib import Path

from dit_accel.config import RASConfig
from dit_accel.files import write_json

RAS_FILE_NAME = "ras.json"
FORMAT, FORMAT_VERSION = "dit_accel.ras", 1
_KEYS = ("format", "format_version", "config")


def write_ras(path: str | os.PathLike, config: RASConfig) -> None:
    """Write the file atomically."""
    write_json(
        path, {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config.to_dict()}
    )


def read_ras(path: str | os.PathLike) -> RASConfig:
    """Read the file.

    Raises:
        ValueError: the file is missing, not JSON, has another format or version, an unknown or a missing entry,
            or settings that `RASConfig` does not accept.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; accepted is a {RAS_FILE_NAME}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds {data!r:.40}; accepted is a mapping of {', '.join(_KEYS)}")
    for key, accepted in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if data.get(key) != accepted or type(data[key]) is not type(accepted):
            raise ValueError(f"{path}: {key}={data.get(key)!r}; this dit_accel reads {accepted!r}")
    if unknown := sorted(data.keys() - set(_KEYS)):
        raise ValueError(f"{path}: unknown entry {unknown[0]!r}; accepted are {', '.join(_KEYS)}")
    config = data.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{path}: config={config!r:.40}; accepted are the fields of RASConfig")
    try:
        return RASConfig.from_dict(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
