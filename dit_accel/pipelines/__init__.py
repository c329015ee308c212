"""Subclasses of diffusers pipelines with acceleration, one file per model family."""
