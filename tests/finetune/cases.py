"""Small configs and students for the tests of fine-tuning."""

import torch

from dit_accel.finetune.batch import Batch
from dit_accel.finetune.config import FinetuneConfig
from dit_accel.runtime.install import method_of

from .families.cases import conditions, latents

SPARSE = {
    "topk": 0.25,
    "combine": "alpha",
    "block_q": 16,
    "block_k": 16,
    "dense_steps": 0,
    "dense_layers": 0,
}
"""Sparse attention for the few tokens of random pipelines."""


def config(sla=None, **changed):
    given = {"stages": ("distillation",), "sla": {**SPARSE, **(sla or {})}, **changed}
    return FinetuneConfig(**given)


def batch(trainable, family, rows=2, seed=5):
    ids = tuple(f"sample-{i}" for i in range(rows))
    return Batch(latents(trainable, rows, seed), conditions(family, range(rows)), ids)


def null_conditions(family):
    return conditions(family, [-2])


def rows_of(given, start, stop):
    """Some rows of a batch."""
    part = {name: x[start:stop] for name, x in given.conditions.items()}
    return Batch(given.latents[start:stop], part, given.ids[start:stop])


def sparse_attention(transformer):
    return method_of(transformer, "sla")


def calibrate(transformer):
    """Let combine="alpha" start from fixed shares instead of those of the first batch."""
    for layer in sparse_attention(transformer).layers.values():
        layer.module.calibrated = True


def copies(tensors):
    return {name: x.detach().clone() for name, x in tensors.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
