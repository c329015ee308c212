"""`convert`: a TurboDiffusion checkpoint, made here by undoing the key mapping, becomes a repository."""

import pickle

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_wan

from dit_accel import SLAConfig, SparseWanPipeline, enable
from dit_accel.checkpoint.convert import convert
from dit_accel.checkpoint.file import read_checkpoint
from dit_accel.runtime.install import method_of

from ..cli.command import run as cli
from ..random_pipelines import make, relative, run
from .test_save_load import STEPS, absent

# The original names, from those of diffusers. In blocks.
BLOCK = {
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
# Outside.
ROOT = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
PROJECTION = "blocks.{}.self_attn.attn_op.local_attn.proj_l."


def original(name):
    for theirs, ours in (BLOCK if name.startswith("blocks.") else ROOT).items():
        if theirs in name:
            return name.replace(theirs, ours)
    return name


def turbo(transformer):
    """The state dict of TurboDiffusion's network; its linear branch has random weights."""
    weights = {original(name): x.clone() for name, x in transformer.state_dict().items()}
    weights["patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
    generator = torch.Generator().manual_seed(4)
    size = transformer.config.attention_head_dim
    for i in range(len(transformer.blocks)):
        for part, shape in (("weight", (size, size)), ("bias", (size,))):
            weights[PROJECTION.format(i) + part] = torch.randn(shape, generator=generator) * 0.3
    return weights


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A repository whose transformer has other weights than the checkpoint."""
    pipe, folder = make("wan"), tmp_path_factory.mktemp("wan") / "base"
    torch.manual_seed(8)
    for x in pipe.transformer.parameters():
        torch.nn.init.normal_(x, std=0.1)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "TurboWan.pth"
    torch.save(turbo(make("wan").transformer), path)
    return path


WRAPPERS = {
    "plain": lambda x: x,
    "model": lambda x: {"model": x, "iteration": 7},
    "state_dict": lambda x: {"state_dict": {f"net.{name}": y for name, y in x.items()}},
    "ddp": lambda x: {f"module._orig_mod.net.{name}": y for name, y in x.items()},
    "comfy": lambda x: {f"model.diffusion_model.{name}": y for name, y in x.items()},
    "distilled": lambda x: {
        "generator": {f"model._fsdp_wrapped_module.{name}": y for name, y in x.items()},
        "critic": {name: torch.zeros_like(y) for name, y in x.items()},
    },
    "checkpointed": lambda x: {
        name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): y
        for name, y in x.items()
    },
    "conv": lambda x: (
        x | {"patch_embedding.weight": make("wan").transformer.patch_embedding.weight}
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_converted_pipeline_is_the_original_one(wrapper, model, tmp_path):
    pipe = make("wan")
    weights = turbo(pipe.transformer)
    torch.save(WRAPPERS[wrapper](weights), tmp_path / "turbo.pth")
    blocks = {"topk": 0.3, "block_q": 32, "block_k": 16}
    out = convert(tmp_path / "turbo.pth", model, tmp_path / "TurboWan", **blocks)
    converted = SparseWanPipeline.from_pretrained(out, **absent("wan"))
    converted.set_progress_bar_config(disable=True)

    enable(
        pipe,
        sla=SLAConfig(
            **blocks,
            combine="proj",
            linear_scope="all",
            router="mean",
            rounding="floor",
            order="raster",
            dense_steps=0,
            dense_layers=0,
            crossover="never",
        ),
    )
    for i, module in enumerate(method_of(pipe, "sla").attention.values()):
        parts = {x: weights[PROJECTION.format(i) + x] for x in ("weight", "bias")}
        module.proj_l.load_state_dict(parts)
    if wrapper in ("plain", "distilled"):
        expected = run(pipe, "wan", steps=STEPS)
        assert torch.equal(run(converted, "wan", steps=STEPS), expected)
        assert converted.summary(strict=True).sparse_calls
    assert method_of(converted, "sla").config == method_of(pipe, "sla").config
    for name, module in method_of(pipe, "sla").attention.items():
        found = method_of(converted, "sla").attention[name].state_dict()
        assert all(torch.equal(found[x], y) for x, y in module.state_dict().items())
    assert read_checkpoint(out / "sla.safetensors").base.model == "TurboWan"
    vanilla = diffusers.WanPipeline.from_pretrained(out, **absent("wan"))
    ours = pipe.transformer.state_dict()
    assert all(torch.equal(ours[name], x) for name, x in vanilla.transformer.state_dict().items())
    assert {p.name for p in out.iterdir()} == {p.name for p in model.iterdir()} | {
        "sla.safetensors"
    }


def test_the_settings_are_those_that_turbodiffusion_serves_with(model, checkpoint, tmp_path):
    out = convert(checkpoint, model, tmp_path / "out")
    config = read_checkpoint(out / "sla.safetensors").config
    assert (config.topk, config.block_q, config.block_k) == (0.1, 128, 64)
    assert (config.combine, config.linear_scope, config.rounding) == ("proj", "all", "floor")
    assert config.router == "mean"
    assert (config.feature_map, config.dense_steps, config.dense_layers) == ("softmax", 0, 0)
    assert config.crossover == "never"
    assert config.order == "raster"


class PublishedAttention:
    """Self-attention as TurboDiffusion serves it, written from its code: blocks in raster order, the best
    floor(topk * n) blocks by the means of queries and centred keys, a linear branch over all keys."""

    def __init__(self, weights, topk, block_q, block_k):
        self.weights, self.topk, self.block_q, self.block_k = weights, topk, block_q, block_k
        self.layer = None
        self.stock = transformer_wan.dispatch_attention_fn

    def install(self, transformer, monkeypatch):
        monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", self)
        for i, block in enumerate(transformer.blocks):
            block.attn1.register_forward_pre_hook(lambda *_, i=i: setattr(self, "layer", i))
            block.attn1.register_forward_hook(lambda *_: setattr(self, "layer", None))

    def __call__(self, q, k, v, *args, **kwargs):
        if self.layer is None:
            return self.stock(q, k, v, *args, **kwargs)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))

        def means(x, size):
            return torch.stack([part.mean(2) for part in x.split(size, 2)], 2)

        scores = means(q, self.block_q) @ means(k - k.mean(2, keepdim=True), self.block_k).mT
        best = scores.topk(max(1, int(self.topk * scores.shape[-1])), -1).indices
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        rows = torch.arange(q.shape[2]) // self.block_q
        columns = torch.arange(k.shape[2]) // self.block_k
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=kept[:, :, rows][..., columns])
        fq, fk = q.softmax(-1), k.softmax(-1)
        linear = fq @ (fk.mT @ v) / (fq * fk.sum(2, keepdim=True)).sum(-1, keepdim=True)
        weight, bias = (self.weights[PROJECTION.format(self.layer) + x] for x in ("weight", "bias"))
        return (exact + F.linear(linear, weight, bias)).transpose(1, 2)


@pytest.mark.parametrize(
    ("blocks", "topk"),
    [
        ((128, 64), 0.3),
        ((64, 128), 0.6),
        ((64, 64), 0.3),
        ((128, 128), 0.6),
        ((32, 16), 0.3),
        ((16, 64), 0.6),
    ],
)
def test_the_output_is_that_of_the_checkpoint(blocks, topk, model, tmp_path, monkeypatch):
    """Converted weights on a grid of 3 x 14 x 10 tokens, where raster blocks and tiles differ and no block divides the length."""
    transformer = make("wan").transformer
    weights = turbo(transformer)
    torch.save(weights, tmp_path / "turbo.pth")
    block_q, block_k = blocks
    out = convert(
        tmp_path / "turbo.pth", model, tmp_path / "out", topk=topk, block_q=block_q, block_k=block_k
    )
    converted = SparseWanPipeline.from_pretrained(out, **absent("wan"))
    generator = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 4, 3, 28, 20, generator=generator),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(1, 12, 24, generator=generator),
        "return_dict": False,
    }
    converted.scheduler.set_timesteps(4)
    with torch.no_grad():
        [found] = converted.transformer(**call)
        PublishedAttention(weights, topk, block_q, block_k).install(transformer, monkeypatch)
        [expected] = transformer(**call)
    assert converted.summary(strict=True).sparse_calls
    assert relative(found, expected) < 1e-5


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def changed(**changes):
    weights = turbo(make("wan").transformer) | changes
    return {name: x for name, x in weights.items() if x is not None}


FFN, PROJ = "blocks.0.ffn.0.weight", PROJECTION.format(2) + "bias"
REFUSED = {
    "code": (lambda: {"model": Harmful()}, "pickle"),
    "no dict": (lambda: [torch.ones(1)], "no state dict"),
    "empty": (dict, "no state dict"),
    "no tensor": (lambda: changed(step=3), "step .*tensor"),
    "quantised": (
        lambda: changed(**{"blocks.0.ffn.0.int8_weight": torch.ones(1)}),
        r"quantised .*int8_weight.*-quant",
    ),
    "missing": (lambda: changed(**{FFN: None}), r"missing: blocks\.0\.ffn\.net\.0\.proj\.weight"),
    "extra": (lambda: changed(more=torch.ones(1)), "not expected: more"),
    "shape": (lambda: changed(**{FFN: torch.ones(2, 2)}), r"proj\.weight .*\(2, 2\)"),
    "huge": (
        lambda: changed(**{FFN: torch.ones(1).expand(10**9)}),
        r"proj\.weight .*\(1000000000,\)",
    ),
    "prefix": (
        lambda: {f"teacher.{name}": x for name, x in changed().items()},
        r"prefix 'teacher' of teacher\.",
    ),
    "several": (lambda: {"model": changed(), "ema": changed()}, "several .*'model', 'ema'"),
    "twice": (lambda: changed(**{f"net.{FFN}": torch.ones(1)}), rf"{FFN} .*net\.{FFN}"),
    "no proj_l": (
        lambda: {name: x for name, x in changed().items() if "proj_l" not in name},
        "proj_l.*SLA",
    ),
    "one proj_l": (lambda: changed(**{PROJ: None}), r"missing: blocks\.2\.attn1\.proj_l\.bias"),
    "layers": (
        lambda: changed(**{PROJECTION.format(3) + "bias": torch.ones(12)}),
        r"not expected: blocks\.3\.attn1\.proj_l\.bias",
    ),
    "nan": (
        lambda: changed(**{PROJ: torch.full((12,), torch.nan)}),
        r"blocks\.2\.attn1\.proj_l\.bias.*finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_checkpoints_are_refused_and_nothing_is_written(case, model, tmp_path):
    content, message = REFUSED[case]
    torch.save(content(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"checkpoint=.*x\.pth.*({message})"):
        convert(tmp_path / "x.pth", model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_damaged_files_and_other_models_are_refused(model, checkpoint, tmp_path):
    out = tmp_path / "out"
    content = checkpoint.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"nonsense", pickle.dumps(Harmful())):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint=.*(damaged|pickle)"):
            convert(checkpoint, model, out)
    with pytest.raises(ValueError, match=r"checkpoint=.*no\.pth"):
        convert(tmp_path / "no.pth", model, out)
    make("lumina").save_pretrained(tmp_path / "lumina")
    with pytest.raises(ValueError, match=r"model=.*LuminaNextDiT2DModel.*WanTransformer3DModel"):
        convert(checkpoint, tmp_path / "lumina", out)
    with pytest.raises(ValueError, match="block_q=100"):
        convert(checkpoint, model, out, block_q=100)
    assert not out.exists()


def test_the_command_line(model, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["convert", checkpoint, "--model", model]
    assert cli(*command, "--output-dir", out, "--topk", "0.15", "--block-q", "64") == 0
    assert capsys.readouterr().out == f"{out}\n"
    config = read_checkpoint(out / "sla.safetensors").config
    assert (config.topk, config.block_q, config.block_k) == (0.15, 64, 64)
    assert cli(*command, "--output-dir", out) == 2
    assert f"output_dir='{out}'" in capsys.readouterr().err
    assert cli(*command, "--output-dir", tmp_path / "new", "--topk", "2") == 2
    assert "topk=2.0" in capsys.readouterr().err
    checkpoint.write_bytes(b"")
    assert cli(*command, "--output-dir", tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()
