"""Data of fine-tuning: captions, decoding, buckets, precomputed folders, and the order of batches."""
