"""Build the documentation into docs/_build/html, strictly: a warning, a dead link or a foreign resource fails it.

    python scripts/build_docs.py [DIRECTORY]

Needs the extra `docs` and no network.
"""

from __future__ import annotations

import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    """What a page defines (ids), where it points (links), and what a browser would load for it (resources)."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"):
            self.resources.append(values["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in values:
            self.resources.append(values["src"])


def problems(directory: Path) -> list[str]:
    """Dead links and resources from elsewhere, one line each."""
    pages = {file: Page(file) for file in sorted(directory.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        where = file.relative_to(directory)
        for target in [*page.links, *page.resources]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.resources and parts.scheme != "data":
                    found.append(f"{where}: loads {target}")
                continue
            goal = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if goal.is_dir():
                goal = goal / "index.html"
            if not goal.exists():
                found.append(f"{where}: {target} does not exist")
            elif parts.fragment and goal in pages and unquote(parts.fragment) not in pages[goal].ids:
                found.append(f"{where}: {target} has no such place")
    return found


def main() -> int:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "_build" / "html").resolve()
    if (out / ".buildinfo").exists():
        shutil.rmtree(out)  # pages of an earlier build would be checked too
    status = sphinx(["-b", "html", "-W", "--keep-going", "-q", "-E", str(ROOT / "docs"), str(out)])
    if status:
        return status
    found = problems(out)
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    print(f"{len(list(out.rglob('*.html')))} pages in {out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
