"""`WeightSwap`: temporary values for the weights of a transformer, while a method is on."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.runtime.weights import PLAIN

Change = Callable[[Tensor], Tensor]
"""Function that returns the new value of a weight, given the present value, which it must not modify."""
WRAPPED = ("base_layer", "_orig_mod")
"""Names of the submodules in which PEFT and torch.compile keep the wrapped module."""
INSTEAD = (
    "or a repository with the other weights in it (merged/ of dit-accel finetune, or what save_pretrained of a "
    "pipeline with them writes)"
)


class WeightSwap:
    """Values for weights of a transformer that can be put in and taken out.

    Parameters stay the same objects. Their `data` is exchanged, in their present dtype and on their present device. The
    values that are not in the transformer are kept on the CPU.

    Args:
        changes: function of the transformer, called before values are put in for the first time. It returns changes by
            the name of the weight, or raises ValueError if they do not fit.
        digest: hash of the values, for records.
    """

    def __init__(
        self, changes: Callable[[nn.Module], Mapping[str, Change]], *, digest: str = ""
    ) -> None:
        self.digest = digest
        self.is_in = False
        self._changes: Callable[[nn.Module], Mapping[str, Change]] | None = changes
        self._outside: dict[str, Tensor] = {}
        """Values by name that are not in the transformer. While `is_in`, these are the original values."""

    @property
    def originals(self) -> Mapping[str, Tensor]:
        """Original values by name; empty while the transformer has them."""
        return self._outside if self.is_in else {}

    def check(self, transformer: nn.Module) -> None:
        """Refuse a transformer whose weights cannot be exchanged. `put_in` checks the same the first time.

        Raises:
            ValueError: projections are fused, a LoRA is fused, or group offloading holds the weights on a disk.
        """
        for name, module in transformer.named_modules():
            where = f"transformer.{name}" if name else "transformer"
            if getattr(module, "fused_projections", False):
                raise ValueError(
                    f"{where}: projections are fused; accepted are separate ones (unfuse_qkv_projections(), or load the "
                    f"model again), {INSTEAD}"
                )
            if getattr(module, "merged_adapters", None):
                raise ValueError(
                    f"{where}: a LoRA is fused into the weights; accepted after unfuse_lora(), {INSTEAD}"
                )
        if problem := _obstacle(transformer, {}, ()):
            raise ValueError(f"{problem}, {INSTEAD}")

    def put_in(self, transformer: nn.Module) -> None:
        """Put the values in, if they are not in. If this fails, the transformer is unchanged.

        Raises:
            ValueError: the values do not fit, `check` refuses the transformer, or weights are quantised, sharded or
                offloaded.
        """
        if self.is_in:
            return
        weights = dict(plain_weights(transformer))
        if self._changes is None:  # the values were in before
            changes = {name: _value(x) for name, x in self._outside.items()}
        else:
            self.check(transformer)
            changes = dict(self._changes(transformer))
        if problem := _obstacle(transformer, weights, changes):
            raise ValueError(f"{problem}, {INSTEAD}")
        with _nothing_fused(transformer):
            self._exchange(weights, changes)
            # The sources of the values can be freed, because `_outside` holds the values from now on.
            self.is_in, self._changes = True, None

    def take_out(self, transformer: nn.Module) -> None:
        """Put the original values back, if they are out. If this fails, the transformer is unchanged.

        LoRA weights and projections that were fused in the meantime are fused again with the original values.

        Raises:
            RuntimeError: weights were quantised, sharded or offloaded since, so that they cannot be exchanged.
        """
        if not self.is_in:
            return
        weights = dict(plain_weights(transformer))
        if problem := _obstacle(transformer, weights, self._outside):
            raise RuntimeError(f"changed after enable, weights cannot be put back: {problem}")
        with _nothing_fused(transformer):
            # In reverse order, because two names may refer to one tensor.
            originals = reversed(self._outside.items())
            self._exchange(weights, {name: _value(x) for name, x in originals})
            self.is_in = False

    def _exchange(self, weights: Mapping[str, Tensor], changes: Mapping[str, Change]) -> None:
        """Change the weights one by one, so that no device holds all of them twice."""
        done: list[str] = []
        try:
            for name, change in changes.items():
                self._change(name, weights[name], change)
                done.append(name)
        except BaseException:
            for name in reversed(done):
                self._change(name, weights[name], _value(self._outside[name]))
            raise

    @torch.no_grad()
    def _change(self, name: str, x: Tensor, change: Change) -> None:
        # `data` of an inference tensor must be an inference tensor, and the other way round.
        with torch.inference_mode(x.is_inference()):
            new, before = change(x.data), x.data.cpu()
            self._outside[name], x.data = before, new


def plain_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers with the names that they have without wrappers and adapters."""
    for name in WRAPPED:
        if isinstance(inner := module._modules.get(name), nn.Module):
            yield from plain_weights(inner, prefix)
            return
    for name, x in (*module._parameters.items(), *module._buffers.items()):
        if x is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, x
    for name, child in module._modules.items():
        if child is not None:
            yield from plain_weights(child, f"{prefix}{name}.")


def _obstacle(
    transformer: nn.Module, weights: Mapping[str, Tensor], names: Iterable[str]
) -> str | None:
    """Return why weights cannot be exchanged, with a remedy; None if they can be.

    Args:
        transformer: the transformer.
        weights: weights of the transformer by name.
        names: names of the weights to exchange.
    """
    for name, module in transformer.named_modules():
        if _offloads_to_disk(module):
            return f"transformer.{name}: group offloading to a disk holds the weights; accepted without it"
    for name in names:
        x = weights.get(name)
        if x is None:
            return f"transformer.{name}: the weight does not exist any more; accepted is the unchanged transformer"
        if x.device.type == "meta":
            return (
                f"transformer.{name}: sequential offloading holds the weight elsewhere; accepted after "
                "remove_all_hooks() of the pipeline (enable_model_cpu_offload works)"
            )
        if type(x) not in PLAIN or not x.is_floating_point():
            return f"transformer.{name}: quantised or sharded ({type(x).__name__}, {x.dtype}); accepted are plain weights"
    return None


def _offloads_to_disk(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("group_offloading")
    return getattr(getattr(hook, "config", None), "offload_to_disk_path", None) is not None


@contextlib.contextmanager
def _nothing_fused(transformer: nn.Module) -> Iterator[None]:
    """Context manager that unfuses LoRA weights while it is active. At its end, projections are fused again."""
    layers: list[Any] = [x for x in transformer.modules() if getattr(x, "merged_adapters", None)]
    names = [list(layer.merged_adapters) for layer in layers]
    for layer in layers:
        layer.unmerge()
    try:
        yield
    finally:
        for layer, adapters in zip(layers, names, strict=True):
            layer.merge(adapter_names=adapters)
    fused: list[Any] = [x for x in transformer.modules() if getattr(x, "fused_projections", False)]
    for module in fused:
        if hasattr(module, "unfuse_projections"):
            module.unfuse_projections()
        module.fuse_projections()


def _value(x: Tensor) -> Change:
    """Return a change that sets a weight to this value."""
    return lambda old: x.to(old.device, old.dtype)
