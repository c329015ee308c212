"""Stills: the data set's single frames, and a tiny Stable Diffusion 3 trained on them."""
