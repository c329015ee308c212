"""`Installation`: the methods that accelerate one transformer, its processors and hooks, put on and taken off."""

import copy
import inspect
import math
import threading
import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.models import (
    FAMILIES,
    Call,
    Family,
    Focus,
    Hook,
    WholeTransformer,
    by_name,
    family_of,
    is_supported,
)
from dit_accel.models.attention import SparseProcessor
from dit_accel.runtime.answers import answered_class, plain_class
from dit_accel.runtime.caller import is_inside
from dit_accel.runtime.clock import Clock
from dit_accel.runtime.components import parts_of, transformers_of
from dit_accel.runtime.method import Host, Method
from dit_accel.runtime.parallel.agreement import describe_call
from dit_accel.runtime.parallel.group import Group
from dit_accel.runtime.parallel.switch import Parallelism, group_of, parallel_config_of
from dit_accel.runtime.run import Run
from dit_accel.runtime.swap import WeightSwap
from dit_accel.runtime.weights import lora_scale, weights_state


class Installation:
    """Acceleration installed on one transformer: its methods, processors and hooks.

    The transformer owns it, through its hooks. It knows no pipeline and keeps no reference to the
    transformer, so that a deleted model is free at once.
    """

    def __init__(self, transformer: Any, methods: Iterable[Method], clock: Clock) -> None:
        self.methods = {x.name: x for x in sorted(methods, key=lambda x: -x.focus_rank)}
        self.clock = clock
        needs_family = any(x.needs_family for x in self.methods.values())
        self.family = family_of(transformer) if needs_family else WholeTransformer()
        self.run: Run | None = None
        """The last run that methods were told about."""
        self._call: Call | None = None
        self._begun = False
        """True if the call in progress has begun and the transformer has not run yet."""
        self._said: set[str] = set()
        self._guard = threading.Lock()
        self._owner: threading.Thread | None = None
        self.focus = _focus_of(self.methods.values())
        """Focus that selects and orders the tokens; None: all of them, in raster order."""
        self._parallel_config: Any = None
        self._parallel: Parallelism | None = None
        self._switched = False
        """True if parallelism was switched since the last run began."""
        self._agreed = False
        """True if the processes of context parallelism have agreed on calls outside of any loop."""
        self._processors: dict[str, Any] = {}
        self._hooks: list[Any] = []
        self._focus_hooks: list[tuple[str, Hook]] = []
        self.layers = self.family.self_attention(transformer)
        self._check(transformer)
        before = [x for x in self.swaps if x.is_in]
        try:
            self._install(transformer)
        except BaseException:
            self.remove(transformer, keep=before, ends=False)
            raise

    # Putting on and taking off ----------------------------------------------------------------------

    def host(self, transformer: Any) -> Host:
        """The transformer, as methods see it."""
        return Host(transformer, self.family, self.layers, tuple(self.methods.values()), self.focus)

    def _check(self, transformer: Any) -> None:
        if self._uses_attention:
            _check_processors(self.family, self._modules(transformer))
        self._check_methods(transformer)

    @property
    def _uses_attention(self) -> bool:
        return any(x.uses_attention for x in self.methods.values())

    def _check_methods(self, transformer: Any) -> None:
        for method in self.methods.values():
            others = [x for x in self.methods.values() if x is not method]
            method.check(transformer, others)

    def _modules(self, transformer: Any) -> dict[str, Any]:
        """Attention modules by name: self-attention, and cross-attention where its processor is ours."""
        modules = {name: x.module for name, x in self.layers.items()}
        keeps = self.focus is not None and self.focus.keeps
        if keeps or self.family.exchanging_cross_attention:
            modules |= self.family.cross_attention(transformer)
        return modules

    def _install(self, transformer: Any) -> None:
        for swap in self.swaps:
            swap.put_in(transformer)
        if self._uses_attention:
            self._put_processors(transformer)
        # diffusers asks for a plan where context parallelism is switched on; ours are the hooks of the family.
        if is_supported(transformer) and transformer._cp_plan is None:
            transformer._cp_plan = {}
        host = self.host(transformer)
        for method in self.methods.values():
            method.attach(host)
        if self._changes_parameters:
            _reapply_group_offloading(transformer)
        self._hooks = [
            transformer.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            transformer.register_forward_hook(self.after_forward, always_call=True),
        ]
        self._focus_hooks = self._hook_focus(transformer)
        self.follow_parallelism(transformer)
        if any(x.may_answer for x in self.methods.values()):
            cls: Any = type(transformer)
            transformer.__class__ = answered_class(cls)

    def _put_processors(self, transformer: Any) -> None:
        for name, module in self._modules(transformer).items():
            stock = _stock(module.processor)
            ours = (
                self.family.processor(stock)
                if name in self.layers
                else self.family.cross_processor(stock)
            )
            module.set_processor(ours)
            self._processors[name] = ours

    def follow_parallelism(self, transformer: Any) -> None:
        """Take over what diffusers' context parallelism does, where it was switched on or off.

        Raises:
            ValueError: acceleration cannot follow it.
        """
        config = parallel_config_of(transformer, self.layers)
        if config is self._parallel_config:
            return
        group = None if config is None else group_of(config)
        if group is not None and not self._uses_attention:
            self._learn_family(transformer)
        if self._parallel is not None:
            self._parallel.remove(transformer, self.layers)
            for processor in self._processors.values():
                processor.exchange = None
        self._parallel = None
        if group is not None and self._processors:
            self._parallel = Parallelism(transformer, group, self.focus, self.layers)
        self._parallel_config, self._agreed, self._switched = config, False, True
        for _, hook in self._focus_hooks:
            hook.remove()
        self._focus_hooks = self._hook_focus(transformer)

    def _learn_family(self, transformer: Any) -> None:
        """Put our processors on a model that we know, though no method needs them: those of diffusers accept fewer sizes,
        and some do not know context parallelism."""
        if not self._processors and is_supported(transformer):
            self.family = family_of(transformer)
            self.layers = self.family.self_attention(transformer)
            _check_processors(self.family, self._modules(transformer))
            self._put_processors(transformer)

    def remove(
        self, transformer: Any, *, keep: Collection[WeightSwap] = (), ends: bool = True
    ) -> None:
        """Put back what was there; processors that somebody else set stay.

        Args:
            keep: values for weights that stay in the transformer.
            ends: whether acceleration ends. Else other methods take over at once.

        Raises:
            RuntimeError: weights cannot be put back (see `WeightSwap`). Then everything stays on.
        """
        for swap in self.swaps:
            if swap not in keep:
                swap.take_out(transformer)
        transformer.__class__ = plain_class(type(transformer))
        for hook in [*self._hooks, *(x for _, x in self._focus_hooks)]:
            hook.remove()
        for method in self.methods.values():
            method.detach()
        if self._changes_parameters:
            _reapply_group_offloading(transformer)
        if self._parallel is not None:
            self._parallel.remove(transformer, self.layers, ends=ends)
            self._parallel = self._parallel_config = None
        if vars(transformer).get("_cp_plan") == {}:
            del transformer._cp_plan
        stock = {id(x): x.release() for x in self._processors.values()}
        for name, module in self._modules(transformer).items():
            ours = self._processors.get(name)
            if ours is not None and module.processor is ours:
                module.set_processor(ours.stock)
        # Fusing projections notes the processors that it finds, and unfusing sets those.
        noted = getattr(transformer, "original_attn_processors", None)
        if isinstance(noted, dict) and any(id(x) in stock for x in noted.values()):
            transformer.original_attn_processors = {
                name: stock.get(id(x), x) for name, x in noted.items()
            }

    @property
    def swaps(self) -> list[WeightSwap]:
        """Other values for the transformer's weights that methods bring."""
        return [x.swap for x in self.methods.values() if x.swap is not None]

    @property
    def _changes_parameters(self) -> bool:
        return bool(self.swaps) or any(x.modules for x in self.methods.values())

    def _hook_focus(self, transformer: nn.Module) -> list[tuple[str, Hook]]:
        """The hooks that gather and complete, by the names of their modules."""
        focus = self._seen_focus
        if focus is None:
            return []
        names = {module: name for name, module in transformer.named_modules()}
        return [(names[x.module], x) for x in self.family.hooks(transformer, focus)]

    @property
    def _seen_focus(self) -> Focus | None:
        """Focus that the hooks of the family see."""
        return self.focus if self._parallel is None else self._parallel.focus

    def _follow_modules(self, transformer: nn.Module) -> None:
        """Adapters such as LoRA put modules of their own around those that have our hooks."""
        if any(transformer.get_submodule(name) is not x.module for name, x in self._focus_hooks):
            for _, hook in self._focus_hooks:
                hook.remove()
            self._focus_hooks = self._hook_focus(transformer)

    def __deepcopy__(self, memo: dict) -> "Installation":
        new = object.__new__(type(self))
        memo[id(self)] = new
        own = {
            "_guard": threading.Lock(),
            "_owner": None,
            "run": None,
            "_call": None,
            "_begun": False,
        }
        for name, value in vars(self).items():
            setattr(new, name, own[name] if name in own else copy.deepcopy(value, memo))
        return new

    def __reduce__(self) -> Any:
        raise TypeError(
            "an accelerated transformer cannot be pickled: call dit_accel.disable() first, or save it with "
            "save_pretrained"
        )

    # One call of the transformer --------------------------------------------------------------------

    def answer(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Begin a call. Return what it returns where a method answers it, else None: the transformer has to run."""
        if self._begun and self._owner is threading.current_thread():
            return None  # asked before, further out
        try:
            answer = self._begin_call(transformer, args, kwargs)
        except BaseException:
            self.after_forward(transformer, args, None)
            raise
        if answer is None:
            return None
        run = self.run
        assert run is not None
        try:
            if run.is_last_step:
                self._warn_if_idle(run)
        finally:
            self._leave()
        return answer

    @torch.compiler.disable
    def before_forward(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the transformer."""
        if not self._begun or self._owner is not threading.current_thread():
            # Not called through the class that asks for answers.
            self._begin_call(transformer, args, kwargs, must_run=True)
        self._begun = False
        focus = self._seen_focus
        if focus is not None:
            arguments = by_name(transformer, args, kwargs)  # hooks before this one may add some
            focused = self.family.focus_inputs(focus, arguments)
            if focused is not arguments:
                return (), focused
        return None

    def _begin_call(
        self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any], *, must_run: bool = False
    ) -> Any:
        """Tell the clock and the methods about a call; return the answer of a method, if one has any."""
        self._enter(transformer)
        self._follow_modules(transformer)
        try:
            self.follow_parallelism(transformer)
        except ValueError as refusal:
            raise RuntimeError(f"changed after enable: {refusal}") from None
        arguments = by_name(transformer, args, kwargs)
        group = None if self._parallel is None else self._parallel.group
        try:
            call = self.family.call(transformer, arguments)
        except Exception as refusal:
            if group is not None:  # others may be about to compare their first call with this one
                devices = (x.device for x in arguments.values() if isinstance(x, Tensor))
                group.agree({}, next(devices, torch.device("cpu")), refusal)
            raise
        call = self._call = replace(
            call,
            flops=partial(
                self._flops, transformer, math.prod(call.grid), call.text_length, call.token_flops
            ),
            form=arguments.get("return_dict"),
            must_run=must_run,
            processes=group,
        )
        error: Exception | None = None
        try:
            begins = self.clock.tick(transformer, call.timestep, call.conditions, call.variant)
            if begins:
                self._begin_run(transformer)
            elif self._switched and self.clock.run is not None and self.clock.run.in_loop:
                raise RuntimeError(
                    "transformer: context parallelism was switched in the middle of a run, and what this run has cached "
                    "is for other tokens and heads; accepted between runs"
                )
        except BaseException as failure:
            self.clock.forget()  # a run that did not begin: the next call begins one
            if group is None or not isinstance(failure, Exception):
                raise
            error = failure
        run, self._switched = self.clock.run, False
        self.run = run
        if group is not None:
            self._agree(group, run, call, error)
        assert run is not None
        self._notice_weights(transformer, run, arguments)
        for method in self.methods.values():
            answer = method.begin_call(run, call)
            if answer is not None:
                return answer
        if self._parallel is not None:
            self._parallel.focus.begin_call(call)
        self._warn_if_unscheduled(run)
        self._begun = True
        return None

    def _agree(self, group: Group, run: Run | None, call: Call, error: Exception | None) -> None:
        """Make sure that all processes are about to make the same call, where it is the first of its kind."""
        if error is None:
            assert run is not None
            if run.context.agreed or (self._agreed and not run.in_loop):
                return
        description = (
            {} if error is not None or run is None else describe_call(run, call, self.methods)
        )
        group.agree(description, call.hidden_states.device, error)
        if run is not None:
            run.context.agreed = True
            self._agreed = self._agreed or not run.in_loop

    def _flops(
        self, transformer: Any, tokens: int, text: int, token_flops: float, active: int
    ) -> float:
        return self.family.flops(transformer, active, tokens, text) + active * token_flops

    @torch.compiler.disable
    def after_forward(self, transformer: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook of the transformer, called after a failure too."""
        if self._owner is not threading.current_thread():
            return None  # the call of another thread, which `_enter` refused
        try:
            return self._end_call(output)
        finally:
            self._leave()

    def _leave(self) -> None:
        if self.run is not None:
            self.run.context = None  # type: ignore[assignment]
        self._call = self._owner = None
        self._begun = False

    def _end_call(self, output: Any) -> Any:
        for processor in self._processors.values():
            processor.text = None
        run, call, changed = self.run, self._call, None
        if run is None or call is None:
            return None
        for method in self.methods.values():
            new = method.end_call(run, call, output if changed is None else changed)
            changed = changed if new is None else new
        if output is not None and run.is_last_step:
            self._warn_if_idle(run)
        return changed

    def _enter(self, transformer: nn.Module) -> None:
        """One call at a time: what methods keep between their hooks belongs to one call."""
        me = threading.current_thread()
        with self._guard:
            owner = self._owner
            # A call that was interrupted (Ctrl-C) never ends; then its thread has left the transformer.
            if owner is not None and owner is not me and is_inside(owner, transformer):
                raise RuntimeError(
                    f"this accelerated transformer is in a call of thread {owner.name!r}: give each thread "
                    "a transformer of its own (copy.deepcopy), or let one wait for the other"
                )
            self._owner = me

    def _begin_run(self, transformer: Any) -> None:
        modules = self._modules(transformer)
        for name, ours in self._processors.items():
            if modules[name].processor is not ours:
                raise RuntimeError(
                    f"the processor of {name} was changed after enable: call disable() first"
                )
        self._check_again(transformer)
        assert self.clock.run is not None
        for method in self.methods.values():
            method.begin_run(self.clock.run)

    def _notice_weights(self, transformer: nn.Module, run: Run, arguments: dict[str, Any]) -> None:
        if not any(x.keeps_activations for x in self.methods.values()):
            return
        ours = {x for method in self.methods.values() for x in method.modules.values()}
        weights = (weights_state(transformer, leave_out=ours), lora_scale(arguments))
        if run.weights is not None and weights != run.weights:
            self._check_again(transformer)  # a step cache shows in the state too
            for method in self.methods.values():
                method.weights_changed(run)
        run.weights = weights

    def _check_again(self, transformer: nn.Module) -> None:
        try:
            self._check_methods(transformer)
        except ValueError as error:
            raise RuntimeError(f"changed after enable: {error}") from None

    def _warn_if_unscheduled(self, run: Run) -> None:
        """Warn once for each reason, at the first call of a run, where the schedule alone decides."""
        if run.unscheduled is not None:
            return
        found = {x.name: why for x in self.methods.values() if (why := x.unscheduled(run))}
        run.unscheduled = set(found)
        if self._is_new(f"{name}: {reason}" for name, (reason, _) in found.items()):
            text = "; ".join(f"{name}: {x} ({numbers})" for name, (x, numbers) in found.items())
            warnings.warn(
                f"dit_accel: the schedule of this run leaves nothing to do for {text}", stacklevel=2
            )

    def _warn_if_idle(self, run: Run) -> None:
        """Warn once for each reason, at the first call of a run's last step."""
        if run.idle_checked:
            return
        run.idle_checked = True
        why = {x.name: reason for x in self.methods.values() if (reason := x.idle(run))}
        said = run.unscheduled or set()
        new = [f"{name}: {reason}" for name, reason in why.items() if name not in said]
        if len(why) == len(self.methods) and self._is_new(new):
            warnings.warn(
                f"dit_accel accelerated nothing in this run ({'; '.join(new)})", stacklevel=2
            )

    def _is_new(self, reasons: Iterable[str]) -> bool:
        """Return whether there are reasons, and these together were not said before."""
        text = "; ".join(reasons)
        if not text or text in self._said:
            return False
        self._said.add(text)
        return True


def installation_of(target: Any) -> Installation | None:
    """The acceleration on a transformer, on a wrapper of it, or on the (first) transformer of a pipeline."""
    found = find(target)
    return None if found is None else found[1]


def installations_of(target: Any) -> dict[str, Installation]:
    """The acceleration on each transformer of a target, by the names of `parts_of`; empty if it is off."""
    found = {name: installation_of(part) for name, part in parts_of(target).items()}
    return {name: x for name, x in found.items() if x is not None}


def original_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """The values that weights had before acceleration changed them, by name; empty if it changed none."""
    installation = installation_of(transformer)
    swaps = [] if installation is None else installation.swaps
    return {name: x for swap in swaps for name, x in swap.originals.items()}


def method_of(target: Any, name: str) -> Any:
    """The method of this name that is on; None if it is off. `target` as in `installation_of`."""
    installation = installation_of(target)
    return None if installation is None else installation.methods.get(name)


def install(
    target: Any,
    methods: Iterable[Method],
    *,
    replaced: Installation | None = None,
    pipe: Any = None,
) -> Installation:
    """Put methods on a transformer.

    Args:
        target: a transformer, a wrapper of one (DDP, PEFT, torch.compile), or a pipeline.
        methods: all methods that are to be on.
        replaced: what is on now; it stays on if this fails.
        pipe: the pipeline that has it, if the target is none.

    Raises:
        ValueError: a transformer or processors that are not supported, or methods that do not go together.
    """
    methods = list(methods)
    transformer = transformer_of(target, any_model=not any(x.needs_family for x in methods))
    clock = Clock() if replaced is None else replaced.clock
    if replaced is not None:
        kept = [x.swap for x in methods if x.swap is not None]
        replaced.remove(transformer, keep=kept, ends=False)
        clock.forget()
    try:
        installation = Installation(transformer, methods, clock)
    except BaseException:
        if replaced is not None:
            Installation(transformer, replaced.methods.values(), clock)
        raise
    if pipe is None and target is not transformer and hasattr(target, "scheduler"):
        pipe = target
    if pipe is not None:
        clock.follow(pipe)
    return installation


def uninstall(target: Any) -> None:
    """Take all methods off; nothing happens if none is on."""
    for part in parts_of(target).values():
        found = find(part)
        if found is not None:
            transformer, installation = found
            installation.remove(transformer)


def transformer_of(target: Any, *, any_model: bool = False) -> Any:
    """The transformer that a pipeline, a wrapper or a transformer stands for; of two the first one.

    Args:
        target: as in `installation_of`.
        any_model: whether a transformer of any model is accepted, with one tensor `hidden_states`.

    Raises:
        ValueError: there is none of a supported model.
    """
    module = _module(target)
    if module is None:
        raise ValueError(
            f"target: {type(target).__name__} is no transformer and has none; accepted are transformers and "
            f"pipelines of {', '.join(FAMILIES)}"
        )
    for inner in module.modules():
        if is_supported(inner):
            return inner
    if any_model:
        from diffusers import ModelMixin

        inner = next((x for x in module.modules() if isinstance(x, ModelMixin)), module)
        if "hidden_states" not in inspect.signature(type(inner).forward).parameters:
            raise ValueError(
                f"target: the forward of {type(inner).__name__} has no argument hidden_states; accepted are "
                "transformers that take their latents by that name"
            )
        return inner
    family_of(module)  # which refuses it, by name
    raise AssertionError("unreachable")


def _module(target: Any) -> nn.Module | None:
    if isinstance(target, nn.Module):
        return target
    return next((x for x in transformers_of(target) if isinstance(x, nn.Module)), None)


def find(target: Any) -> tuple[Any, Installation] | None:
    """The accelerated transformer and its installation; `target` as in `installation_of`."""
    module = _module(target)
    if module is None:
        return None
    for inner in module.modules():
        for hook in inner._forward_pre_hooks.values():
            if isinstance(owner := getattr(hook, "__self__", None), Installation):
                return inner, owner
    return None


def _focus_of(methods: Iterable[Method]) -> Focus | None:
    """Return the focus of the method with the highest rank."""
    candidates = [x for x in methods if x.focus is not None]
    return max(candidates, key=lambda x: x.focus_rank).focus if candidates else None


def _stock(processor: Any) -> Any:
    """The processor of diffusers behind one of ours that outlived its installation."""
    while isinstance(processor, SparseProcessor):
        processor = processor.stock
    return processor


def _check_processors(family: Family, modules: dict[str, Any]) -> None:
    for name, module in modules.items():
        kind = type(_stock(module.processor)).__name__
        if kind not in family.stock_processors:
            raise ValueError(
                f"transformer.{name}: processor {kind}; accepted: {', '.join(family.stock_processors)} "
                "(restore it before enable)"
            )


def _reapply_group_offloading(transformer: nn.Module) -> None:
    """Parameters came, went or changed, and diffusers' group offloading with streams keeps those that it has seen."""
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    hooks = (x.get_hook("group_offloading") for x in registries if x is not None)
    hook = next((x for x in hooks if x is not None), None)
    # Files that it has written before would be read under the names of other parameters.
    if hook is not None and hook.config.offload_to_disk_path is None:
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        _maybe_remove_and_reapply_group_offloading(transformer)
