"""The demo: procedural clips and stills, a tiny Wan and a tiny Stable Diffusion 3 trained on them, and
a judge that is not the model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import IMAGE_SAMPLING as IMAGE_SAMPLING
    from .config import SAMPLING as SAMPLING
    from .config import ImageTrainConfig as ImageTrainConfig
    from .config import TrainConfig as TrainConfig
    from .dataset import ShapesDataset as ShapesDataset
    from .dataset import make_data as make_data
    from .image.trainer import train_image as train_image
    from .judge import judge_clips as judge_clips
    from .report import judge_pipeline as judge_pipeline
    from .report import write_report as write_report
    from .shape_judge import load_shape_judge as load_shape_judge
    from .shape_judge import train_shape_judge as train_shape_judge
    from .trainer import train as train

_HOME = {
    "IMAGE_SAMPLING": "config",
    "ImageTrainConfig": "config",
    "SAMPLING": "config",
    "ShapesDataset": "dataset",
    "TrainConfig": "config",
    "judge_clips": "judge",
    "judge_pipeline": "report",
    "load_shape_judge": "shape_judge",
    "make_data": "dataset",
    "train": "trainer",
    "train_image": "image.trainer",
    "train_shape_judge": "shape_judge",
    "write_report": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
