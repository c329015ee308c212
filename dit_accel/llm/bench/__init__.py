"""Quality benchmark of sparse prefill: perplexity on texts, passkeys, and lookups on a model with handwritten weights."""
