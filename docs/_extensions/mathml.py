"""Equations as MathML, which browsers draw by themselves: no script, no font, no network.

`latex2mathml` translates at build time; what it does not know fails the build instead of showing raw LaTeX.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError


def mathml(latex: str, display: str) -> str:
    upright = re.sub(r"\\mathrm\{(\w)\}", r"\\text{\1}", latex.strip())  # <mi> of one letter is italic
    try:
        result = str(convert(upright, display=display))
    except Exception as error:
        raise ExtensionError(f"no MathML for {latex!r}: {error}") from error
    if "<mi>&</mi>" in result or "<mi>\\" in result:  # an environment or command passed through as it stands
        raise ExtensionError(f"no MathML for {latex!r}: it holds what latex2mathml does not know")
    return result


def inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="equation">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
