"""The notebook runs from its first cell to its last, with fewer steps, and is kept without outputs."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.e2e.runner import ROOT

FOLDER = ROOT / "recipes/notebook"


@pytest.mark.slow
def test_the_notebook_selects_trains_and_shows(world):
    notebook = nbformat.read(FOLDER / "hera_in_ten_minutes.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source += f"\nSTEPS, SIZE, FOLDER = 4, 'test', {str(world)!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    changed = re.findall(r"^ +(L\dH\d)  ([\d.]+) -> ([\d.]+)$", text, re.MULTILINE)
    assert len(changed) == 5
    assert any(before != after for _, before, after in changed)
    # three samples, the scores, the curves, the gallery
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
