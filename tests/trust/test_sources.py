"""Where figures come from: every file of figures in the package, and every group in it, names source and licence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fluidsched as fs
from fluidsched.server import catalog
from fluidsched.workload import workloads

PACKAGE = Path(fs.__file__).parent
NOTICE = (Path(__file__).resolve().parents[2] / "NOTICE").read_text(encoding="utf-8")


def paragraph(name: str) -> str:
    """What NOTICE says of a file."""
    [found] = [text for text in NOTICE.split("\n\n") if name in text.partition("\n")[0].split(", ")]
    return found


def test_notice_names_every_file_that_is_no_code() -> None:
    """Neither more nor fewer, and each once."""
    there = [
        file.relative_to(PACKAGE.parent).as_posix()
        for file in PACKAGE.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc", ".nbi", ".nbc") and file.name != "py.typed"
    ]
    assert sorted(
        re.findall(r"^fluidsched/[\w/.-]+|(?<=, )fluidsched/[\w/.-]+", NOTICE, re.MULTILINE)
    ) == sorted(there)


def test_embedded_workloads_say_what_notice_says() -> None:
    """The trace and its licence, with the workload and in NOTICE, for its laws and for its rates in time."""
    assert workloads.names()
    for name in workloads.names():
        trace, licence = re.fullmatch(
            r"(.+), (CC-BY-4\.0|Apache-2\.0); .+ 20\d\d", workloads.get(name).source
        ).groups()
        for folder in ("embedded", "embedded/profiles"):
            text = paragraph(f"fluidsched/workload/{folder}/{name}.json")
            assert f"{trace}, {licence}" in text


def test_catalog_entries_say_what_notice_says() -> None:
    """Each entry has one of the sources of the catalog, and a server made of it says which, with its licence."""
    sources = {
        source["name"]: source
        for source in json.loads((PACKAGE / "server/catalog.json").read_text())["sources"]
    }
    text = paragraph("fluidsched/server/catalog.json")
    for name, source in sources.items():
        assert re.search(rf"{re.escape(name)}: [^:]*, {source['licence']}\.", text)
    entries = catalog.entries()
    assert {entry.source for entry in entries} == set(sources)
    for entry in entries:
        assert f"{entry.source} ({sources[entry.source]['licence']})" in entry.server().source
