"""The notebook runs from its first cell to its last, and says what it skips."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
TOUR = ROOT / "examples" / "tour.ipynb"


def test_the_notebook_is_kept_without_outputs():
    cells = [cell for cell in nbformat.read(TOUR, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs_and_skips_icons_visibly(tmp_path, monkeypatch):
    monkeypatch.setenv("TOUR_RUNS", str(tmp_path))
    monkeypatch.setenv("MAML_DATA_ROOT", str(tmp_path / "none"))
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "Skipped: " in text and "icons.py" in text  # the data are not there
    assert "error" not in text.lower().replace("error over", "") and (tmp_path / "tour" / "best.pt").exists()
