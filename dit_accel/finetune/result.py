"""Files of the result: the SLA checkpoint, adapters or weights, a merged repository; and their upload."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit_accel.checkpoint.file import FILE_NAME
from dit_accel.checkpoint.merge import merge
from dit_accel.checkpoint.save_load import save_sla, weights_left_out
from dit_accel.files import model_source, naming_failures, sync
from dit_accel.finetune.shards import disk_errors

LORA_FILE = "pytorch_lora_weights.safetensors"
WEIGHTS, MERGED = "transformer", "merged"
PUBLISHED = (
    FILE_NAME, LORA_FILE, f"{WEIGHTS}/*", f"{MERGED}/**", "README.md", "training_config.json", "log.jsonl", "curves.png",
    "validation/**",
)  # fmt: skip
"""What is uploaded: everything but checkpoints, trackers' folders and dumps."""


def write_result(pipe: Any, config: Any, folder: Path) -> list[str]:
    """Write what was trained, each file complete or not at all.

    - `sla.safetensors`: settings and weights of sparse attention, for `from_pretrained(..., sla=folder)`.
    - train="lora": `pytorch_lora_weights.safetensors`, for `load_lora_weights(folder)`.
    - train="all": `transformer/`, the weights as `save_pretrained` writes them.
    - `merge`: `merged/`, a diffusers repository with the weights or adapters merged in, and the SLA checkpoint.

    Args:
        pipe: the pipeline with the trained transformer, in one piece, sparse attention on.
        config: settings of the run (`FinetuneConfig`).
        folder: where the result goes; files of an earlier result are replaced.

    Returns:
        The names that were written.

    Raises:
        RuntimeError: a file could not be written. What was written before stays.
        ValueError: the merged weights do not fit the repository.
    """
    with naming_failures("the checkpoints of the run are unharmed"), disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        if config.train == "lora":
            with _replacing(folder, LORA_FILE) as staging:
                save_lora(pipe, staging)
            names.append(LORA_FILE)
        if config.train == "all":
            with _replacing(folder, WEIGHTS) as staging:
                save_weights(pipe, staging / WEIGHTS)
            names.append(WEIGHTS)
        # Last: who finds it finds the weights that it goes with.
        names.append(save_sla(pipe, folder).name)
        if config.merge:
            with _replacing(folder, MERGED) as staging:
                merge_result(pipe, config, staging)
            names.append(MERGED)
    return names


@contextmanager
def _replacing(folder: Path, name: str) -> Iterator[Path]:
    """Yield a hidden folder; what it holds under `name` is brought to the disk and replaces what `folder` has there."""
    staging = folder / f".tmp-result-{name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        made = staging / name
        for path in (made, *made.rglob("*")):
            sync(path)
        target, old = folder / name, staging / "old"
        if target.exists():
            os.replace(target, old)
        os.replace(made, target)
        sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_weights(pipe: Any, folder: Path) -> None:
    """Write the weights of the plain transformer as `save_pretrained` does, in safetensors."""
    with weights_left_out(pipe):
        pipe.transformer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def save_lora(pipe: Any, folder: Path) -> None:
    """Write the adapters in the format of diffusers, with their rank and scale."""
    from peft import get_peft_model_state_dict

    transformer = pipe.transformer
    [(adapter, about)] = transformer.peft_config.items()
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=adapter),
        transformer_lora_adapter_metadata=about.to_dict(),
    )
    (folder / LORA_FILE).chmod(0o644)


def merge_result(pipe: Any, config: Any, folder: Path) -> Path:
    """Write `merged/`: a copy of the base repository with the trained weights in it.

    Adapters become part of the weights of `pipe`, which has none afterwards.

    Args:
        folder: where `merged/` goes.

    Raises:
        ValueError: the base repository is not on this machine.
    """
    base = base_folder(config)
    transformer = pipe.transformer
    if getattr(transformer, "peft_config", None):
        transformer.fuse_lora()
        transformer.unload_lora()
    save_weights(pipe, folder / WEIGHTS)
    save_sla(pipe, folder)
    return merge(base, folder / WEIGHTS, folder / MERGED, sla_checkpoint=folder)


def base_folder(config: Any) -> Path:
    """Return the folder of the base repository: the given one, or the snapshot of a hub repository.

    Raises:
        ValueError: a hub repository that is not in the cache.
    """
    source = model_source(config.pretrained_model_name_or_path)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(source),
                revision=config.revision,
                cache_dir=config.cache_dir,
                local_files_only=True,
            )
        )
    except OSError as error:
        raise ValueError(
            f"merge=True: the repository {source} is not in the cache ({error}); accepted is one that was downloaded "
            "whole"
        ) from None


def check_hub(config: Any) -> None:
    """Refuse an upload that could not work, before training.

    Raises:
        ValueError: no token, one that is not valid, or a hub that cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        HfApi(token=config.hub_token).whoami()
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"push_to_hub=True: the hub does not accept this ({reason}); accepted after `hf auth login` or with hub_token"
        ) from None


def push_result(folder: Path, config: Any) -> str:
    """Upload the result; return the address of the repository.

    Checkpoints, folders of trackers and hidden files stay here.

    Raises:
        RuntimeError: the hub refused it or could not be reached. The result stays in its folder.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=config.hub_token)
    name = config.hub_model_id or folder.resolve().name
    try:
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(PUBLISHED),
            ignore_patterns=[".*", "**/.*"],
            commit_message="SLA fine-tuning",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"push_to_hub: {name} could not be uploaded ({reason}); the result is in {folder}, and "
            f"`hf upload {name} {folder}` uploads it"
        ) from error
    return f"https://huggingface.co/{repository}"
