"""`Attachment`: the processors, hooks and weights that methods have on one transformer."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from dit_accel.models import Family, Hook, TokenSelection, WholeTransformer, family_of, is_supported
from dit_accel.runtime.answers import answered_class, plain_class
from dit_accel.runtime.method import Host, Method
from dit_accel.runtime.parallel.switch import Parallelism, group_of, parallel_config_of
from dit_accel.runtime.processors import Processors, check_processors
from dit_accel.runtime.swap import WeightSwap


class Attachment:
    """Processors, hooks and weights of methods on one transformer. It keeps no reference to the transformer.

    Args:
        transformer: the transformer.
        methods: methods that are on.

    Raises:
        ValueError: the transformer or its processors are not supported, or a method refuses them.
    """

    def __init__(self, transformer: Any, methods: Iterable[Method]) -> None:
        self.methods = {x.name: x for x in sorted(methods, key=lambda x: -x.selection_rank)}
        needs_family = any(x.needs_family for x in self.methods.values())
        self.family: Family = family_of(transformer) if needs_family else WholeTransformer()
        self.selection = _selection_of(self.methods.values())
        """Selection and order of the tokens; None: all tokens in raster order."""
        self.parallel: Parallelism | None = None
        """Context parallelism that is followed; None if it is off."""
        self.parallel_switched = False
        """True if context parallelism was switched on or off since a run began."""
        self.processors = Processors()
        self._parallel_config: Any = None
        self._hooks: list[Any] = []
        self._selection_hooks: list[tuple[str, Hook]] = []
        self.layers = self.family.self_attention(transformer)
        if self._uses_attention:
            check_processors(self.family, self.modules(transformer))
        self.check_methods(transformer)

    def host(self, transformer: Any) -> Host:
        """Return the description of the transformer that methods get."""
        methods = tuple(self.methods.values())
        return Host(transformer, self.family, self.layers, methods, self.selection)

    def check_methods(self, transformer: Any) -> None:
        """Ask each method whether it works on this transformer, beside the other methods.

        Raises:
            ValueError: a method does not.
        """
        for method in self.methods.values():
            others = [x for x in self.methods.values() if x is not method]
            method.check(transformer, others)

    def modules(self, transformer: Any) -> dict[str, Any]:
        """Return by name the attention modules whose processors are replaced."""
        modules = {name: x.module for name, x in self.layers.items()}
        keeps = self.selection is not None and self.selection.keeps
        if keeps or self.family.exchanging_cross_attention:
            modules |= self.family.cross_attention(transformer)
        return modules

    @property
    def swaps(self) -> list[WeightSwap]:
        """Weight swaps of the methods."""
        return [x.swap for x in self.methods.values() if x.swap is not None]

    @property
    def seen_selection(self) -> TokenSelection | None:
        """Token selection that the hooks of the family see."""
        return self.selection if self.parallel is None else self.parallel.selection

    @property
    def _uses_attention(self) -> bool:
        return any(x.uses_attention for x in self.methods.values())

    @property
    def _changes_parameters(self) -> bool:
        return bool(self.swaps) or any(x.modules for x in self.methods.values())

    # Putting on and taking off ----------------------------------------------------------------------

    def put_on(self, transformer: Any, owner: Any) -> None:
        """Install everything on the transformer.

        Args:
            transformer: the transformer.
            owner: object whose `before_forward` and `after_forward` become hooks of the transformer.
        """
        for swap in self.swaps:
            swap.put_in(transformer)
        if self._uses_attention:
            self._put_processors(transformer)
        # diffusers requires a plan to switch context parallelism on. An empty one is enough: the family's hooks
        # do the work of the plan.
        if is_supported(transformer) and transformer._cp_plan is None:
            transformer._cp_plan = {}
        host = self.host(transformer)
        for method in self.methods.values():
            method.attach(host)
        if self._changes_parameters:
            _reapply_group_offloading(transformer)
        self._hooks = [
            transformer.register_forward_pre_hook(owner.before_forward, with_kwargs=True),
            transformer.register_forward_hook(owner.after_forward, always_call=True),
        ]
        self._selection_hooks = self._hook_selection(transformer)
        self.follow_parallelism(transformer)
        if any(x.may_answer for x in self.methods.values()):
            cls: Any = type(transformer)
            transformer.__class__ = answered_class(cls)

    def take_off(
        self, transformer: Any, *, keep: Collection[WeightSwap] = (), ends: bool = True
    ) -> None:
        """Undo `put_on`. Processors that were set since then stay.

        Args:
            transformer: the transformer.
            keep: weight swaps whose values stay in the transformer.
            ends: whether acceleration ends. False if other methods are put on at once.

        Raises:
            RuntimeError: weights cannot be put back (see `WeightSwap`). Nothing is taken off then.
        """
        for swap in self.swaps:
            if swap not in keep:
                swap.take_out(transformer)
        transformer.__class__ = plain_class(type(transformer))
        for hook in [*self._hooks, *(x for _, x in self._selection_hooks)]:
            hook.remove()
        for method in self.methods.values():
            method.detach()
        if self._changes_parameters:
            _reapply_group_offloading(transformer)
        if self.parallel is not None:
            self.parallel.remove(transformer, self.layers, ends=ends)
            self.parallel = self._parallel_config = None
        if vars(transformer).get("_cp_plan") == {}:
            del transformer._cp_plan
        self.processors.take_off(transformer, self.modules(transformer))

    def _put_processors(self, transformer: Any) -> None:
        self.processors.put_on(self.family, self.modules(transformer), self.layers)

    def _hook_selection(self, transformer: nn.Module) -> list[tuple[str, Hook]]:
        """Register the family's hooks. Return them with the names of their modules."""
        selection = self.seen_selection
        if selection is None:
            return []
        names = {module: name for name, module in transformer.named_modules()}
        return [(names[x.module], x) for x in self.family.hooks(transformer, selection)]

    def _renew_selection_hooks(self, transformer: nn.Module) -> None:
        for _, hook in self._selection_hooks:
            hook.remove()
        self._selection_hooks = self._hook_selection(transformer)

    # Changes of the transformer since then ----------------------------------------------------------

    def follow_modules(self, transformer: nn.Module) -> None:
        """Move the hooks to the present modules: adapters such as LoRA wrap modules in others."""
        hooks = self._selection_hooks
        if any(transformer.get_submodule(name) is not x.module for name, x in hooks):
            self._renew_selection_hooks(transformer)

    def follow_parallelism(self, transformer: Any) -> None:
        """Take over the context parallelism of diffusers if it was switched on or off.

        Raises:
            ValueError: acceleration does not support this kind of parallelism.
        """
        config = parallel_config_of(transformer, self.layers)
        if config is self._parallel_config:
            return
        group = None if config is None else group_of(config)
        if group is not None and not self._uses_attention:
            self._learn_family(transformer)
        if self.parallel is not None:
            self.parallel.remove(transformer, self.layers)
            self.processors.clear_exchange()
        self.parallel = None
        if group is not None and self.processors.by_name:
            self.parallel = Parallelism(transformer, group, self.selection, self.layers)
        self._parallel_config, self.parallel_switched = config, True
        self._renew_selection_hooks(transformer)

    def _learn_family(self, transformer: Any) -> None:
        """Install processors for context parallelism on a supported model, although no method needs them.

        The processors of diffusers accept fewer sizes, and some do not support context parallelism.
        """
        if not self.processors.by_name and is_supported(transformer):
            self.family = family_of(transformer)
            self.layers = self.family.self_attention(transformer)
            check_processors(self.family, self.modules(transformer))
            self._put_processors(transformer)


def _selection_of(methods: Iterable[Method]) -> TokenSelection | None:
    """Return the token selection of the method with the highest rank."""
    candidates = [x for x in methods if x.selection is not None]
    return max(candidates, key=lambda x: x.selection_rank).selection if candidates else None


def _reapply_group_offloading(transformer: nn.Module) -> None:
    """Tell diffusers' group offloading about changed parameters: with streams it keeps those that it has seen."""
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    hooks = (x.get_hook("group_offloading") for x in registries if x is not None)
    hook = next((x for x in hooks if x is not None), None)
    # Skipped with offload_to_disk_path: files written before would be read under the names of other parameters.
    if hook is not None and hook.config.offload_to_disk_path is None:
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        _maybe_remove_and_reapply_group_offloading(transformer)
