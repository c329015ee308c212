"""KV caches for transformers: stores compress the cached tokens, selectors choose the tokens that a query reads."""
