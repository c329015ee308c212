"""Acceleration of a transformer: put on, followed through its calls, taken off. Names no method."""
