"""Step caches of diffusers: the setting that decides the cost of each, and the models that it does not work for."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_accel.runtime.components import transformers_of
from dit_accel.sampling.step_caches import TWO_TRANSFORMERS, scheduler_step, takes_cache

WAN = "WanTransformer3DModel"
_TWO_CALLS = "diffusers keeps one state for both calls of guidance that this model makes"


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """Step cache of diffusers."""

    shown: str  # name in tables
    settings: str  # name of the class of its settings in diffusers
    setting: str  # setting that is searched: a field of the config, or a description of the part that `fields` sets
    span: Callable[[int], tuple[float, float]]
    """Function from the number of steps to the value that skips nothing and the value that costs least."""
    whole: bool = False  # whether only whole numbers are accepted
    fields: Callable[[float], dict[str, Any]]  # from a value of the setting to config fields
    options: Callable[[Any, int], dict[str, Any]] = lambda pipe, steps: {}
    """Function from a loaded pipeline and its number of steps to further config fields."""
    stages: Sequence[Mapping[str, Any]] = ({},)
    """Further config fields. If the setting alone does not reach a cost, the next stage is tried."""
    calibrated: bool = False  # whether the config needs `mag_ratios` of the model and the steps
    guided: bool = False  # whether the cache needs guidance
    alike: bool = False  # whether the model's input and output must have equally many channels
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Reason why the cache does not work, by class of the transformer."""

    def why_not(self, pipe: Any, guidance_scale: float | None = None) -> str | None:
        """Return the reason why this cache cannot run on a pipeline or its outline; None if it can."""
        import diffusers

        held = transformers_of(pipe)
        if len(held) > 1:
            return TWO_TRANSFORMERS
        transformer = getattr(held[0], "_orig_mod", held[0])  # torch.compile wraps
        model = type(transformer).__name__
        if not hasattr(diffusers, self.settings):
            return f"not in diffusers {diffusers.__version__}"
        if not takes_cache(transformer):
            return f"not in diffusers for {model}"
        if model in self.unfit:
            return self.unfit[model]
        channels = {getattr(transformer.config, f"{x}_channels", None) for x in ("in", "out")}
        if self.alike and len(channels) > 1:
            return "not in diffusers for models that take a picture beside the noise"
        if self.guided and guidance_scale is not None and guidance_scale <= 1:
            return f"needs guidance, which guidance_scale={guidance_scale} switches off"
        return None

    def config(
        self, pipe: Any, steps: int, value: float | None = None, stage: int = 0, ratios: Any = None
    ) -> Any:
        """Return the config of diffusers.

        Args:
            pipe: a loaded pipeline.
            steps: number of calls that the solver makes in a run.
            value: value of the setting. Default: that of diffusers.
            stage: index in `stages`.
            ratios: result of a calibration, if there was one.
        """
        import diffusers

        given = {**self.stages[stage], **self.options(pipe, steps)}
        if value is not None:
            given |= self.fields(round(value) if self.whole else value)
        if self.calibrated:
            given["mag_ratios"] = [1.0] * steps if ratios is None else list(ratios)
        return getattr(diffusers, self.settings)(**given)


def _threshold(largest: float) -> dict[str, Any]:
    """Return the arguments of a `StepCache` whose setting is `threshold`."""
    span, fields = (lambda steps: (0.0, largest)), (lambda value: {"threshold": value})
    return {"setting": "threshold", "span": span, "fields": fields}


def _timestep(pipe: Any) -> dict[str, Any]:
    """Return the callback for the timestep of the current step; not every pipeline keeps it."""

    def timestep() -> float:
        return float(pipe.scheduler.timesteps[scheduler_step(pipe)])

    return {"current_timestep_callback": timestep}


def _sea(pipe: Any, steps: int) -> dict[str, Any]:
    if hasattr(pipe.transformer, "enable_cache"):
        return {}  # diffusers knows the frames of Wan

    def frames(module: Any, args: Any, kwargs: Any) -> list[Any]:
        return list(kwargs["hidden_states"][:, :, None])

    return {"raw_vision_callback": frames}


def _taylorseer(pipe: Any, steps: int) -> dict[str, Any]:
    return {
        # The default patterns match no attention of Wan; the paper forecasts attention and MLP.
        "cache_identifiers": [r".*blocks\.\d+\.(attn\d?|ffn|ff|ff_context)"],
        "taylor_factors_dtype": pipe.transformer.dtype,
    }


def _faster(pipe: Any, steps: int) -> dict[str, Any]:
    names = "hidden_states encoder_hidden_states timestep pooled_projections attention_mask"
    return {
        **_timestep(pipe),
        "tensor_format": "BCHW",
        "attention_weight_callback": lambda module: 0.5,  # the default, without its warning
        "_unconditional_conditional_input_kwargs_identifiers": (
            *names.split(),
            "encoder_attention_mask",
        ),
    }


CACHES: dict[str, StepCache] = {
    "first_block_cache": StepCache(
        shown="FirstBlockCache", settings="FirstBlockCacheConfig", **_threshold(1.0)
    ),
    "sea_cache": StepCache(
        shown="SeaCache", settings="SeaCacheConfig", **_threshold(1.0), options=_sea, alike=True
    ),
    "mag_cache": StepCache(
        shown="MagCache",
        settings="MagCacheConfig",
        **_threshold(0.5),
        options=lambda pipe, steps: {"num_inference_steps": steps},
        calibrated=True,
    ),
    "taylorseer": StepCache(
        shown="TaylorSeer",
        settings="TaylorSeerCacheConfig",
        setting="disable_cache_before_step",
        span=lambda steps: (float(steps), 3.0),
        whole=True,
        fields=lambda value: {"disable_cache_before_step": value},
        options=_taylorseer,
        stages=[{"cache_interval": n} for n in range(2, 9)],
    ),
    "pab": StepCache(
        shown="PAB",
        settings="PyramidAttentionBroadcastConfig",
        setting="largest timestep at which attention is reused",
        span=lambda steps: (100.0, 1001.0),
        fields=lambda value: {"spatial_attention_timestep_skip_range": (100, value)},
        options=lambda pipe, steps: _timestep(pipe),
        stages=[{"spatial_attention_block_skip_range": n} for n in (2, 3, 4, 6, 10)],
        unfit={WAN: _TWO_CALLS},
    ),
    "faster_cache": StepCache(
        shown="FasterCache",
        settings="FasterCacheConfig",
        setting="largest timestep at which attention and guidance are reused",
        span=lambda steps: (-1.0, 1001.0),
        fields=lambda value: {
            "spatial_attention_timestep_skip_range": (-1, value),
            "unconditional_batch_timestep_skip_range": (-1, value),
        },
        options=_faster,
        guided=True,
        unfit={WAN: "diffusers needs guidance in one batch; this model makes two calls"},
    ),
}
"""Step caches by name."""


def read_cache(text: str) -> tuple[StepCache, float | None]:
    """Return the cache of a name such as `sea_cache:0.3`, and the value of its setting, or None without a value.

    Raises:
        ValueError: an unknown name, or a value that is no number >= 0.
    """
    name, _, given = text.partition(":")
    if name not in CACHES:
        raise ValueError(f"cache={text!r}: must be none or one of {', '.join(CACHES)}")
    cache = CACHES[name]
    if not given:
        return cache, None
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf or (cache.whole and value != round(value)):
        kind = "a whole number" if cache.whole else "a number"
        raise ValueError(f"methods: {text!r}: {cache.setting} must be {kind} >= 0")
    return cache, value
