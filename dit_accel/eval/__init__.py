"""Comparing clips: metrics, and the same seed dense and sparse."""
