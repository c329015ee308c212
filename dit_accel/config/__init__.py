"""Settings of the methods: frozen, validated dataclasses with presets and YAML files.

Imports no other module of dit_accel.
"""

from dit_accel.config.base import OFF, num_steps_of
from dit_accel.config.kvcache import KVConfig
from dit_accel.config.prefill import PrefillConfig
from dit_accel.config.ras import RASConfig
from dit_accel.config.sla import SLAConfig

__all__ = ["OFF", "KVConfig", "PrefillConfig", "RASConfig", "SLAConfig", "num_steps_of"]
