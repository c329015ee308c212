"""Whole conversations on a cache of keys and values: right answers, times and bytes of each turn."""
