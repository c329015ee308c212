"""Quantised weights of the transformer, for `--quantize`."""

import importlib.util
from typing import Any

from dit_accel.runtime.components import TRANSFORMERS

QUANTIZED = {
    "torchao:int8": "Int8WeightOnlyConfig",
    "torchao:int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
    "torchao:float8": "Float8WeightOnlyConfig",
}
"""Config classes of torchao by name: weights in 8-bit integers; weights and inputs of layers in 8-bit integers; weights in
8-bit floats. All run on a CPU too."""


def check_quantize(name: str) -> None:
    """Check a name before a model is loaded.

    Args:
        name: "none" or a key of `QUANTIZED`.

    Raises:
        ValueError: another name.
        ImportError: torchao is not installed.
    """
    if name == "none":
        return
    if name not in QUANTIZED:
        raise ValueError(f"quantize={name!r}: accepted are none, {', '.join(QUANTIZED)}")
    if importlib.util.find_spec("torchao") is None:
        raise ImportError(
            f"quantize={name!r}: needs the package torchao; pip install 'dit-accel[quant]'"
        )


def loading_arguments(name: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` with which the transformers are loaded quantised.

    Args:
        name: as in `check_quantize`, which comes first.
    """
    if name == "none":
        return {}
    import torchao.quantization
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    config: Any = TorchAoConfig(getattr(torchao.quantization, QUANTIZED[name])())
    mapping = dict.fromkeys(TRANSFORMERS, config)
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


def quantized_as(transformer: Any) -> str | None:
    """Return how a transformer is quantised: a key of `QUANTIZED`, or the name of another method; None if it is not."""
    config = getattr(getattr(transformer, "hf_quantizer", None), "quantization_config", None)
    if config is None:
        return None
    kind = type(getattr(config, "quant_type", None)).__name__
    return next((name for name, x in QUANTIZED.items() if x == kind), str(config.quant_method))
