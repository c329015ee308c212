"""`Installation`: acceleration installed on one transformer, which follows each of its calls."""

import copy
import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.models import AttentionLayer, Call, Family, by_name
from dit_accel.runtime.attachment import Attachment
from dit_accel.runtime.clock import Clock
from dit_accel.runtime.method import Host, Method
from dit_accel.runtime.one_call import OneCall
from dit_accel.runtime.parallel.agreement import Agreement
from dit_accel.runtime.parallel.group import Group
from dit_accel.runtime.run import Run
from dit_accel.runtime.run_warnings import RunWarnings
from dit_accel.runtime.swap import WeightSwap
from dit_accel.runtime.weights import lora_scale, weights_state


class Installation:
    """Acceleration installed on one transformer. It tells the methods about each call and each run.

    The hooks of the transformer hold the installation. The installation knows no pipeline and keeps no reference to
    the transformer, so the memory of a deleted model is free at once.
    """

    def __init__(self, transformer: Any, methods: Iterable[Method], clock: Clock) -> None:
        self.clock = clock
        self.run: Run | None = None
        """Last run that the methods were told about."""
        self._call: Call | None = None
        self._begun = False
        """True if the call in progress has begun and the transformer has not run yet."""
        self._agreement = Agreement()
        self._warnings = RunWarnings()
        self._one_call = OneCall()
        self.attachment = Attachment(transformer, methods)
        before = [x for x in self.swaps if x.is_in]
        try:
            self.attachment.put_on(transformer, self)
        except BaseException:
            self.remove(transformer, keep=before, ends=False)
            raise

    @property
    def methods(self) -> dict[str, Method]:
        """Methods by name, those with the highest `selection_rank` first."""
        return self.attachment.methods

    @property
    def family(self) -> Family:
        """Family of the transformer."""
        return self.attachment.family

    @property
    def layers(self) -> dict[str, AttentionLayer]:
        """Self-attention layers by name."""
        return self.attachment.layers

    @property
    def swaps(self) -> list[WeightSwap]:
        """Weight swaps of the methods."""
        return self.attachment.swaps

    @property
    def group(self) -> Group | None:
        """Processes of context parallelism; None if it is off."""
        parallel = self.attachment.parallel
        return None if parallel is None else parallel.group

    def host(self, transformer: Any) -> Host:
        """Return the description of the transformer that methods get."""
        return self.attachment.host(transformer)

    def follow_parallelism(self, transformer: Any) -> None:
        """Take over the context parallelism of diffusers, see `Attachment.follow_parallelism`."""
        self.attachment.follow_parallelism(transformer)

    def remove(
        self, transformer: Any, *, keep: Collection[WeightSwap] = (), ends: bool = True
    ) -> None:
        """Take everything off the transformer, see `Attachment.take_off`."""
        self.attachment.take_off(transformer, keep=keep, ends=ends)

    def __deepcopy__(self, memo: dict) -> "Installation":
        new = object.__new__(type(self))
        memo[id(self)] = new
        own = {"run": None, "_call": None, "_begun": False}
        for name, value in vars(self).items():
            setattr(new, name, own[name] if name in own else copy.deepcopy(value, memo))
        return new

    def __reduce__(self) -> Any:
        raise TypeError(
            "an accelerated transformer cannot be pickled: call dit_accel.disable() first, or save it with "
            "save_pretrained"
        )

    # Hooks of one call ------------------------------------------------------------------------------

    def answer(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Begin a call. Return a method's answer to it; None if the transformer has to run."""
        if self._begun and self._one_call.is_mine:
            return None  # an outer class of the same call has asked already
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
                self._warnings.at_last_step(run, self.methods)
        finally:
            self._leave()
        return answer

    @torch.compiler.disable
    def before_forward(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the transformer."""
        if not self._begun or not self._one_call.is_mine:
            # The call did not come through the class that asks for answers.
            self._begin_call(transformer, args, kwargs, must_run=True)
        self._begun = False
        selection = self.attachment.seen_selection
        if selection is not None:
            arguments = by_name(transformer, args, kwargs)  # hooks before this one may add some
            selected = self.family.select_inputs(selection, arguments)
            if selected is not arguments:
                return (), selected
        return None

    @torch.compiler.disable
    def after_forward(self, transformer: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook of the transformer; also called after a failure."""
        if not self._one_call.is_mine:
            return None  # the call of another thread, which `OneCall.enter` refused
        try:
            return self._end_call(output)
        finally:
            self._leave()

    # Steps of one call ------------------------------------------------------------------------------

    def _leave(self) -> None:
        if self.run is not None:
            self.run.context = None  # type: ignore[assignment]
        self._call, self._begun = None, False
        self._one_call.leave()

    def _begin_call(
        self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any], *, must_run: bool = False
    ) -> Any:
        """Tell the clock and the methods about a call. Return the answer of a method, if one has any."""
        self._one_call.enter(transformer)
        self.attachment.follow_modules(transformer)
        try:
            self.attachment.follow_parallelism(transformer)
        except ValueError as refusal:
            raise RuntimeError(f"changed after enable: {refusal}") from None
        arguments = by_name(transformer, args, kwargs)
        call = self._call = self._read_call(transformer, arguments, must_run)
        run = self.run = self._run_of(transformer, call)
        self._notice_weights(transformer, run, arguments)
        for method in self.methods.values():
            answer = method.begin_call(run, call)
            if answer is not None:
                return answer
        if self.attachment.parallel is not None:
            self.attachment.parallel.selection.begin_call(call)
        self._warnings.at_first_call(run, self.methods)
        self._begun = True
        return None

    def _read_call(self, transformer: Any, arguments: dict[str, Any], must_run: bool) -> Call:
        group = self.group
        try:
            call = self.family.call(transformer, arguments)
        except Exception as refusal:
            if group is not None:  # the other processes may be waiting to compare their calls
                devices = (x.device for x in arguments.values() if isinstance(x, Tensor))
                group.agree({}, next(devices, torch.device("cpu")), refusal)
            raise
        return replace(
            call,
            flops=partial(
                self._flops, transformer, math.prod(call.grid), call.text_length, call.token_flops
            ),
            form=arguments.get("return_dict"),
            must_run=must_run,
            processes=group,
        )

    def _run_of(self, transformer: Any, call: Call) -> Run:
        """Return the run of a call, after all processes agreed on the call."""
        group, clock, error = self.group, self.clock, None
        try:
            begins = clock.tick(transformer, call.timestep, call.conditions, call.variant)
            if begins:
                self._begin_run(transformer)
            elif self.attachment.parallel_switched and clock.run is not None and clock.run.in_loop:
                raise RuntimeError(
                    "transformer: context parallelism was switched in the middle of a run, and the cached tokens and heads "
                    "of this run are those of other processes; accepted between runs"
                )
        except BaseException as failure:
            clock.forget()  # the run did not begin, so the next call begins one
            if group is None or not isinstance(failure, Exception):
                raise
            error = failure
        self.run, self.attachment.parallel_switched = clock.run, False
        if group is not None:
            self._agreement.reach(group, clock.run, call, self.methods, error)
        assert clock.run is not None
        return clock.run

    def _begin_run(self, transformer: Any) -> None:
        self.attachment.processors.check_unchanged(self.attachment.modules(transformer))
        self._check_again(transformer)
        assert self.clock.run is not None
        for method in self.methods.values():
            method.begin_run(self.clock.run)

    def _check_again(self, transformer: nn.Module) -> None:
        try:
            self.attachment.check_methods(transformer)
        except ValueError as error:
            raise RuntimeError(f"changed after enable: {error}") from None

    def _flops(
        self, transformer: Any, tokens: int, text: int, token_flops: float, active: int
    ) -> float:
        return self.family.flops(transformer, active, tokens, text) + active * token_flops

    def _notice_weights(self, transformer: nn.Module, run: Run, arguments: dict[str, Any]) -> None:
        """Tell the methods if weights of the transformer changed since the last call of the run."""
        if not any(x.keeps_activations for x in self.methods.values()):
            return
        ours = {x for method in self.methods.values() for x in method.modules.values()}
        weights = (weights_state(transformer, leave_out=ours), lora_scale(arguments))
        if run.weights is not None and weights != run.weights:
            self._check_again(
                transformer
            )  # a step cache that was switched on changes the state too
            for method in self.methods.values():
                method.weights_changed(run)
        run.weights = weights

    def _end_call(self, output: Any) -> Any:
        self.attachment.processors.clear_text()
        run, call, changed = self.run, self._call, None
        if run is None or call is None:
            return None
        for method in self.methods.values():
            new = method.end_call(run, call, output if changed is None else changed)
            changed = changed if new is None else new
        if output is not None and run.is_last_step:
            self._warnings.at_last_step(run, self.methods)
        return changed
