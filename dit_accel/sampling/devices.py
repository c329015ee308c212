"""Device and dtype of a command, with "auto" resolved."""

import os

import torch

from dit_accel.sampling.settings import Dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_name(device: str = "auto") -> str:
    """Return the name of the device of this process.

    "auto" is the GPU if there is one, else the CPU. Under torchrun, which sets LOCAL_RANK, "cuda" becomes the GPU of
    that number, so that each process uses its own GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local else device


def pick_device(device: str = "auto") -> torch.device:
    """Return the device that `device_name` names.

    Raises:
        ValueError: the name is not a device, or the device is not available.
    """
    try:
        place = torch.device(device_name(device))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device={device!r}: not available ({reason}); must be 'auto', 'cpu', or a GPU of this machine "
            "such as 'cuda' or 'cuda:1'"
        ) from None
    return place


def pick_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights. "auto" is bf16 on a GPU and fp32 elsewhere.

    Raises:
        ValueError: the name is unknown.
    """
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" else "fp32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
