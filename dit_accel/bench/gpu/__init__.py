"""Parts of `kernels/gpu_check.py`: its measurements, and the code that stores, resumes and reports a run.

Imports torch, triton, jaxtyping and the standard library only, so that it runs on a machine without installs.
"""
