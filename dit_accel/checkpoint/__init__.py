"""SLA checkpoints: file format, identity of the base model, saving, loading, merging and converting."""
