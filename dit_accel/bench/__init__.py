"""Parts that the benchmark scripts share: timing, geometries, subjects, and the benchmarks themselves.

Only scripts import it; nothing of the library does.
"""
