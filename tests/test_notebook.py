"""The notebook of the docs runs from top to bottom, and what is stored in it names no place of a machine."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "walk.ipynb"


def test_the_notebook_runs_and_leaves_an_adapter_with_its_card(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert len(found) == 10 and all(found), "each cell shows something"
    left = {file.name for file in (tmp_path / "walk").iterdir()}
    assert left >= {"adapter_model.safetensors", "memorization_report.json", "README.md", "private"}


def test_the_stored_notebook_is_valid_was_run_in_order_and_names_no_place():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, 11))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not re.search(r"/(tmp|home|root|work|Users)/", NOTEBOOK.read_text(encoding="utf-8"))
    links = re.findall(r"\]\((\w+\.md)[)#]", NOTEBOOK.read_text(encoding="utf-8"))
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)
