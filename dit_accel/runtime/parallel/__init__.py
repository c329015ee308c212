"""Context parallelism: processes share the tokens of a call, and trade them for heads in each attention."""
