"""Region-adaptive sampling: schedule, selection, prediction, caches. Model-free."""

from dit_accel.ras.engine import ContextState, RegionAdaptiveSampling, StepRecord

__all__ = ["ContextState", "RegionAdaptiveSampling", "StepRecord"]
