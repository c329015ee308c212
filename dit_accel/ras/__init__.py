"""Region-adaptive sampling: schedule, token selection, prediction and caches. Independent of models."""

from dit_accel.ras.context import ContextState
from dit_accel.ras.engine import RegionAdaptiveSampling
from dit_accel.ras.records import StepRecord

__all__ = ["ContextState", "RegionAdaptiveSampling", "StepRecord"]
