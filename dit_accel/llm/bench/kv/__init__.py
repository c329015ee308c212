"""Quality benchmark of KV caches: perplexity, answers over whole conversations, times and bytes."""
