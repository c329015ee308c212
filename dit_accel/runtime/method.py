"""`Method`: interface of an acceleration method; `Host`: the transformer to which it is attached."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dit_accel.models import AttentionLayer, Call, Family, TokenOrder, TokenSelection
from dit_accel.runtime.run import Run
from dit_accel.runtime.swap import WeightSwap


class Method:
    """Base class of acceleration methods.

    A method is attached to one transformer, told about its calls, asked for a summary, and detached. The functions of
    this class do nothing. Store the state of a run in `run.states[self.name]`, and the state of a context in
    `run.context.states[self.name]`.
    """

    name: str
    """Name of the method: the keyword of `enable` and the key in `summary`."""
    needs_family = True
    """True if the method needs a supported model. False if it uses only `hidden_states` and the output of calls."""
    may_answer = False
    """True if `begin_call` may return the output of a call, so that the transformer does not run."""
    uses_attention = False
    """True if the method sets the seams `attend` or `kv_store` of the attention processors."""
    keeps_activations = False
    """True if the method keeps activations from one step to the next. `weights_changed` is called only then."""
    selection: TokenSelection | None = None
    """Tokens on which calls run and their order, if the method decides about them."""
    selection_rank = 0
    """Rank of the selection. The selection with the highest rank of all methods is used."""
    swap: WeightSwap | None = None
    """Values that weights of the transformer have while the method is on."""

    def check(self, transformer: nn.Module, others: Collection["Method"]) -> None:
        """Refuse a transformer or methods that this method does not work with; called by `enable` and when a run begins.

        Args:
            transformer: the transformer in its present state.
            others: all other methods that are on.

        Raises:
            ValueError: the method does not work with the transformer or with another method.
        """

    def attach(self, host: "Host") -> None:
        """Connect to the transformer. Methods with a higher `selection_rank` are attached first."""

    def begin_run(self, run: Run) -> None:
        """Begin a new run. `begin_call` with its first call follows."""

    def begin_call(self, run: Run, call: Call) -> Any:
        """Begin a call, before the transformer runs.

        Returns:
            The output of the call, if `may_answer` and the transformer is not to run; else None. After an answer, methods
            with a lower `selection_rank` are not told about the call, and `end_call` is not called.
        """

    def end_call(self, run: Run, call: Call, output: Any) -> Any:
        """End a call, after the transformer has run.

        Args:
            run: run of the call.
            call: the call.
            output: output of the transformer; None after a failure.

        Returns:
            The output to return instead; None to leave the output unchanged.
        """

    def weights_changed(self, run: Run) -> None:
        """Drop kept activations, because weights of the transformer changed during the run."""

    def detach(self) -> None:
        """Undo `attach`."""

    def rows(self, host: "Host", run: Run | None) -> Any:
        """Return the summary of a run: an object that prints as a table and has `to_dict`.

        Args:
            host: the transformer.
            run: the last run, also if the method was not told about it. None: the last run that the method knows.

        The returned class may have a class method `joined(parts)`, which returns the summary of a pipeline with two
        transformers from `{name: PartSummary}`.
        """

    def unscheduled(self, run: Run) -> tuple[str, str] | None:
        """Return why the schedule of a run leaves the method nothing to do; None if it leaves something.

        Called in the first call of a run, after `begin_call`.

        Returns:
            (reason, details): the reason without numbers, and the numbers with a remedy.
        """

    def idle(self, run: Run) -> str | None:
        """Return why the method accelerated nothing in this run, without numbers; None if it accelerated something."""

    def order(self, grid: tuple[int, int, int], device: torch.device) -> TokenOrder | None:
        """Return the preferred order of the tokens of this grid; None if there is none."""

    def tile(self, grid: tuple[int, int, int], device: torch.device) -> int | None:
        """Return the preferred number of neighbouring tokens that run together; None if there is none."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Modules with weights that the method adds to the transformer, by name."""
        return {}


@dataclass
class Host:
    """The transformer to which methods are attached. Methods must not keep it, because it keeps the model alive."""

    transformer: Any
    family: Family
    layers: dict[str, AttentionLayer] = field(default_factory=dict)
    """Self-attention layers by name."""
    methods: tuple[Method, ...] = ()
    """All methods that are on."""
    selection: TokenSelection | None = None
    """Tokens on which calls run and their order; None: all tokens in raster order."""
