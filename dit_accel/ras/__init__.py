"""Region-adaptive sampling: schedule, selection, prediction, caches. Model-free."""

from dit_accel.ras.context import ContextState
from dit_accel.ras.engine import RegionAdaptiveSampling
from dit_accel.ras.records import StepRecord

__all__ = ["ContextState", "RegionAdaptiveSampling", "StepRecord"]
