"""Load the pipeline to fine-tune, and move its encoders between devices."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dit_accel.files import model_source
from dit_accel.sampling.devices import DTYPES
from dit_accel.sampling.load import pipeline_class


def load_model(config: Any, device: torch.device) -> Any:
    """Load the pipeline without acceleration, with its transformer on `device` and all other models on the CPU.

    The VAE is loaded in fp32, the text encoders in the dtype of the computation, and the transformer in
    `config.weights_dtype`.

    Args:
        config: settings of the run (`FinetuneConfig`).
        device: device of the transformer.
    """
    compute = "fp32" if config.mixed_precision == "no" else config.mixed_precision
    source = model_source(config.pretrained_model_name_or_path)
    options = config.hub if config.variant is None else config.hub | {"variant": config.variant}
    pipe = pipeline_class(source, **config.hub).from_pretrained(
        source,
        sla=None,
        ras=None,
        dtype={
            "transformer": DTYPES[config.weights_dtype],
            "vae": torch.float32,
            "default": DTYPES[compute],
        },
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.to(device)
    return pipe


class Helpers:
    """Text encoders and VAE of a pipeline, moved to the device only while they are needed.

    Args:
        pipe: a pipeline. Its transformer is not moved.
        device: device on which the encoders run.
        stay: keep the encoders on the device, because every step encodes training samples.
    """

    def __init__(self, pipe: Any, device: torch.device, *, stay: bool) -> None:
        self.parts = [
            x
            for name, x in pipe.components.items()
            if isinstance(x, nn.Module) and name != "transformer"
        ]
        self.device, self.stay = device, stay
        if stay:
            self._move(device)

    def _move(self, device: torch.device | str) -> None:
        for part in self.parts:
            part.to(device)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Context manager that moves the encoders to the device, so that the whole pipeline can be called."""
        self._move(self.device)
        try:
            yield
        finally:
            if not self.stay:
                self._move("cpu")
