"""Scenarios of training in several processes, run by torchrun; what they find goes to a JSON file a rank."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import torch

from dit_accel.finetune import checkpoints as checkpoints_module
from dit_accel.finetune.checkpoints import (
    checkpoints,
    find_latest,
    read_checkpoint,
    save_checkpoint,
)
from dit_accel.finetune.guards import group_norm
from dit_accel.finetune.log import read_log
from dit_accel.finetune.processes import Processes
from dit_accel.finetune.shards import is_sharded
from dit_accel.finetune.stop import Interrupted
from tests.finetune.fakes import FakeConfig, make_loop


def whole(state):
    """All tensors in one piece, as lists; every process calls it."""
    return {
        f"{group}/{name}": (x.full_tensor() if is_sharded(x) else x).detach().flatten().tolist()
        for group, found in state.groups().items()
        for name, x in found.items()
    }


def train(folder, config, **more):
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    loop = make_loop(config, folder, checkpoint=find_latest(folder)[0], **more)
    loop.run()
    loop.parts.log.close()
    torch.distributed.barrier()
    log = read_log(folder / "log.jsonl")
    return {
        "losses": [x["loss"] for x in log],
        "sigmas": [x["sigma"] for x in log],
        "norms": [x["gradient_norm"] for x in log],
        "updates": [x.get("update/weights") for x in log],
        "densities": [x["density"] for x in log],
        "tensors": whole(loop.parts.state),
        "norm": group_norm(list(loop.parts.state.named.values()), Processes()),
        "counters": {k: x for k, x in loop.parts.state.counters.items() if k != "seconds"},
    }


def main(folder, single):
    config = FakeConfig(train_batch_size=2)
    found = {}
    make_loop(config, mkdir(folder / "begun"))  # which makes accelerate set up the processes
    for kind in ("ddp", "fsdp"):
        own = dataclasses.replace(config, fsdp=kind == "fsdp")
        found[kind] = train(folder / kind, own)
        resumed = folder / f"{kind}-resumed"
        resumed.mkdir(exist_ok=True)
        if os.environ["RANK"] == "0":
            os.symlink(folder / kind / "checkpoint-3", resumed / "checkpoint-3")
        found[f"{kind}-resumed"] = train(resumed, own)
        found[f"{kind}-from-single"] = train(single / kind, own)
    sharded = find_latest(folder / "fsdp")[0]
    found["shards"] = sorted(sharded.files)
    for kind in ("ddp", "fsdp"):
        found[f"{kind}-accumulated"] = train(
            folder / f"{kind}-accumulated",
            dataclasses.replace(
                config,
                train_batch_size=1,
                gradient_accumulation_steps=2,
                fsdp=kind == "fsdp",
            ),
        )
    found["bf16"] = train(
        folder / "bf16", dataclasses.replace(config, fsdp=True, mixed_precision="bf16")
    )
    rank = int(os.environ["RANK"])
    found["skipped"] = train(folder / "skipped", config, spoil={2: math.nan} if rank else None)

    loop = make_loop(config, mkdir(folder / "stopped"))
    if rank:
        loop.parts.stop.name = "SIGTERM"
    try:
        loop.run()
    except Interrupted as error:
        found["stopped"] = [error.code, str(error.checkpoint.name), error.signal_name]

    mkdir(folder / "failed")
    if rank:
        checkpoints_module.write_shard = full_disk
    try:
        save_checkpoint(folder / "failed", 1, {"weights": {}}, {}, processes=Processes())
    except RuntimeError as error:
        found["failed"] = [str(error), len(checkpoints(folder / "failed"))]
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    read_checkpoint(folder / "fsdp" / "checkpoint-8")
    torch.distributed.destroy_process_group()


def mkdir(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
