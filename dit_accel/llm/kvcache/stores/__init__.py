"""Stores of the KV cache, one per module. A new module with a `Store` subclass adds a store."""
