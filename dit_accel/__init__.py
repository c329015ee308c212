"""dit_accel: diffusion transformers several times cheaper, without leaving diffusers.

Importing it loads torch at most; pipelines, kernels and the command line load at first use.
"""

from typing import TYPE_CHECKING

from dit_accel.lazy import lazy_names

if TYPE_CHECKING:
    from dit_accel.checkpoint.save_load import save_sla as save_sla
    from dit_accel.config import KVConfig as KVConfig
    from dit_accel.config import PrefillConfig as PrefillConfig
    from dit_accel.config import RASConfig as RASConfig
    from dit_accel.config import SLAConfig as SLAConfig
    from dit_accel.control import disable as disable
    from dit_accel.control import enable as enable
    from dit_accel.control import load_sla as load_sla
    from dit_accel.control import sampling_loop as sampling_loop
    from dit_accel.control import summary as summary
    from dit_accel.memory import estimate_memory as estimate_memory
    from dit_accel.pipelines.cogvideox import SparseCogVideoXPipeline as SparseCogVideoXPipeline
    from dit_accel.pipelines.flux import SparseFluxPipeline as SparseFluxPipeline
    from dit_accel.pipelines.hunyuan_video import (
        SparseHunyuanVideoPipeline as SparseHunyuanVideoPipeline,
    )
    from dit_accel.pipelines.ltx import SparseLTXPipeline as SparseLTXPipeline
    from dit_accel.pipelines.lumina import SparseLuminaPipeline as SparseLuminaPipeline
    from dit_accel.pipelines.lumina2 import SparseLumina2Pipeline as SparseLumina2Pipeline
    from dit_accel.pipelines.qwenimage import SparseQwenImagePipeline as SparseQwenImagePipeline
    from dit_accel.pipelines.sd3 import (
        SparseStableDiffusion3Pipeline as SparseStableDiffusion3Pipeline,
    )
    from dit_accel.pipelines.wan import SparseWanPipeline as SparseWanPipeline
    from dit_accel.pipelines.wan_i2v import (
        SparseWanImageToVideoPipeline as SparseWanImageToVideoPipeline,
    )
    from dit_accel.pipelines.wan_vace import SparseWanVACEPipeline as SparseWanVACEPipeline
    from dit_accel.runtime.parallel.enable import enable_parallelism as enable_parallelism

__version__ = "0.1.0"

_HOMES = {
    "KVConfig": "dit_accel.config",
    "PrefillConfig": "dit_accel.config",
    "RASConfig": "dit_accel.config",
    "SLAConfig": "dit_accel.config",
    "SparseCogVideoXPipeline": "dit_accel.pipelines.cogvideox",
    "SparseHunyuanVideoPipeline": "dit_accel.pipelines.hunyuan_video",
    "SparseLTXPipeline": "dit_accel.pipelines.ltx",
    "SparseFluxPipeline": "dit_accel.pipelines.flux",
    "SparseLumina2Pipeline": "dit_accel.pipelines.lumina2",
    "SparseLuminaPipeline": "dit_accel.pipelines.lumina",
    "SparseQwenImagePipeline": "dit_accel.pipelines.qwenimage",
    "SparseStableDiffusion3Pipeline": "dit_accel.pipelines.sd3",
    "SparseWanImageToVideoPipeline": "dit_accel.pipelines.wan_i2v",
    "SparseWanPipeline": "dit_accel.pipelines.wan",
    "SparseWanVACEPipeline": "dit_accel.pipelines.wan_vace",
    "disable": "dit_accel.control",
    "enable": "dit_accel.control",
    "enable_parallelism": "dit_accel.runtime.parallel.enable",
    "estimate_memory": "dit_accel.memory",
    "load_sla": "dit_accel.control",
    "sampling_loop": "dit_accel.control",
    "save_sla": "dit_accel.checkpoint.save_load",
    "summary": "dit_accel.control",
}

__all__ = [*_HOMES, "__version__"]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
