"""Context parallelism: processes split the tokens of a call, and the heads in each attention layer."""
