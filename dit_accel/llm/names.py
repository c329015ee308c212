"""Name under which the attention functions are registered with transformers."""

NAME = "dit_accel"
"""Name of the attention implementation. It must not contain "flash": transformers would look for it on the hub."""
