"""Choices of the stored tokens that a query reads: one file each; a new file is a new choice."""
