"""Training data: captions, decoding, buckets, precomputed folders, and the order of batches."""
