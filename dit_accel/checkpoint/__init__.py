"""The file of sparse attention: its format, the model that it is for, saving and loading, merging, converting."""
