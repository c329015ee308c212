"""Parts of `kernels/gpu_check.py`: what it measures, and how a run is kept, resumed and reported.

Imports torch, triton, jaxtyping and the standard library only, so that it runs on a machine without installs.
"""
