"""Every notebook runs from top to bottom in a fresh kernel and still says what its stored outputs say."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from documents import assert_same_text
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """The text a reader sees below each code cell (streams and plain representations)."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        parts = []
        for output in cell.outputs:
            if output.output_type == "stream":
                parts.append(output.text)
            elif "data" in output and "text/plain" in output.data and "image/png" not in output.data:
                parts.append(output.data["text/plain"])
        texts.append(re.sub(r" at 0x[0-9a-f]+", "", "".join(parts)))
    return texts


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Jupyter client, not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_and_its_stored_outputs_are_fresh(path: Path) -> None:
    """Words equal, numbers within 1e-3 relative: seeds are fixed, so only the last digits may move."""
    stored = nbformat.read(path, as_version=4)
    assert all(cell.execution_count for cell in stored.cells if cell.cell_type == "code"), (
        "stored without outputs"
    )
    fresh = nbformat.read(path, as_version=4)
    client = NotebookClient(
        fresh, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    for before, after in zip(printed(stored), printed(fresh), strict=True):
        assert_same_text(before, after)
