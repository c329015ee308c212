"""Fine-tuning of sparse-linear attention: from a dense diffusers model to an SLA checkpoint."""
