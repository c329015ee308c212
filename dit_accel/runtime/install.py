"""`Session`: one transformer's acceleration, and what of it hangs on the transformer."""

from typing import Any

import torch
from torch import nn

from dit_accel.config import RASConfig, SLAConfig
from dit_accel.models import Family, Hook, by_name
from dit_accel.ras import RegionAdaptiveSampling
from dit_accel.runtime.clock import Clock
from dit_accel.sla import Reordered, SparseAttention


class Session:
    """One transformer's acceleration: the processors put in, the hooks, and what they share."""

    def __init__(
        self, pipe: Any, family: Family, *, ras: RASConfig | None, sla: SLAConfig | None
    ) -> None:
        transformer = self.transformer = pipe.transformer
        self.family = family
        self.layers = family.self_attention(transformer)
        self.cross = family.cross_attention(transformer) if ras is not None else {}
        self._check(transformer, ras, sla)
        self.clock = Clock(pipe)
        self.sla = None if sla is None else SparseAttention(sla, self.layers)
        self.ras = None if ras is None else self._region_adaptive(ras)
        self.reordered: Reordered | None = None
        if sla is not None and sla.order != "raster" and ras is None:
            self.reordered = Reordered()
        self._focus = self.ras or self.reordered
        for name, layer in self.layers.items():
            processor = family.processor(layer.module.processor)
            if self.sla is not None:
                processor.attend = self.sla.layers[name]
            if self.ras is not None:
                processor.kv_store = self.ras.stores[name]
            layer.module.set_processor(processor)
        if self.sla is not None and self.sla.config.has_weights:
            self.sla.attach()
            _reapply_group_offloading(transformer)
        for module in self.cross.values():
            module.set_processor(family.cross_processor(module.processor))
        self._installed = {name: module.processor for name, module in self._modules()}
        self._hooks = [
            transformer.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            transformer.register_forward_hook(self.after_forward, always_call=True),
        ]
        self._focus_hooks = self._hook_focus(transformer)

    def _region_adaptive(self, config: RASConfig) -> RegionAdaptiveSampling:
        """Under sparse attention it selects whole query blocks, in sparse attention's token order."""
        if self.sla is None:
            return RegionAdaptiveSampling(config, self.layers)
        sla = self.sla
        ras = RegionAdaptiveSampling(config, self.layers, tile=sla.tile, order=sla.order)
        if sla.config.has_weights:
            for name, store in ras.stores.items():
                store.feature_map = sla.config.feature_map
                sla.layers[name].store = store
        return ras

    def _hook_focus(self, transformer: nn.Module) -> list[tuple[str, Hook]]:
        """The hooks that gather and complete, by the names of their modules."""
        if self._focus is None:
            return []
        names = {module: name for name, module in transformer.named_modules()}
        return [(names[x.module], x) for x in self.family.hooks(transformer, self._focus)]

    def _follow_modules(self, transformer: nn.Module) -> None:
        """Adapters such as LoRA put modules of their own around those that have our hooks."""
        if any(transformer.get_submodule(name) is not x.module for name, x in self._focus_hooks):
            for _, hook in self._focus_hooks:
                hook.remove()
            self._focus_hooks = self._hook_focus(transformer)

    @property
    def ras_config(self) -> RASConfig | None:
        return None if self.ras is None else self.ras.config

    @property
    def sla_config(self) -> SLAConfig | None:
        return None if self.sla is None else self.sla.config

    def _modules(self) -> list[tuple[str, Any]]:
        return [(name, x.module) for name, x in self.layers.items()] + list(self.cross.items())

    def _check(self, transformer: Any, ras: RASConfig | None, sla: SLAConfig | None) -> None:
        for name, module in self._modules():
            kind = type(module.processor).__name__
            if kind not in self.family.stock_processors:
                raise ValueError(
                    f"pipe.transformer.{name}: processor {kind}; accepted: {', '.join(self.family.stock_processors)} "
                    "(restore it before enable)"
                )
        if self._context_parallel(transformer):
            raise ValueError(
                "pipe.transformer: context parallelism is on; accepted: a single device"
            )
        if ras is not None and getattr(transformer, "is_cache_enabled", False):
            raise ValueError(
                "ras: a step cache of diffusers is on, and both decide what a step computes; "
                "call pipe.transformer.disable_cache() first"
            )
        if ras is not None and sla is not None and ras.kv_cache != "full":
            raise ValueError(f"kv_cache={ras.kv_cache!r}: accepted with sparse attention is 'full'")

    def _context_parallel(self, transformer: Any) -> bool:
        config = getattr(transformer, "_parallel_config", None)
        return getattr(config, "context_parallel_config", None) is not None or any(
            getattr(module.processor, "_parallel_config", None) is not None
            for _, module in self._modules()
        )

    @torch.compiler.disable
    def before_forward(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the transformer."""
        self._follow_modules(transformer)
        arguments = by_name(transformer, args, kwargs)
        call = self.family.call(transformer, arguments)
        if self.clock.tick(transformer, call.context, call.variant):
            self._begin_run(transformer)
        grid = self.family.token_grid(transformer, call.hidden_states)
        if self.sla is not None:
            device = call.hidden_states.device
            self.sla.begin_step(self.clock.step, self.clock.num_steps, grid, device)
            if self.reordered is not None:
                self.reordered.begin_call(call, self.sla.order(grid, device))
        if self.ras is not None:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "ras: gradients are on, and cached tokens have none: run under torch.no_grad(), or "
                    "disable() first"
                )
            guidance = bool(getattr(self.clock.pipe, "do_classifier_free_guidance", True))
            contexts = 2 if guidance and self.family.separate_guidance else 1
            self.ras.begin_call(self.clock, call, grid, contexts)
        if self._focus is not None:
            focused = self.family.focus_inputs(self._focus, arguments)
            if focused is not arguments:
                return (), focused
        return None

    def _begin_run(self, transformer: Any) -> None:
        for name, module in self._modules():
            if module.processor is not self._installed[name]:
                raise RuntimeError(
                    f"the processor of {name} was changed after enable: call disable() first"
                )
        if self._context_parallel(transformer):
            raise RuntimeError(
                "context parallelism was switched on after enable, and splits the tokens that acceleration "
                "needs: call disable() first"
            )
        if self.sla is not None:
            self.sla.reset()
        if self.ras is not None:
            if getattr(transformer, "is_cache_enabled", False):
                raise RuntimeError(
                    "a step cache of diffusers was switched on after enable(ras=...), and both decide what a "
                    "step computes: call pipe.transformer.disable_cache() or disable() first"
                )
            self.ras.reset()

    @torch.compiler.disable
    def after_forward(self, transformer: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the transformer, called after a failure too."""
        if self.reordered is not None:
            self.reordered.end_call()
        if self.sla is not None:
            self.sla.end_step()
        if self.ras is None:
            return
        for module in self.cross.values():
            if hasattr(module.processor, "text"):
                module.processor.text = None
        self.ras.end_call(self.clock, failed=output is None)

    def remove(self) -> None:
        """Put back what was there; processors that somebody else set stay."""
        for hook in [*self._hooks, *(x for _, x in self._focus_hooks)]:
            hook.remove()
        if self.sla is not None and self.sla.config.has_weights:
            self.sla.detach()
            _reapply_group_offloading(self.transformer)
        for name, module in self._modules():
            ours = self._installed[name]
            if module.processor is ours:
                if hasattr(ours, "_attention_backend"):
                    ours.stock._attention_backend = ours._attention_backend
                module.set_processor(ours.stock)


def _reapply_group_offloading(transformer: nn.Module) -> None:
    """Parameters came or went, and diffusers' group offloading with streams knows those that it has seen."""
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    hooks = (x.get_hook("group_offloading") for x in registries if x is not None)
    hook = next((x for x in hooks if x is not None), None)
    # Files that it has written before would be read under the names of other parameters.
    if hook is not None and hook.config.offload_to_disk_path is None:
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        _maybe_remove_and_reapply_group_offloading(transformer)
