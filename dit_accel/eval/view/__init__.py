"""How results are shown: one formatting of figures for table.md, grid.png and report.html."""
