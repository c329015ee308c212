"""Which stored tokens a query reads: one file each; a new file is a new choice."""
