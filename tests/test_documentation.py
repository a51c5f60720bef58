"""Every code block of the documentation runs, page by page in an empty folder, and prints what the page shows."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from documents import assert_same_text
from typer.testing import CliRunner

import fluidsched as fs
from fluidsched.cli import app

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(file for file in DOCS.rglob("*.md") if "_build" not in file.parts)
BLOCK = re.compile(
    r"(?:^<!-- file: (?P<file>\S+) -->\n)?^```(?P<language>[^\n`]*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SILENT = ("text", "toml")  # outputs, files, and commands of other programs


def blocks(page: Path) -> list[tuple[str, str, str | None, bool]]:
    """(language, body, file it is to be written to, whether it follows the block before it directly).

    Python comes at its own line numbers, for tracebacks.
    """
    text = page.read_text()
    found, end = [], -1
    for match in BLOCK.finditer(text):
        follows = end >= 0 and not text[end : match.start()].strip()
        before = text.count("\n", 0, match.start("body")) if match["language"] == "python" else 0
        found.append((match["language"], "\n" * before + match["body"], match["file"], follows))
        end = match.end()
    return found


def test_languages_of_blocks() -> None:
    """Python and commands are executed, directives belong to the generator; nothing else may hold code."""
    allowed = {"python", "bash", *SILENT}
    for page in PAGES:
        for language, *_ in blocks(page):
            assert language in allowed or language.startswith("{"), f"{page}: {language}"


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if re.search("^```(python|bash)$", page.read_text(), re.MULTILINE)],
    ids=lambda page: str(page.relative_to(DOCS)),
)
def test_page_runs_and_prints_what_it_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A `text` block directly after code is the beginning of what the code prints."""
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    printed = ""
    for language, body, file, follows in blocks(page):
        if file is not None:
            Path(file).write_text(body)
        elif language == "python":
            exec(compile(body, str(page), "exec"), names)
            printed = capsys.readouterr().out
        elif language == "bash":
            for line in body.strip().splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "fluidsched", "only our own commands are executed"
                result = CliRunner().invoke(app, arguments, catch_exceptions=False)
                assert result.exit_code == 0, result.output
                printed = result.stdout
        elif language == "text" and follows:
            shown = body.strip().splitlines()
            assert_same_text("\n".join(shown), "\n".join(printed.strip().splitlines()[: len(shown)]))
    pyplot.close("all")


def test_links_outside_of_the_generator_s_reach() -> None:
    """The README and the contributing guide point at files that are there; the generator checks its own pages."""
    root = DOCS.parent
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (root / name).read_text()):
            assert (root / target).exists(), f"{name}: {target}"


def test_the_citation_is_of_this_version() -> None:
    text = (DOCS.parent / "CITATION.cff").read_text()
    assert re.findall(r"^version: (\S+)$", text, re.MULTILINE) == [fs.__version__]


def test_every_public_name_is_in_the_reference() -> None:
    """Namespaces by name, everything else as a member of a module on some page of the reference."""
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    members: set[str] = set()
    for module in re.findall(r"automodule:: (\S+)", text):
        members.update(importlib.import_module(module).__all__)
    named = set(re.findall(r"fluidsched\.(\w+)", text))
    assert not set(fs.__all__) - members - named - {"__version__"}
