"""Procedural clips and stills, training of the embedded models on them, and a judge of generated samples."""

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
    from .judge import judge_clips as judge_clips
    from .report import check_judged as check_judged
    from .report import judge_pipeline as judge_pipeline
    from .trainer import train as train

_NAMES = {
    "config": "IMAGE_SAMPLING SAMPLING ImageTrainConfig Lumina2TrainConfig TrainConfig default_sampling",
    "dataset": "ShapesDataset make_data",
    "judge": "judge_clips",
    "report": "check_judged judge_pipeline",
    "trainer": "train",
}
_HOMES = {x: f"{__name__}.{home}" for home, names in _NAMES.items() for x in names.split()}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
