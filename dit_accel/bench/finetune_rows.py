"""Rows of the benchmark of fine-tuning: kinds of training that make a model sparse."""

from dataclasses import dataclass, field
from typing import Any

RECIPE = "tiny-wan-sla"
TEACHER_SHARE = 0.25
"""Share of the teacher in the cost of a step: one forward pass next to the student's forward and backward pass, which
counts as three."""
UNTRAINED: dict[str, Any] = {"router": "fixed"}
LORA: dict[str, Any] = {"train": "lora", "learning_rate": 2e-3}
"""Options of LoRA training. Adapters need a larger learning rate than the full weights."""


@dataclass(frozen=True)
class Row:
    """Sparse settings and training of one row of the benchmark."""

    name: str
    topk: float
    sla: dict[str, Any] = field(default_factory=dict)
    """Fields of `SLAConfig` that differ from the recipe."""
    options: dict[str, Any] | None = None
    """Options of `dit-accel finetune` that differ from the recipe. None: nothing is trained."""

    @property
    def key(self) -> str:
        """Name of the run's folder, and key of its scores."""
        return f"{self.name.replace(',', '').replace(' ', '-')}-{self.topk}"


def rows_of(topk: float, steps: int, regression_steps: int) -> list[Row]:
    """Return the rows of one sparsity.

    Args:
        topk: fraction of the key blocks that is read.
        steps: optimiser steps of the distillation. The diffusion loss has no teacher, and gets a third more steps at the
            same cost.
        regression_steps: optimiser steps of the regression.
    """
    more = round(steps / (1 - TEACHER_SHARE))
    regression: dict[str, Any] = {"stages": ("regression",), "regression_steps": regression_steps}
    fixed = UNTRAINED | {"max_train_steps": steps}
    return [
        Row("top-k, untuned", topk, {"combine": "none"}),
        Row("shared_softmax, untuned", topk),
        Row("regression (a)", topk, options=regression),
        Row("distillation (b)", topk, options=fixed),
        Row("distillation, LoRA", topk, options=fixed | LORA),
        learned(topk, steps),
        Row("diffusion loss", topk, options=fixed | {"loss": "diffusion", "max_train_steps": more}),
    ]


def learned(topk: float, steps: int) -> Row:
    """Return the row of the recipe itself: distillation with a learned router."""
    return Row(
        f"distillation, learned router, {steps} steps", topk, options={"max_train_steps": steps}
    )
