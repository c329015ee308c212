"""`Method`: the contract of an acceleration method, and `Host`: what it is attached to."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dit_accel.models import AttentionLayer, Call, Family, TokenOrder, TokenSelection
from dit_accel.runtime.run import Run
from dit_accel.runtime.swap import WeightSwap


class Method:
    """One way to make the calls of a transformer cheaper.

    A method is attached to one transformer, told about its calls, asked what it did, and detached. Every
    function here does nothing by default. What a method keeps for a run goes into `run.states[self.name]`, and
    for a context into `run.context.states[self.name]`.
    """

    name: str
    """Keyword of `enable`, key of `summary`."""
    needs_family = True
    """True if the method needs a supported model; else a call's `hidden_states` and its output are enough."""
    may_answer = False
    """True if `begin_call` may answer a call in place of the transformer."""
    uses_attention = False
    """True if the method needs the seams `attend` and `kv_store` of the attention processors."""
    keeps_activations = False
    """True if the method keeps activations from one step to the next; they are dropped when weights change."""
    selection: TokenSelection | None = None
    """TokenSelection of the method, if it selects or orders the tokens of a call."""
    selection_rank = 0
    """Rank of the selection; the highest one of all methods is used."""
    swap: WeightSwap | None = None
    """Other values for weights of the transformer, which they have as long as the method is on."""

    def check(self, transformer: nn.Module, others: Collection["Method"]) -> None:
        """Refuse what the method cannot work with, at `enable` and at the beginning of each run.

        Raises:
            ValueError: the transformer, as it is now, or another method does not go with it.
        """

    def attach(self, host: "Host") -> None:
        """Connect to the transformer. Methods with a higher `selection_rank` are attached first."""

    def begin_run(self, run: Run) -> None:
        """A new run begins, with the call that `begin_call` tells next."""

    def begin_call(self, run: Run, call: Call) -> Any:
        """The transformer is about to run.

        Returns:
            What the call returns instead of running the transformer; None: it runs. After an answer, methods with a
            lower `selection_rank` are not told about the call, and `end_call` does not follow.
        """

    def end_call(self, run: Run, call: Call, output: Any) -> Any:
        """The transformer has run.

        Args:
            output: what it returned; None after a failure.

        Returns:
            What it returns instead; None leaves the output as it is.
        """

    def weights_changed(self, run: Run) -> None:
        """Weights of the transformer changed in mid-run: what was kept is stale."""

    def detach(self) -> None:
        """Undo `attach`."""

    def rows(self, host: "Host", run: Run | None) -> Any:
        """Return the summary of a run: an object that prints as a table and has `to_dict`.

        Args:
            run: the last run, or one that the method was not told about. None: the last one that it knows.

        For a pipeline with two transformers, a class method `joined(parts)` of that object may return the summary of both
        from `{name: PartSummary}`.
        """

    def unscheduled(self, run: Run) -> tuple[str, str] | None:
        """Return why the schedule of a run leaves the method nothing to do, without counts, and then with what numbers
        and with what remedy; None if it leaves something. Asked in the first call of a run, after `begin_call`."""

    def idle(self, run: Run) -> str | None:
        """Return why the method accelerated nothing in this run, without counts; None if it accelerated something."""

    def order(self, grid: tuple[int, int, int], device: torch.device) -> TokenOrder | None:
        """Return the order in which tokens of this grid should run; None: no wish."""

    def tile(self, grid: tuple[int, int, int], device: torch.device) -> int | None:
        """Return how many neighbouring tokens are best kept together; None: no wish."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Modules with weights that it adds to the transformer."""
        return {}


@dataclass
class Host:
    """A transformer as methods see it. It is not kept: a method that keeps it keeps the model alive."""

    transformer: Any
    family: Family
    layers: dict[str, AttentionLayer] = field(default_factory=dict)
    """Self-attention layers by name."""
    methods: tuple[Method, ...] = ()

    selection: TokenSelection | None = None
    """TokenSelection that selects and orders the tokens; None: all of them run, in raster order."""
