"""Quality of sparse prefill: a real text, hidden numbers, and a model whose weights are written by hand."""
