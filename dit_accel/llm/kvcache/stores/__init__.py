"""Forms in which tokens are stored: one file each; a new file is a new store."""
