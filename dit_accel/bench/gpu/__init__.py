"""Measurements of `kernels/gpu_check.py`, and the code that stores, resumes and reports a run.

Imports only torch, triton, jaxtyping and the standard library, so that it runs on a machine with few packages.
"""
