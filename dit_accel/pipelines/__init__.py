"""diffusers pipelines with acceleration built in; one file a model family."""
