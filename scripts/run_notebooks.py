"""Execute notebooks in place, so that their stored outputs are fresh.

python scripts/run_notebooks.py [NOTEBOOK ...]       # default: all
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def main() -> None:
    os.environ.pop("MPLBACKEND", None)  # pictures are part of the outputs
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(
            notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}
        ).execute()
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # random ones would change with every run
            cell.metadata.pop("execution", None)  # times of day
        nbformat.write(notebook, path)
        print(path, f"{path.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
