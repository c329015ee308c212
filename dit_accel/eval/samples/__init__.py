"""Sample sets on disk: planned, made by pipeline calls, resumed, opened."""
