"""The demo: procedural clips and stills, three tiny models trained on them (Wan, Stable Diffusion 3 and
Lumina-Image 2.0), and a judge that is not the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_accel.lazy import lazy_names

if TYPE_CHECKING:
    from .config import IMAGE_SAMPLING as IMAGE_SAMPLING
    from .config import SAMPLING as SAMPLING
    from .config import ImageTrainConfig as ImageTrainConfig
    from .config import Lumina2TrainConfig as Lumina2TrainConfig
    from .config import TrainConfig as TrainConfig
    from .config import default_sampling as default_sampling
    from .dataset import ShapesDataset as ShapesDataset
    from .dataset import make_data as make_data
    from .image.trainer import train_image as train_image
    from .judge import judge_clips as judge_clips
    from .report import check_judged as check_judged
    from .report import judge_pipeline as judge_pipeline
    from .report import write_report as write_report
    from .shape_judge import load_shape_judge as load_shape_judge
    from .shape_judge import train_shape_judge as train_shape_judge
    from .trainer import train as train

_HOMES = {
    "IMAGE_SAMPLING": "dit_accel.demo.config",
    "ImageTrainConfig": "dit_accel.demo.config",
    "Lumina2TrainConfig": "dit_accel.demo.config",
    "SAMPLING": "dit_accel.demo.config",
    "ShapesDataset": "dit_accel.demo.dataset",
    "TrainConfig": "dit_accel.demo.config",
    "check_judged": "dit_accel.demo.report",
    "default_sampling": "dit_accel.demo.config",
    "judge_clips": "dit_accel.demo.judge",
    "judge_pipeline": "dit_accel.demo.report",
    "load_shape_judge": "dit_accel.demo.shape_judge",
    "make_data": "dit_accel.demo.dataset",
    "train": "dit_accel.demo.trainer",
    "train_image": "dit_accel.demo.image.trainer",
    "train_shape_judge": "dit_accel.demo.shape_judge",
    "write_report": "dit_accel.demo.report",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
