"""`Loop`: run the optimiser steps of the distillation stage."""

import math
import time
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dit_accel.finetune.checkpoints import checkpoint_path, prune, save_checkpoint
from dit_accel.finetune.guards import NonFiniteGuard, StepFacts, jsonable
from dit_accel.finetune.movement import DensityMeter, MovementGuard, UpdateMeter
from dit_accel.finetune.parts import Parts
from dit_accel.finetune.probe import Probe, seed_step
from dit_accel.finetune.stop import Interrupted
from dit_accel.summaries import summary_of

STAGE = "distillation"
DETAILS_EVERY = 10
"""Interval in steps at which parameter updates are measured. The first `DETAILS_EVERY` steps are all measured."""
PROBE_EVERY = 100
"""Interval in steps at which the loss on the first batch is measured."""
LOSS, FINITE, STOP, DUE, TOKENS = range(5)
"""Indices of the values that processes exchange in each step."""


class Loop:
    """Run the steps from `start` to `parts.steps`, with checkpoints, validation and guards.

    Args:
        parts: components of the run.
        start: number of finished steps.
    """

    def __init__(self, parts: Parts, start: int = 0) -> None:
        self.parts, self.start = parts, start
        config, engine = parts.config, parts.engine
        self.processes = engine.processes
        # The wrapper of accelerate skips steps that overflow in fp16.
        self.optimizer = engine.accelerator.prepare_optimizer(parts.state.optimizer)
        self.groups = parts.state.optimizer.param_groups
        self.parameters = list(parts.state.named.values())
        self.guard = NonFiniteGuard(
            parts.folder, config.max_nonfinite, self.processes, parts.state.counters
        )
        self.updates = UpdateMeter(self.groups, self.processes)
        self.density = DensityMeter(parts.sla)
        scheduled = any(x.scheduled for x in parts.sla.layers.values())
        self.movement = MovementGuard(scheduled=scheduled)
        self.probe = Probe(parts)
        self.saved = start if checkpoint_path(parts.folder, start).is_dir() else None
        self.saved_at = time.monotonic()

    def run(self) -> None:
        """Run all steps.

        Raises:
            Interrupted: if a signal was received. A checkpoint of the last step has been saved.
            RuntimeError: if no parameter trains, or if a file could not be written.
        """
        parts, last = self.parts, self.parts.steps
        if self.saved is not None:  # the run may have been killed before it removed old checkpoints
            limit = parts.config.checkpoints_total_limit
            kept = checkpoint_path(parts.folder, self.saved)
            self.processes.main_only(lambda: prune(parts.folder, limit, keep=kept))
        self._validate(self.start)
        if self.start < last:
            self.probe.begin()
            self.density.reset()
        for step in range(self.start, last):
            stop, due = self._step(step)
            done = step + 1
            if stop or due or done == last or done % parts.config.checkpointing_steps == 0:
                self.save(done)
            if stop:
                self._interrupt(done)
            self._validate(done)

    def _validate(self, done: int) -> None:
        if self.parts.validate is None:
            return
        finished = self.parts.validate(done)
        self.density.reset()
        if not finished:
            self.save(done)
            self._interrupt(done)

    def _interrupt(self, done: int) -> NoReturn:
        path = checkpoint_path(self.parts.folder, done)
        raise Interrupted(self.parts.stop.name or "a signal to another process", path)

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` finished steps, unless it has just been written."""
        if self.saved == done:
            return
        parts = self.parts
        parts.log.sync()
        save_checkpoint(
            parts.folder,
            done,
            parts.state.groups(),
            {
                "stage": STAGE,
                "processes": self.processes.count,
                "config": parts.saved_config,
                "samples": parts.samples_sha256,
                "numbers": jsonable(parts.state.numbers()),
            },
            processes=self.processes,
            limit=parts.config.checkpoints_total_limit,
        )
        self.saved, self.saved_at = done, time.monotonic()

    def _step(self, step: int) -> tuple[bool, bool]:
        """Run a step. Return (stop requested, checkpoint due by `checkpointing_minutes`)."""
        parts, config = self.parts, self.parts.config
        parts.meter.begin()
        topk = parts.topk_at(step)
        if topk is not None:
            parts.sla.set_topk(topk)
        parts.sla.set_learning_step(step)
        facts, scalars = self._backward(step)
        norm = parts.engine.clip(self.parameters, config.max_grad_norm)
        sums, scalars = self._exchange(facts, scalars)
        loss = float(sums[LOSS]) / self.processes.count
        values = {**scalars, "loss": loss, "gradient_norm": norm}
        if topk is not None:
            values["topk"] = topk
        calls, density = self.density.read(self.processes)
        if density is not None:
            values["density"] = density
        self.movement.check_density(calls, lambda: _dense_reasons(parts.model))
        values |= self._update(step, loss, norm, bool(sums[FINITE] == self.processes.count), facts)
        if (step + 1) % PROBE_EVERY == 0 or step + 1 == parts.steps:
            values["probe_loss"] = self.probe.measure(step + 1)
            self.density.reset()
        values |= parts.meter.end(int(sums[TOKENS]))
        parts.log.write(STAGE, step + 1, values)
        parts.meter.show(values)
        return bool(sums[STOP]), bool(sums[DUE])

    def _backward(self, step: int) -> tuple[StepFacts, dict[str, float]]:
        """Accumulate the gradients of a step. Return the facts of the step and the means of the scalars."""
        parts, count = self.parts, self.parts.config.gradient_accumulation_steps
        engine, model = parts.engine, parts.model
        model.train()
        seed_step(parts.config.seed, step, self.processes.rank)
        facts = StepFacts()
        sums: dict[str, float] = {}
        for micro in range(count):
            batch = parts.feed.micro(step, micro)
            first = parts.feed.first_row(micro)
            with engine.accumulating(model, last=micro + 1 == count):
                with engine.accelerator.autocast():
                    loss, scalars = parts.objective(model, batch, step=step, first=first)
                engine.accelerator.backward(loss / count)
            facts.ids += batch.ids
            facts.losses.append(float(loss.detach()))
            for name, x in scalars.items():
                sums[name] = sums.get(name, 0.0) + float(x) / count
            parts.meter.count(batch)
        return facts, sums

    def _exchange(
        self, facts: StepFacts, scalars: dict[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """Sum the values of all processes in one collective call. Return the sums and the means of the scalars."""
        config, loss = self.parts.config, sum(facts.losses) / len(facts.losses)
        minutes = config.checkpointing_minutes
        due = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        own = torch.zeros(5, dtype=torch.float64)
        own[LOSS], own[FINITE] = loss, math.isfinite(loss)
        own[STOP], own[DUE] = self.parts.stop.name is not None, due
        own[TOKENS] = self.parts.meter.tokens
        named = torch.tensor(list(scalars.values()), dtype=torch.float64)
        total = self.processes.sum(torch.cat([own, named])).cpu()
        means = (total[len(own) :] / self.processes.count).tolist()
        return total[: len(own)], dict(zip(scalars, means, strict=True))

    def _update(
        self, step: int, loss: float, norm: float, finite: bool, facts: StepFacts
    ) -> dict[str, Any]:
        """Update the weights unless the step is skipped. Return values for the log."""
        parts = self.parts
        values: dict[str, Any] = {}
        if not (finite and math.isfinite(norm)):
            facts.noise_levels = noise_levels(parts, step)
        rates = {group["name"]: float(group["lr"]) for group in self.groups}
        scale = parts.engine.loss_scale
        skipped = self.guard.skips(
            step,
            loss=loss,
            finite=finite,
            gradient_norm=norm,
            facts=facts,
            groups=self.groups,
            named=parts.state.named,
            loss_scale=scale,
        )
        measured = not skipped and (step - self.start < DETAILS_EVERY or step % DETAILS_EVERY == 0)
        if measured:
            self.updates.begin()
        if not skipped or (scale is not None and not math.isfinite(norm)):
            self.optimizer.step()  # on an fp16 overflow the scaler skips the update and lowers its scale
        elif scale is not None:
            parts.engine.accelerator.scaler.update()
        if not skipped and parts.state.ema is not None:
            parts.state.ema.step(self.parameters)
        if measured:
            updates = self.updates.end()
            self.movement.check_updates(step, updates, rates)
            values |= {f"update/{name}": x for name, x in updates.items()}
        with warnings.catch_warnings():
            if skipped:  # torch warns if the schedule advances before the first optimiser step
                warnings.simplefilter("ignore")
            parts.state.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        values |= {f"learning_rate/{name}": x for name, x in rates.items()}
        values["learning_rate"] = max(rates.values())
        if skipped:
            values["skipped_steps"] = len(parts.state.counters["skipped_steps"])
        if scale is not None:
            values |= {"loss_scale": scale, "overflows": parts.state.counters["overflows"]}
        return values


def noise_levels(parts: Parts, step: int) -> list[float]:
    """Recompute and return the noise levels of this process in a step."""
    levels = []
    for micro in range(parts.config.gradient_accumulation_steps):
        latents = parts.feed.micro(step, micro).latents
        levels += parts.objective.draw(latents, step, parts.feed.first_row(micro))[0].tolist()
    return levels


def _dense_reasons(transformer: nn.Module) -> dict[str, int]:
    """Return the number of dense attention calls by reason, over all layers."""
    return summary_of(transformer).dense_calls
