"""Tiny pipelines of further families, a file each; see `random_pipelines`."""
