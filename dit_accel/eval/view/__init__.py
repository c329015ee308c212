"""Presentation of results: table.md, grid.png and report.html."""
