"""Metrics of sample sets."""
