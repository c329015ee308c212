"""`train`: a training run from a recipe to a diffusers repository, and the models that can be trained.

Transformers have one token per latent position. Their outputs start at zero and their gates start open, so that
all blocks learn from the first step.
"""

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dit_accel.environment import machine, versions
from dit_accel.files import asset, atomic_directory, write_json
from dit_accel.sampling.devices import pick_device

from . import clips
from .config import ImageTrainConfig, Lumina2TrainConfig, Recipe, TrainConfig
from .dataset import check_output_dir
from .stages import Trainer
from .vae import double_vae, use_whole_clips

HEAD_DIM = 32  # of the image models


class Wan(Trainer):
    """Wan2.1 for clips of 33 frames: 17 x 8 x 8 = 1,088 tokens."""

    name = "tiny-wan"
    still = False
    central, anywhere = clips.CENTRAL, clips.ANYWHERE
    statistics = (128, 17, clips.ANYWHERE)
    stages: ClassVar[dict[str, int]] = {"short": 9, "full": 33}
    lengths = (16, 512)

    def initial_vae(self) -> Any:
        base, channels = self.config["vae_base_dim"], self.pipeline.vae.config.z_dim
        scale = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
        vae = self.new_part("vae", base_dim=base, decoder_base_dim=base, **scale)
        use_whole_clips(vae)
        return vae

    def initial_transformer(self) -> Any:
        sizes = {name: self.config[name] for name in ("num_layers", "ffn_dim")}
        sizes["num_attention_heads"] = self.config["num_heads"]
        model = self.new_part("transformer", **sizes)
        _zero(model.proj_out)
        for block in model.blocks:  # random gates would be about 0.1
            block.scale_shift_table.data[:, [2, 5]] = 1.0  # gates of attention and feed-forward
        return model

    def encode(self, captions: list[str], length: int) -> list[Tensor]:
        # All captions fit the short length. The pipeline fills longer texts with zeros, as `text` does.
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.lengths[0]}
        return [self.pipeline.encode_prompt([*captions, ""], **options)[0]]

    def text(self, rows: Tensor, empty: Tensor, length: int) -> list[Tensor]:
        (states,) = super().text(rows, empty, length)
        return [nn.functional.pad(states, (0, 0, 0, length - self.lengths[0]))]

    def velocity(self, noisy: Tensor, sigma: Float[Tensor, " n"], text: list[Tensor]) -> Tensor:
        return self.pipeline.transformer(noisy, sigma * 1000, *text, return_dict=False)[0]


class StableDiffusion3(Trainer):
    """Stable Diffusion 3 for stills of 64 x 64 pixels: 16 x 16 = 256 image tokens."""

    name = "tiny-sd3"
    lengths = (16, 256)  # of T5's part of the text

    def initial_vae(self) -> Any:
        base = self.config["vae_base_dim"]
        return self.new_part("vae", block_out_channels=(base, 2 * base, 4 * base))

    def initial_transformer(self) -> Any:
        heads = self.config["num_heads"]
        width = HEAD_DIM * heads
        sizes = {"num_layers": self.config["num_layers"], "caption_projection_dim": width}
        model = self.new_part("transformer", num_attention_heads=heads, **sizes)
        table = _position_table(model.config.pos_embed_max_size, width)
        model.pos_embed.pos_embed.copy_(table)
        _zero(model.proj_out)
        for block in model.transformer_blocks:
            _attend_to_alike(block.attn)
            for linear in (block.norm1.linear, block.norm1_context.linear):
                _zero(linear)
                if len(linear.bias) == 6 * width:  # not in the last block's context
                    linear.bias.data.view(6, width)[[2, 5]] = 1.0  # gates
        return model

    def encode(self, captions: list[str], length: int) -> list[Tensor]:
        options = {"do_classifier_free_guidance": False, "max_sequence_length": length}
        states, _, pooled, _ = self.pipeline.encode_prompt([*captions, ""], None, None, **options)
        return [states, pooled]

    def velocity(self, noisy: Tensor, sigma: Float[Tensor, " n"], text: list[Tensor]) -> Tensor:
        return self.pipeline.transformer(noisy, *text, sigma * 1000, return_dict=False)[0]


class Lumina2(Trainer):
    """Lumina-Image 2.0 for stills of 128 x 128 pixels: 16 x 16 = 256 image tokens."""

    name = "tiny-lumina2"
    side = 128
    lengths = (40,)  # the longest prompt has 34 tokens, and the transformer masks padding

    def initial_vae(self) -> Any:
        """Return the VAE of tiny-sd3 with twice the stride: the pipeline assumes a stride of 8."""
        from diffusers import AutoencoderKL

        vae = self.new_part("vae")
        double_vae(AutoencoderKL.from_pretrained(asset("tiny-sd3") / "vae"), vae)
        return vae

    def initial_transformer(self) -> Any:
        heads = self.config["num_heads"]
        names = ("num_layers", "num_refiner_layers", "num_kv_heads")
        sizes = {name: self.config[name] for name in names} | {"num_attention_heads": heads}
        width = HEAD_DIM * heads
        model = self.new_part("transformer", hidden_size=width, **sizes)
        _spread_times(model.time_caption_embed.timestep_embedder.linear_1, self.config["seed"])
        _zero(model.norm_out.linear_1)
        _zero(model.norm_out.linear_2)
        for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
            _attend_to_alike(block.attn)
            if block.modulation:
                _zero(block.norm1.linear)
                gates = block.norm1.linear.bias.data.view(4, width)[1::2]  # attention, feed-forward
                gates.fill_(0.55)  # its hyperbolic tangent is 0.5
        return model

    def encode(self, captions: list[str], length: int) -> list[Tensor]:
        states, mask, empty_states, empty_mask = self.pipeline.encode_prompt(
            captions, negative_prompt="", max_sequence_length=length
        )
        # All rows of the negative prompt are equal.
        masks = torch.cat([mask, empty_mask[:1]]).bool()
        return [torch.cat([states, empty_states[:1]]), masks]

    def velocity(self, noisy: Tensor, sigma: Float[Tensor, " n"], text: list[Tensor]) -> Tensor:
        # Time runs from noise at 0 to the image at 1, and the output points to the image.
        return -self.pipeline.transformer(noisy, 1 - sigma, *text, return_dict=False)[0]


