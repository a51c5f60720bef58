"""The notebooks of the repository as pages: copied beside the sources before they are read."""

from __future__ import annotations

import shutil
from pathlib import Path

from sphinx.application import Sphinx


def copy(app: Sphinx) -> None:
    there = Path(app.srcdir) / "notebooks"
    shutil.rmtree(there, ignore_errors=True)
    there.mkdir()
    for notebook in sorted((Path(app.srcdir).parent / "notebooks").glob("*.ipynb")):
        shutil.copy2(notebook, there)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
