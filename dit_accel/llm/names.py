"""Names under which transformers knows our attention."""

NAME = "dit_accel"
"""Name of the attention implementation. One with "flash" in it would be looked for on the hub."""