TRAINERS: dict[type[Recipe], type[Trainer]] = {
    TrainConfig: Wan,
    ImageTrainConfig: StableDiffusion3,
    Lumina2TrainConfig: Lumina2,
}


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def _attend_to_alike(attention: Any) -> None:
    """Start the first head with equal queries and keys, so that it attends to near and similar tokens."""
    for name, parameter in attention.to_k.named_parameters():
        parameter.data[:HEAD_DIM] = attention.to_q.get_parameter(name).data[:HEAD_DIM]


def _position_table(size: int, width: int) -> Float[Tensor, "1 size2 width"]:
    """Return sines and cosines of both coordinates, at wavelengths from 4 to 128 tokens.

    The default wavelengths go up to 60,000 tokens, so most of them are constant over 16 tokens.
    """
    angles = torch.arange(size)[:, None] * math.pi / torch.logspace(1, 6, width // 4, base=2.0)
    one = torch.cat([angles.sin(), angles.cos()], 1)  # [size, width / 2]
    down, across = one[:, None].expand(-1, size, -1), one[None].expand(size, -1, -1)
    return torch.cat([across, down], -1).reshape(1, size * size, width)


@torch.no_grad()
def _spread_times(linear: nn.Linear, seed: int) -> None:
    """Let the units of the timestep's first layer switch on at times that are spread over [0, 1].

    The pipeline passes times in [0, 1] to an embedding for times in [0, 1000], where all channels are nearly
    constant or linear. A layer with the usual weights would hardly tell one time from another.
    """
    generator = torch.Generator().manual_seed(seed + 1)  # independent of the weights
    sine = linear.in_features // 2  # the sine of the time itself; cosines come first
    slope = 8 * torch.randn(linear.out_features, generator=generator)
    linear.weight[:, sine] += slope
    linear.bias.copy_(-slope * torch.rand(linear.out_features, generator=generator).sin())


def train(
    output_dir: str | Path,
    work_dir: str | Path | None = None,
    config: Recipe | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Train a model like an embedded one, and write it as a diffusers repository with fp16 safetensors.

    Tokenizers and text encoders are those of the embedded model; the text encoders have random weights.

    Args:
        output_dir: folder to write; new or empty. It appears only when it is complete.
        work_dir: folder of the checkpoints. With the same `work_dir` training resumes from the newest
            checkpoint, and ends with the weights of an uninterrupted run. Default: `<output_dir>-work`.
        config: recipe, whose class decides the model: `TrainConfig` is Wan2.1, `ImageTrainConfig` is Stable
            Diffusion 3, `Lumina2TrainConfig` is Lumina-Image 2.0. Default: `TrainConfig()`.
        device: "auto" (the GPU if there is one), "cpu", "cuda", ...
        progress: show a bar for each stage on stderr.

    Returns:
        The content of `<work_dir>/training.json`: recipe, seconds per stage, versions, machine.
    """
    config = config or TrainConfig()
    output = check_output_dir(output_dir)
    work = Path(work_dir) if work_dir is not None else output.with_name(output.name + "-work")
    place = pick_device(device)
    work.mkdir(parents=True, exist_ok=True)

    trainer = TRAINERS[type(config)](config, place, work, progress)
    trainer.run()
    record = {
        "format_version": 1,
        "config": trainer.config,
        "seconds": {name: round(value, 1) for name, value in trainer.seconds.items()},
        "seconds_total": round(sum(trainer.seconds.values()), 1),
        "device": place.type,
        "machine": machine(),
        "versions": versions(),
    }
    export(trainer.pipeline, output)
    write_json(work / "training.json", record)
    return record


def export(pipeline: Any, output: Path) -> None:
    """Save a pipeline, whose weights become fp16, to a folder that appears only when it is complete."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            # The models' own `half` keeps some layers in fp32, which doubles their size.
            nn.Module.half(part.cpu())
    with atomic_directory(output) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        for path in temporary.rglob("*.json"):
            _tidy_config(path)
        for weights in temporary.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes files that only their owner can read


def _tidy_config(path: Path) -> None:
    """Remove the path of the source, and make fp32 the dtype after loading.

    transformers loads in the dtype of the configuration, diffusers in fp32. fp16 is slow on CPUs.
    """
    content = json.loads(path.read_text())
    if isinstance(content, dict) and content.keys() & {"_name_or_path", "dtype"}:
        content.pop("_name_or_path", None)
        content |= {"dtype": "float32"} if "dtype" in content else {}
        path.write_text(json.dumps(content, indent=2) + "\n")
