"""Write the result of a run (SLA checkpoint, weights or adapters, merged repository), and upload it."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_accel.checkpoint.companion import Companion
from dit_accel.checkpoint.file import FILE_NAME, write_checkpoint
from dit_accel.checkpoint.identity import identity_of
from dit_accel.checkpoint.merge import merge
from dit_accel.checkpoint.save_load import checkpoint_of, save_sla, weights_left_out
from dit_accel.files import model_source, naming_failures, sync
from dit_accel.finetune.shards import disk_errors

LORA_FILE = "pytorch_lora_weights.safetensors"
WEIGHTS, MERGED = "transformer", "merged"
COMPANIONS = {"all": (WEIGHTS,), "lora": (LORA_FILE,)}
"""Names of the files or folders that belong to `sla.safetensors`, by the option `train`."""

PUBLISHED = (
    FILE_NAME, LORA_FILE, f"{WEIGHTS}/*", f"{MERGED}/**", "README.md", "training_config.json", "log.jsonl", "curves.png",
    "validation/**",
)  # fmt: skip
"""Patterns of the uploaded files: everything except checkpoints, folders of trackers and dumps."""


def write_result(pipe: Any, config: Any, folder: Path) -> list[str]:
    """Write the trained weights. Each file is either complete or missing.

    - `sla.safetensors`: settings and weights of sparse attention, for `from_pretrained(..., sla=folder)`. It also
      names the weights or adapters below, which are loaded with it, and holds the fingerprint of the base model.
    - train="lora": `pytorch_lora_weights.safetensors`, adapters in the format of diffusers.
    - train="all": `transformer/`, the weights in the format of `save_pretrained`.
    - `merge`: `merged/`, a diffusers repository with merged weights or adapters, and the SLA checkpoint.

    Args:
        pipe: pipeline with the trained, unsharded transformer and sparse attention enabled.
        config: settings of the run (`FinetuneConfig`).
        folder: output folder. Files of an earlier result are replaced.

    Returns:
        The names of the written files and folders.

    Raises:
        RuntimeError: if a file could not be written, or if the base model could not be read. Files that were
            written before the error stay.
        ValueError: if the merged weights do not fit the base repository.
    """
    with naming_failures("the checkpoints of the run are unchanged"), disk_errors(folder):
        checkpoint = checkpoint_of(pipe)
        if config.train == "all":
            fingerprint = base_fingerprint(config, checkpoint.base.transformer_class)
            checkpoint = replace(checkpoint, base=replace(checkpoint.base, fingerprint=fingerprint))
        folder.mkdir(parents=True, exist_ok=True)
        names = [*COMPANIONS.get(config.train, ()), FILE_NAME]
        with _replacing(folder, names) as staging:
            if config.train == "lora":
                save_lora(pipe, staging)
                companion = Companion.open(staging / LORA_FILE, "lora")
                checkpoint = replace(checkpoint, companion=companion)
            if config.train == "all":
                save_weights(pipe, staging / WEIGHTS)
                companion = Companion.open(staging / WEIGHTS, "weights")
                checkpoint = replace(checkpoint, companion=companion)
            write_checkpoint(staging / FILE_NAME, checkpoint)
        if config.merge:
            with _replacing(folder, [MERGED]) as staging:
                merge_result(pipe, config, staging)
            names.append(MERGED)
    return names


@contextmanager
def _replacing(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a hidden folder. On success its entries `names` are synced and replace those in `folder` one by one."""
    staging = folder / ".tmp-result"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for name in names:
            made = staging / name
            for path in (made, *made.rglob("*")):
                sync(path)
        for name in names:
            target = folder / name
            if target.exists():
                os.replace(target, staging / f"old-{name}")
            os.replace(staging / name, target)
        sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def base_fingerprint(config: Any, transformer_class: str) -> Tensor:
    """Return the fingerprint of the base model. It is read from the base repository, because all weights have trained.

    Args:
        config: settings of the run (`FinetuneConfig`).
        transformer_class: name of the transformer class in diffusers.

    Raises:
        RuntimeError: if the repository can no longer be read.
    """
    import diffusers

    source = str(model_source(config.pretrained_model_name_or_path))
    hub = {k: x for k in ("revision", "cache_dir", "variant") if (x := getattr(config, k, None))}
    try:
        base = getattr(diffusers, transformer_class).from_pretrained(
            source, subfolder="transformer", **hub
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"{source}: the base model can no longer be read ({reason}), but the result needs its fingerprint. The "
            "checkpoints of the run are unchanged; make the model readable, then use resume_from_checkpoint='latest' to "
            "write the result"
        ) from None
    return identity_of(base).fingerprint


def save_weights(pipe: Any, folder: Path) -> None:
    """Write the weights of the transformer without sparse attention, in the format of `save_pretrained`."""
    with weights_left_out(pipe):
        pipe.transformer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors creates files with mode 0600


def save_lora(pipe: Any, folder: Path) -> None:
    """Write the adapters with their rank and scale in the format of diffusers."""
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
    """Write `merged/`: a copy of the base repository with the trained weights.

    Adapters are merged into the weights of `pipe` and removed from it.

    Args:
        pipe: pipeline with the trained transformer.
        config: settings of the run (`FinetuneConfig`).
        folder: folder in which `merged/` is created.

    Returns:
        The path of `merged/`.

    Raises:
        ValueError: if the base repository is not on this machine.
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
    """Return the folder of the base repository: a local folder, or the cached snapshot of a hub repository.

    Raises:
        ValueError: if a hub repository is not completely in the cache.
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
            f"merge=True: the repository {source} is not in the cache ({error}); download the whole repository first"
        ) from None


def check_hub(config: Any) -> None:
    """Check before training that the hub accepts the token.

    Raises:
        ValueError: if there is no token, if it is invalid, or if the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        HfApi(token=config.hub_token).whoami()
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"push_to_hub=True: the hub rejected the token or cannot be reached ({reason}); run `hf auth login`, or set "
            "hub_token"
        ) from None


def push_result(folder: Path, config: Any) -> str:
    """Upload the result, and return the URL of the repository.

    Checkpoints, folders of trackers and hidden files are not uploaded.

    Raises:
        RuntimeError: if the hub rejected the upload or could not be reached. The result stays in its folder.
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
            f"push_to_hub=True: {name} could not be uploaded ({reason}). The result is in {folder}; upload it with "
            f"`hf upload {name} {folder}`"
        ) from error
    return f"https://huggingface.co/{repository}"
