"""The option `--quantize`: quantised weights of the transformers."""

import importlib.util
from typing import Any

from dit_accel.runtime.components import TRANSFORMERS

QUANTIZED = {
    "torchao:int8": "Int8WeightOnlyConfig",
    "torchao:int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
    "torchao:float8": "Float8WeightOnlyConfig",
}
"""Config class of torchao for each name: 8-bit integer weights, 8-bit integer weights and layer inputs, 8-bit float weights.
All of them also run on a CPU."""


def check_quantize(name: str) -> None:
    """Check a name before the model is loaded.

    Args:
        name: "none" or a key of `QUANTIZED`.

    Raises:
        ValueError: the name is unknown.
        ImportError: torchao is not installed.
    """
    if name == "none":
        return
    if name not in QUANTIZED:
        raise ValueError(f"quantize={name!r}: must be one of none, {', '.join(QUANTIZED)}")
    if importlib.util.find_spec("torchao") is None:
        raise ImportError(
            f"quantize={name!r}: needs the package torchao; pip install 'dit-accel[quant]'"
        )


def loading_arguments(name: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load the transformers quantised.

    Args:
        name: a name that `check_quantize` accepts.
    """
    if name == "none":
        return {}
    import torchao.quantization
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    config: Any = TorchAoConfig(getattr(torchao.quantization, QUANTIZED[name])())
    mapping = dict.fromkeys(TRANSFORMERS, config)
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


def quantized_as(transformer: Any) -> str | None:
    """Return the quantisation of a transformer: a key of `QUANTIZED`, or the name of another method. None: not quantised."""
    config = getattr(getattr(transformer, "hf_quantizer", None), "quantization_config", None)
    if config is None:
        return None
    kind = type(getattr(config, "quant_type", None)).__name__
    return next((name for name, x in QUANTIZED.items() if x == kind), str(config.quant_method))
