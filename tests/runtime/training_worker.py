"""Ten training steps of a small Wan; run as a script, one process of two under DistributedDataParallel."""

import sys

import torch

SPARSE = {"block_q": 16, "block_k": 16, "crossover": "never", "topk": 0.25}
DENSE = 1


def bare_wan():
    """Return a transformer of Wan without a pipeline, for 3 x 8 x 8 tokens."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return transformer


def batch(rows=2):
    """Return the arguments of one call of `bare_wan`."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(rows, 4, 3, 8, 8, generator=generator),
        "timestep": torch.full((rows,), 300.0),
        "encoder_hidden_states": torch.randn(rows, 12, 24, generator=generator),
    }


def train(model, steps, part=slice(None)):
    """Train on a part of a fixed batch, and return the losses of velocity regression."""
    arguments = {name: x[part] for name, x in batch().items()}
    target = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2))[part]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (model(**arguments, return_dict=False)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main(path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import dit_accel

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    transformer = bare_wan()
    dit_accel.enable(transformer, sla={**SPARSE, "combine": "proj", "dense_layers": DENSE})
    # A dense layer's projection takes no part in the loss.
    wrapped = DistributedDataParallel(transformer, find_unused_parameters=True)
    losses = train(wrapped, 10, slice(rank, rank + 1))
    assert losses[-1] < losses[0]
    report = dit_accel.summary(wrapped)
    if rank == 0:
        calls = [x.sparse_calls for x in report.layers]
        torch.save({"weights": transformer.state_dict(), "sparse_calls": calls}, path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
