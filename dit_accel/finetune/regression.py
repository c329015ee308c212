"""`regress`: regression stage of fine-tuning, which fits sparse attention to the dense attention of each layer."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dit_accel.finetune.batch import Batch
from dit_accel.finetune.dense_pass import dense_pass, generator_of, squared_error
from dit_accel.finetune.processes import Processes
from dit_accel.sla import SparseAttention, SparseLinearAttention

LOGIT_RATE = 10.0
"""Factor of the learning rate of `alpha_logit`: logits change by whole units, entries of matrices by hundredths."""
Batches = Callable[[int], Batch]
"""Function that returns the batch of a step."""
OnStep = Callable[[int, dict[str, float]], None]
"""Function that is called with the index of a step and its scalars."""


@dataclass
class Regression:
    """Result of the regression stage."""

    before: dict[str, float]
    """Relative error of the attention output of each layer before the first step, on held-out samples."""
    after: dict[str, float]
    """Relative error of each layer after the last step, on the same samples."""
    untrained: dict[str, str]
    """Reason for each layer that was not trained."""
    losses: list[float] = field(default_factory=list)
    """Squared relative error of each step: mean over samples and layers."""


def regress(
    trainable: Any,
    sla: SparseAttention,
    batches: Batches,
    config: Any,
    *,
    processes: Processes | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> Regression:
    """Fit the weights of sparse attention in each layer to the dense attention of the frozen model.

    Each step runs the dense model once without gradients. In each layer, the squared relative error of the sparse
    output is differentiated with respect to the weights of sparse attention (`proj_l`, `alpha_logit`,
    `learned_router`) as soon as its queries, keys and values are known. Then one step of Adam updates all layers.
    All layers receive dense inputs, so they are independent of each other. No other weights change.

    Each process uses its own samples. Gradients are averaged over the processes.

    Args:
        trainable: model with `transformer`, `velocity` and `flow_shift`.
        sla: sparse attention installed on that transformer.
        batches: function that returns the batch of a step. The batch of step `regression_steps` is not trained on and
            measures the errors before and after.
        config: `regression_steps`; `regression_learning_rate`, which falls linearly to 0 (0.01 is a good value;
            `alpha_logit` uses ten times as much); `regression_topk`, values of topk from which each step draws one
            (empty: the current topk); `seed`.
        processes: processes of the run. Default: a single process.
        progress: show a progress bar on stderr.
        on_step: function called after each step with its index and scalars for the log.

    Raises:
        ValueError: if a setting is out of range, or if no layer runs sparse on the samples.
    """
    topks = _check(config, sla)
    weights = {
        name: list(layer.module.parameters())
        for name, layer in sla.layers.items()
        if layer.scheduled and any(True for _ in layer.module.parameters())
    }
    sla.set_learning_step(
        None
    )  # train the router on all rows, because dense attention is computed anyway
    processes = processes or Processes(next(trainable.transformer.parameters()).device)
    fit = _Fit(trainable, sla, batches, config.seed, processes)
    before = fit.errors(config.regression_steps)
    result = Regression(before, dict(before), _untrained(sla, weights, before))
    if not weights:
        warnings.warn(
            f"regression: sparse attention has no weights to train (combine={sla.config.combine!r}, "
            f"router={sla.config.router!r}); use combine='proj' or 'alpha', or router='learned'",
            stacklevel=2,
        )
        return result
    used = sla.config.topk
    try:
        result.losses = _train(fit, weights, topks, config, progress, on_step)
    finally:
        if used is not None:
            sla.set_topk(used)
    result.after = fit.errors(config.regression_steps)
    return result


def _train(
    fit: "_Fit",
    weights: Mapping[str, list[nn.Parameter]],
    topks: Sequence[float],
    config: Any,
    progress: bool,
    on_step: OnStep | None,
) -> list[float]:
    parameters = [x for layer in weights.values() for x in layer]
    _average_shares(fit.sla, fit.processes)
    rate = config.regression_learning_rate
    logits = {id(x.alpha_logit) for x in fit.sla.attention.values() if hasattr(x, "alpha_logit")}
    optimizer = torch.optim.Adam(
        [
            {"params": [x for x in parameters if id(x) not in logits], "lr": rate},
            {"params": [x for x in parameters if id(x) in logits], "lr": LOGIT_RATE * rate},
        ]
    )
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / max(1, config.regression_steps)
    )
    steps = tqdm(range(config.regression_steps), desc="regression", disable=not progress)
    losses = []
    with _training(parameters):
        for step in steps:
            if topks:
                fit.sla.set_topk(_one_of(topks, config.seed, step))
            loss = fit.gradients(step, weights)
            optimizer.step()
            falling.step()
            losses.append(loss)
            steps.set_postfix(loss=f"{loss:.4f}")
            if on_step is not None:
                scalars = {"loss": loss}
                if fit.sla.config.topk is not None:
                    scalars["topk"] = float(fit.sla.config.topk)
                on_step(step, scalars)
    return losses


class _Fit:
    """Compare the sparse with the dense attention output of each layer in passes of the dense model."""

    def __init__(
        self,
        trainable: Any,
        sla: SparseAttention,
        batches: Batches,
        seed: int,
        processes: Processes,
    ) -> None:
        self.trainable, self.sla, self.batches, self.seed = trainable, sla, batches, seed
        self.processes = processes

    def errors(self, step: int) -> dict[str, float]:
        """Return the relative error of each sparse layer on the batch of a step."""
        found: dict[str, Tensor] = {}

        def measure(name: str, module: SparseLinearAttention, *qkv: Tensor, **options: Any) -> None:
            found[name] = squared_error(module, *qkv, **options).sqrt().mean()
            module.keep_measured()  # keep the calibration, so that the next call does not repeat it

        self._pass(step, measure, self.sla.layers)
        return {name: float(self.processes.mean(x)) for name, x in found.items()}

    def gradients(self, step: int, weights: Mapping[str, list[nn.Parameter]]) -> float:
        """Set the gradients of all weights, and return the mean loss."""
        found: dict[str, Tensor] = {}

        def learn(name: str, module: SparseLinearAttention, *qkv: Tensor, **options: Any) -> None:
            with torch.enable_grad():
                loss = squared_error(module, *qkv, **options).mean()
                grads = torch.autograd.grad(loss, weights[name], allow_unused=True)
            for x, grad in zip(weights[name], grads, strict=True):
                x.grad = grad
            found[name] = loss.detach()

        self._pass(step, learn, weights)
        for x in (x for layer in weights.values() for x in layer):
            x.grad = self.processes.mean(torch.zeros_like(x) if x.grad is None else x.grad)
        return float(self.processes.mean(torch.stack(list(found.values())).mean()))

    def _pass(self, step: int, visit: Callable[..., None], names: Any) -> None:
        visited = set()

        def noting(name: str, *rest: Any, **options: Any) -> None:
            visited.add(name)
            visit(name, *rest, **options)

        batch = self.batches(step)
        place = {"seed": self.seed, "step": step, "rank": self.processes.rank}
        dense_pass(self.trainable, self.sla, batch, noting, names=names, **place)
        if not visited:
            raise ValueError(
                f"regression: no layer runs sparse on samples of shape {tuple(batch.latents.shape[1:])}, because they are "
                "too short or masked, or all layers are dense; crossover='never' makes short samples sparse"
            )


def _check(config: Any, sla: SparseAttention) -> list[float]:
    """Check the settings, and return the values of topk to draw from. Empty means the current topk."""
    for name in ("regression_steps", "regression_learning_rate"):
        value = getattr(config, name)
        if not value >= 0:
            raise ValueError(f"{name}={value!r}: must be >= 0")
    topks = list(config.regression_topk or [])
    if topks and sla.config.topk is None:
        raise ValueError(
            f"regression_topk={topks}: requires sla.topk; here only sla.top_p selects key blocks"
        )
    if not all(0 < value <= 1 for value in topks):
        raise ValueError(f"regression_topk={topks}: must be fractions in (0, 1]")
    return topks


def _one_of(values: Sequence[float], seed: int, step: int) -> float:
    # This number differs from the row index of every sample, so the draw is independent of the noise.
    index = torch.randint(len(values), (), generator=generator_of(seed, step, 1_000_002))
    return values[int(index)]


def _untrained(
    sla: SparseAttention, weights: Mapping[str, Any], errors: Mapping[str, float]
) -> dict[str, str]:
    reasons = {}
    for name, layer in sla.layers.items():
        if not layer.scheduled:
            reasons[name] = "dense layer"
        elif name not in errors:
            reasons[name] = "dense on these samples"
        elif name not in weights:
            reasons[name] = "no weights: the router is fixed, and combine has no parameters"
    return reasons


@torch.no_grad()
def _average_shares(sla: SparseAttention, processes: Processes) -> None:
    """Average the calibrated share of the exact branch over all processes, so that their weights are equal."""
    if sla.config.combine == "alpha":
        for module in sla.attention.values():
            shares = processes.mean(module.alpha_logit.sigmoid())
            module.alpha_logit.copy_(shares.logit())


@contextmanager
def _training(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Context manager in which the parameters require gradients."""
    before = [x.requires_grad for x in parameters]
    for x in parameters:
        x.requires_grad_(True)
    try:
        yield
    finally:
        for x, flag in zip(parameters, before, strict=True):
            x.requires_grad_(flag)
            x.grad = None
