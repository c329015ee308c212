"""diffusers pipelines that are sparse from the start; one file per model."""
