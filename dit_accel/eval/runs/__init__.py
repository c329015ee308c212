"""Methods compared with each other: samples, seconds, memory, quality."""
