"""Formatting of results for table.md, grid.png and report.html."""
