"""Context parallelism: processes share the tokens of a call, and the heads in each attention layer."""
