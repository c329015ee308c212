"""The notebook of the documentation runs from its first to its last cell."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs/first_steps.ipynb"


def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # An error in a cell is raised here.
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "13 dense steps" in printed
    shown = [x for cell in notebook.cells for x in cell.get("outputs", []) if "data" in x]
    assert any("image/png" in x["data"] for x in shown)
