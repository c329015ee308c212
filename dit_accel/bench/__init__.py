"""Benchmarks, and the timing, geometries and subjects that they share.

Only the scripts in the root folders import this package, no other part of the library.
"""
