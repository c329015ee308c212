"""Sparse prefill patterns, one per module. A pattern returns a `SparsePlan` with the keys that each query reads.

A new module with a `Pattern` subclass adds a pattern.
"""

from dit_accel.llm.prefill.pattern import Pattern, Prompt, Spans, pattern_names, pattern_of

__all__ = ["Pattern", "Prompt", "Spans", "pattern_names", "pattern_of"]
