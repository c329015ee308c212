"""Stills: single frames of the data set, and two tiny image models trained on them (Stable Diffusion 3 and
Lumina-Image 2.0)."""
