"""What our docstrings mean to reStructuredText.

They are written to be read in a terminal: an indented paragraph of the prose is a formula, kept as it stands, and a
bar is an absolute value.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

SECTION = re.compile(r"^(Parameters|Returns|Yields|Raises|Attributes|Examples?|Notes|See Also|References)$")
LIST = re.compile(r"\s*([-*]|\d+\.) ")


def formulas_stand(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Make literal blocks of the indented paragraphs before the first section; escape bars in the others."""
    underlined = (
        i for i, line in enumerate(lines[:-1]) if SECTION.match(line) and set(lines[i + 1]) == {"-"}
    )
    end = next(underlined, len(lines))
    result: list[str] = []
    literal = False
    for number, line in enumerate(lines):
        starts = line.startswith("    ") and (number == 0 or not lines[number - 1].strip())
        above = next((text for text in reversed(result) if text.strip()), "")
        if number < end and starts and not literal and above and not LIST.match(above):
            literal = True
            if not above.endswith("::"):
                result += [".. code-block:: text", ""]
        elif line.strip() and not line.startswith(" "):
            literal = False
        result.append(line if literal or ">>>" in line else bars_escaped(line))
    lines[:] = result


def bars_escaped(line: str) -> str:
    """`|` outside of backticks as a character of its own."""
    parts = line.split("`")
    return "`".join(part if k % 2 else part.replace("|", "\\|") for k, part in enumerate(parts))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect(
        "autodoc-process-docstring", formulas_stand, priority=100
    )  # before napoleon reads the sections
    return {"parallel_read_safe": True, "parallel_write_safe": True}
