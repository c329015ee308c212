"""Patterns: the keys that the queries of a prompt read, as plans. One file each; a new file is a new pattern."""

from dit_accel.llm.prefill.pattern import Pattern, Prompt, Spans, pattern_names, pattern_of

__all__ = ["Pattern", "Prompt", "Spans", "pattern_names", "pattern_of"]
