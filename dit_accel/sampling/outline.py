"""Facts about the pipeline of a repository, read from its configuration files without loading weights."""

import inspect
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from dit_accel.sampling.load import pipeline_class
from dit_accel.sampling.settings import FRAMES, Sampling

MAX_TEXT_TOKENS = {
    "StableDiffusion3Pipeline": 512,
    "Lumina2Pipeline": 512,
    "FluxPipeline": 512,
    "QwenImagePipeline": 1024,
}
"""Maximum number of text tokens of a diffusers pipeline, by its class name."""


@dataclass(frozen=True)
class Outline:
    """Facts about a pipeline that is not loaded.

    Has the attributes of a pipeline that argument checks need: `check_sizes`, `transformer.config` and the scale factors of
    the VAE.
    """

    pipeline: Any
    """Sparse pipeline class."""
    transformer: Any
    """Object with the attribute `config`, and `enable_cache` if the class of the transformer has it."""
    transformer_class: Any
    """Class of the transformer in diffusers."""
    facts: dict[str, int]
    """Scale factors of the VAE, by the attribute name of the pipeline."""
    transformers: tuple[str, ...] = ("transformer",)
    """Names of the transformers of the pipeline."""
    expand_timesteps: bool = False
    """True if the transformer takes one timestep for each token (Wan2.2 TI2V)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["facts"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def transformer_2(self) -> Any:
        """Second transformer, with the config of the first one; None if there is none."""
        return self.transformer if len(self.transformers) > 1 else None

    @property
    def makes_clips(self) -> bool:
        """True if the pipeline generates clips, False for images."""
        return any(name in self.facts for name in FRAMES)

    @property
    def takes_image(self) -> bool:
        """True if the pipeline takes an input image."""
        return self.pipeline._parent == "WanImageToVideoPipeline"

    def steps(self, sampling: Sampling) -> int:
        """Return the number of steps of `sampling`, or the default of the pipeline."""
        default = (
            inspect.signature(self.pipeline.__call__).parameters["num_inference_steps"].default
        )
        return sampling.num_inference_steps or default

    def check_sizes(self, **arguments: Any) -> None:
        """Raise ValueError if the pipeline does not support these sizes."""
        self.pipeline.check_sizes(self, **arguments)

    def check(self, sampling: Sampling) -> None:
        """Raise ValueError if the pipeline does not accept these call arguments."""
        self.check_sizes(**sampling.call_arguments())
        most = MAX_TEXT_TOKENS.get(self.pipeline._parent)
        tokens = sampling.max_sequence_length
        if most is not None and tokens is not None and tokens > most:
            raise ValueError(
                f"max_sequence_length={tokens}: must be at most {most} for {self.pipeline._parent}"
            )
        if self.takes_image and sampling.image is None:
            raise ValueError(
                "image=None: an image-to-video model needs an input image; pass --image"
            )
        if sampling.image is not None and not self.takes_image:
            raise ValueError(
                f"image={sampling.image!r}: {self.pipeline._parent} takes no input image; needs an "
                "image-to-video model (WanImageToVideoPipeline)"
            )


def read_outline(model: str | os.PathLike, **hub: Any) -> Outline:
    """Return the outline of a repository, from model_index.json and the configs of transformer and VAE.

    Args:
        model: folder or hub id of a diffusers repository.
        hub: arguments for the hub, such as `revision`.

    Raises:
        ValueError: the repository cannot be read, or its pipeline is not supported.
    """
    import diffusers

    from dit_accel.checkpoint.repository import read_index, transformers_in

    pipeline = pipeline_class(model, **hub)
    index = read_index(model, "model", **hub)
    held = transformers_in(index)
    parts = {}
    for part in ("transformer", "vae"):
        # A pipeline may have `transformer_2` without `transformer`.
        name = held[0] if part == "transformer" and held else part
        cls = getattr(diffusers, (index.get(name) or [None, ""])[1] or "", None)
        if cls is None:
            raise ValueError(
                f"model={str(model)!r}: {name}={index.get(name)!r} in model_index.json; must be a class of "
                "diffusers"
            )
        try:
            config = cls.load_config(str(model), subfolder=name, **hub)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model={str(model)!r}: cannot read the config of {name} "
                f"({str(error).splitlines()[0]})"
            ) from None
        parameters = inspect.signature(cls.__init__).parameters.values()
        defaults = {x.name: x.default for x in parameters if x.default is not x.empty}
        parts[part] = cls, SimpleNamespace(**(defaults | config))
    (cls, config), (_, vae) = parts["transformer"], parts["vae"]
    methods = {"enable_cache": cls.enable_cache} if hasattr(cls, "enable_cache") else {}
    # Error messages name the type of the transformer.
    transformer = type(cls.__name__, (), {"config": config, **methods})()
    return Outline(
        pipeline,
        transformer,
        cls,
        _scale_factors(pipeline, vae),
        tuple(held),
        bool(index.get("expand_timesteps")),
    )


def _scale_factors(pipeline: Any, vae: Any) -> dict[str, int]:
    """Return the scale factors of the VAE, computed as the diffusers pipeline does."""
    if pipeline._parent.startswith("Lumina"):
        return {"vae_scale_factor": 8}
    if hasattr(vae, "scale_factor_temporal"):
        return {
            "vae_scale_factor_temporal": vae.scale_factor_temporal,
            "vae_scale_factor_spatial": vae.scale_factor_spatial,
        }
    if hasattr(vae, "spatio_temporal_scaling"):  # LTX-Video
        scale = 2 ** sum(vae.spatio_temporal_scaling)
        return {
            "vae_temporal_compression_ratio": vae.temporal_compression_ratio
            or vae.patch_size_t * scale,
            "vae_spatial_compression_ratio": vae.spatial_compression_ratio
            or vae.patch_size * scale,
        }
    if hasattr(vae, "temperal_downsample"):
        return {"vae_scale_factor": 2 ** len(vae.temperal_downsample)}
    scale = 2 ** (len(vae.block_out_channels) - 1)
    if hasattr(vae, "temporal_compression_ratio"):
        return {
            "vae_scale_factor_temporal": vae.temporal_compression_ratio,
            # The config of CogVideoX has no such entry.
            "vae_scale_factor_spatial": getattr(vae, "spatial_compression_ratio", scale),
        }
    return {"vae_scale_factor": scale}
