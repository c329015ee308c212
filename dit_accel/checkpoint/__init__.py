"""SLA checkpoints: their file, the fingerprint of the base model, saving and loading, merging, converting."""
