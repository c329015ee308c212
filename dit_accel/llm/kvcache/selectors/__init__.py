"""Selectors of the KV cache, one per module. A new module with a `Selector` subclass adds a selector."""
