"""Code of the scripts in the root folders: benchmarks, training of the networks behind metrics, pictures and pages.

Only the scripts in the root folders import this package, no other part of the library.
"""
