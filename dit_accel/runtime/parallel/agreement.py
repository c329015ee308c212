"""`Agreement`: check that the processes of context parallelism make the same calls."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel.models import Call
from dit_accel.runtime.method import Method
from dit_accel.runtime.parallel.group import Group
from dit_accel.runtime.run import Run


class Agreement:
    """State of the check: which calls the processes have compared already."""

    def __init__(self) -> None:
        self._outside: Group | None = None
        """Processes that have compared a call outside of sampling loops."""

    def reach(
        self,
        group: Group,
        run: Run | None,
        call: Call,
        methods: Mapping[str, Method],
        error: Exception | None,
    ) -> None:
        """Compare the call in all processes, if it is the first call of its context or a process failed.

        Args:
            group: the processes.
            run: run of the call; None if the call has none because of an error.
            call: the call.
            methods: methods that are on, by name.
            error: error of this process; None: no error.

        Raises:
            RuntimeError: the processes make different calls, or another process failed.
        """
        if error is None:
            assert run is not None
            if run.context.agreed or (self._outside is group and not run.in_loop):
                return
        description = {} if error is not None or run is None else describe_call(run, call, methods)
        group.agree(description, call.hidden_states.device, error)
        if run is not None:
            run.context.agreed = True
            if not run.in_loop:
                self._outside = group


def describe_call(run: Run, call: Call, methods: Mapping[str, Method]) -> dict[str, Any]:
    """Return the values that must be equal in all processes in the first call of a context, by name.

    Tensors are compared by a sum over their bits, because a difference in one bit can change which tokens and blocks are
    selected. Reading the sum waits for the device.
    """
    pipe = run.pipe
    description: dict[str, Any] = {"methods": ", ".join(methods)}
    for name, method in methods.items():
        config = getattr(method, "config", None)
        if config is not None:
            description |= {f"{name}.{field}": x for field, x in config.to_dict().items()}
    description |= {
        "step": run.step,
        "steps": run.num_steps,
        "first step": run.begin,
        "guidance_scale": getattr(pipe, "guidance_scale", None),
        "latents": _shape(call.hidden_states),
        "sum over the bits of the latents": _bits(call.hidden_states),
        "sum over the bits of the timesteps": None
        if run.timesteps is None
        else _bits(run.timesteps),
        "timestep": call.timestep.flatten().tolist()
        if isinstance(call.timestep, Tensor)
        else call.timestep,
        "gradients": "on" if torch.is_grad_enabled() else "off",
    }
    names = ("encoder_hidden_states", "encoder_hidden_states_image", "mask of the text")
    for name, x in zip(names, (call.context, call.images, call.mask), strict=True):
        if x is not None:
            description |= {name: f"{_shape(x)}, sum over the bits {_bits(x)}"}
    return description


def _shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _bits(x: Tensor) -> int:
    """Return a weighted sum over the bytes of a tensor, in integers, so that the order of summation does not matter."""
    words = x.detach().contiguous().view(torch.uint8).flatten().to(torch.int64)
    return int((words * (torch.arange(len(words), device=x.device) % 65521 + 1)).sum())
