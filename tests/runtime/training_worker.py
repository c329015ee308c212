"""Ten training steps of a small Wan; run as a script, one process of two under DistributedDataParallel."""

import sys

import torch

SPARSE = {"block_q": 16, "block_k": 16, "crossover": "never", "topk": 0.25}
DENSE = 1


def bare_wan():
    """A transformer of 3 x 8 x 8 tokens, alone."""
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


def batch(family, rows=2):
    """Arguments of one call."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    if family == "wan":
        latents, channels = draw(rows, 4, 3, 8, 8), 24
    else:
        channels = 24
        latents = draw(rows, 16 if family in ("sd3", "sd35") else 4, 16, 16)
    arguments = {
        "hidden_states": latents,
        "timestep": torch.full((rows,), 0.3 if family.startswith("lumina") else 300.0),
        "encoder_hidden_states": draw(rows, 12, channels),
    }
    if family in ("sd3", "sd35"):
        arguments["pooled_projections"] = draw(rows, 16)
    if family == "lumina":
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        arguments["encoder_mask"] = torch.ones(rows, 12, dtype=torch.int64)
        arguments["image_rotary_emb"] = get_2d_rotary_pos_embed_lumina(16, 384, 384)
        arguments["cross_attention_kwargs"] = {}
    if family == "lumina2":
        arguments["encoder_attention_mask"] = torch.ones(rows, 12, dtype=torch.int64)
    return arguments


def train(model, steps, part=slice(None)):
    """Losses of velocity regression on a fixed batch, of which `part` is seen."""
    arguments = {
        name: x[part] if isinstance(x, torch.Tensor) else x for name, x in batch("wan").items()
    }
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
