"""results.json: its types, its checks, reading and writing."""
