"""Types, checks, reading and writing of results.json."""
