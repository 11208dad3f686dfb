"""The tutorial runs top to bottom, from what is in the repository, and its stored outputs are those of its cells."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def test_the_tutorial_runs_top_to_bottom_and_says_what_to_use() -> None:
    notebook = nbformat.read(ROOT / "examples" / "tutorial.ipynb", as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert "use the " in "".join(output.get("text", "") for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
