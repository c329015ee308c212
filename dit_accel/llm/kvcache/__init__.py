"""Caches of keys and values for transformers: how tokens are stored, and which of them a query reads."""
