"""Files of the result: the SLA checkpoint, adapters or weights, a merged repository; and their upload."""

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
"""Files beside `sla.safetensors`, by what trains."""
PUBLISHED = (
    FILE_NAME, LORA_FILE, f"{WEIGHTS}/*", f"{MERGED}/**", "README.md", "training_config.json", "log.jsonl", "curves.png",
    "validation/**",
)  # fmt: skip
"""What is uploaded: everything but checkpoints, trackers' folders and dumps."""


def write_result(pipe: Any, config: Any, folder: Path) -> list[str]:
    """Write what was trained, each file complete or not at all.

    - `sla.safetensors`: settings and weights of sparse attention, for `from_pretrained(..., sla=folder)`. It names
      what was trained with it, which loads with it, and has the fingerprint of the base model.
    - train="lora": `pytorch_lora_weights.safetensors`, adapters in the format of diffusers.
    - train="all": `transformer/`, the weights as `save_pretrained` writes them.
    - `merge`: `merged/`, a diffusers repository with the weights or adapters merged in, and the SLA checkpoint.

    Args:
        pipe: the pipeline with the trained transformer, in one piece, sparse attention on.
        config: settings of the run (`FinetuneConfig`).
        folder: where the result goes; files of an earlier result are replaced.

    Returns:
        The names that were written.

    Raises:
        RuntimeError: a file could not be written, or the base model not be read. What was written before stays.
        ValueError: the merged weights do not fit the repository.
    """
    with naming_failures("the checkpoints of the run are unharmed"), disk_errors(folder):
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
    """Yield a hidden folder; what it holds under each name is brought to the disk and then replaces, one by one."""
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
    """Return the fingerprint of the base model, read from its repository: every weight here may have trained.

    Args:
        config: settings of the run (`FinetuneConfig`).
        transformer_class: class of the transformer in diffusers.

    Raises:
        RuntimeError: the repository cannot be read any more.
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
            f"{source}: the base model cannot be read any more ({reason}), and the result names it; the checkpoints of "
            "the run are unharmed: resume_from_checkpoint='latest' writes the result once it can be read"
        ) from None
    return identity_of(base).fingerprint


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
