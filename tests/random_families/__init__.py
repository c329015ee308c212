"""Tiny pipelines of further families, one file for each; see `random_pipelines`."""
