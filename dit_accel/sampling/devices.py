"""The device and the dtype that a command computes with: the one place where "auto" is decided."""

import os

import torch

from dit_accel.sampling.settings import Dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_name(device: str = "auto") -> str:
    """Return the name of the device of this process.

    "auto" is the GPU where there is one, else the CPU. Under torchrun, which sets LOCAL_RANK, "cuda" is the
    GPU of that number, so that each process has a GPU of its own.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local else device


def pick_device(device: str = "auto") -> torch.device:
    """Return the device that `device_name` names.

    Raises:
        ValueError: it is no device, or not available here.
    """
    try:
        place = torch.device(device_name(device))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device={device!r}: not available here ({reason}); accepted are 'auto', 'cpu', or a GPU of this "
            "machine such as 'cuda' or 'cuda:1'"
        ) from None
    return place


def pick_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights; "auto" is bf16 on a GPU and fp32 elsewhere.

    Raises:
        ValueError: an unknown name.
    """
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" else "fp32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: accepted are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
